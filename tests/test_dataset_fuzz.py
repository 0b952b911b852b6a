"""Mutated files of numbers: a dataset or a named refusal, never anything else."""

import io
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.archive import ArchiveError
from training.faults import DatasetFaults
from training.intake import take_in
from training.progress import drive

TABLE = "a,b,kind\n" + "".join(f"{i},{i / 2},{'xyz'[i % 3]}\n" for i in range(30))
TELLING = b"\0\n\r\",;'()9-eE.\x80\xff"


def arrays() -> bytes:
    file = io.BytesIO()
    x = np.random.default_rng(0).random((20, 3, 4), dtype=np.float32)
    np.savez(file, x_train=x, y_train=np.arange(20) % 3, x_test=x[:4] + 1, y_test=np.arange(4) % 3)
    return file.getvalue()


ARRAYS = arrays()


def mutated(data: bytes, rng: random.Random, within: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(min(len(changed), within))
        changed[at] = rng.choice(TELLING) if rng.random() < 0.7 else rng.randrange(256)
    return bytes(changed)


def with_mutated_headers(rng: random.Random) -> bytes:
    """Packed again, so that checksums fit and the change reaches the reader of arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(ARRAYS)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, mutated(old.read(name), rng, 128))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")  # numpy's, about headers; they are refused or read
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["table", "archive", "headers"]))
def test_a_mutated_file_is_a_dataset_or_a_named_refusal(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    data = {
        "table": lambda: mutated(TABLE.encode(), rng, 1000),
        "archive": lambda: mutated(ARRAYS, rng, 100_000),
        "headers": lambda: with_mutated_headers(rng),
    }[kind]()
    suffix: Literal["csv", "npz"] = "csv" if kind == "table" else "npz"
    with tempfile.TemporaryDirectory() as folder:
        path, staging = Path(folder, "upload"), Path(folder, "staging")
        path.write_bytes(data)
        staging.mkdir()
        try:
            draft = drive(take_in(path, suffix, "it", staging))
        except (ArchiveError, DatasetFaults):
            return
    assert draft.samples
    assert {one.label for one in draft.samples} == set(draft.classes)
