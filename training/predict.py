"""Predictions without a server: a version, files, and what it says of each."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.picture import PictureError, PictureLimits
from models.preprocessing import Preprocessing

BATCH = 16
MAX_NUMBERS_BYTES = 64 * 1024 * 1024


class InputInvalid(Exception):
    """A file does not hold what the model takes."""


@dataclass(frozen=True, slots=True)
class Guess:
    """One class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of one file.

    Attributes:
        file: its path.
        best: the most probable classes, best first; empty where there is a fault.
        fault: why the file could not be used.
    """

    file: str
    best: tuple[Guess, ...] = ()
    fault: str | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat object; `label` and `probability` are those of the best class."""
        if self.fault is not None:
            return {"file": self.file, "error": self.fault}
        return {
            "file": self.file,
            **asdict(self.best[0]),
            "top_k": [asdict(guess) for guess in self.best],
        }


def predict_files(
    checkpoint: Checkpoint, files: Sequence[Path], device: torch.device, top_k: int = 3
) -> Iterator[Prediction]:
    """Predict each file, in order; a faulty one does not stop the others.

    Args:
        checkpoint: from `models.checkpoint.load`; its network is moved to `device`.
        files: pictures, or `.npy` and `.json` files of numbers where the model takes numbers.
        device: where to compute.
        top_k: how many classes to name.
    """
    network, manifest = checkpoint.network.to(device), checkpoint.manifest
    top_k = min(top_k, len(manifest.labels))
    for start in range(0, len(files), BATCH):
        read = [_read(path, manifest.preprocessing) for path in files[start : start + BATCH]]
        inputs = [one for one in read if isinstance(one, Tensor)]
        answers: Iterator[Tensor] = iter(())
        if inputs:
            with torch.inference_mode():
                finished = manifest.preprocessing.finish(torch.stack(inputs).to(device))
                scaled = network(finished).float() / (manifest.temperature or 1.0)
                answers = iter(scaled.softmax(1).cpu())
        for path, one in zip(files[start : start + BATCH], read, strict=True):
            if isinstance(one, Tensor):
                best = next(answers).topk(top_k)
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                guesses = tuple(Guess(manifest.labels[place], p) for place, p in pairs)
                yield Prediction(str(path), guesses)
            else:
                yield Prediction(str(path), fault=one)


def _read(path: Path, preprocessing: Preprocessing) -> Tensor | str:
    """The file as `finish` takes it, or the sentence on why not."""
    try:
        if preprocessing.accepts_pictures:
            return preprocessing.picture(_bytes(path, PictureLimits().max_bytes))
        return _numbers(path, preprocessing.raw_shape)
    except (PictureError, InputInvalid) as error:
        return str(error)
    except OSError as error:
        return f"{error.strerror or error}"


def _bytes(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit + 1)  # one more, so that what is too long is refused as such


def _numbers(path: Path, shape: tuple[int, ...]) -> Tensor:
    content = _bytes(path, MAX_NUMBERS_BYTES)
    try:
        if path.suffix == ".npy":
            found = np.load(io.BytesIO(content), allow_pickle=False)
        else:
            found = np.asarray(json.loads(content))
        numbers = torch.from_numpy(np.asarray(found, dtype=np.float32))
    except (ValueError, TypeError, EOFError, RecursionError) as error:
        raise InputInvalid(f"no .npy or JSON of numbers: {error}") from None
    if tuple(numbers.shape) != shape:
        raise InputInvalid(f"shape {list(numbers.shape)}; the model takes {list(shape)}")
    if not bool(numbers.isfinite().all()):
        raise InputInvalid("a number is not finite")
    return numbers
