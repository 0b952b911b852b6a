"""What a version has seen travels in its checkpoint, and old checkpoints load without it."""

from pathlib import Path

import pytest
import torch
from conftest import publish_cnn
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_train import config

from models import checkpoint
from models.seen import DIGEST_BYTES, SEEN, Seen, SeenDamaged, read_seen, short_digests
from models.store import ModelStore
from training.config import DataConfig
from training.datasets import open_dataset
from training.progress import drive
from training.publish import publish, seen_by
from training.train import train

rows = st.lists(st.binary(min_size=DIGEST_BYTES, max_size=DIGEST_BYTES), max_size=30)


@given(rows, rows)
def test_membership_is_that_of_a_set(known: list[bytes], asked: list[bytes]) -> None:
    seen = Seen.of(short_digests(known), short_digests([]))
    asked += known[:3]
    assert seen.was_trained_on(short_digests(asked)).tolist() == [one in known for one in asked]
    assert not seen.was_selected_on(short_digests(asked)).any()
    kept = [bytes(row) for row in seen.train.tolist()]
    assert kept == sorted(set(known))


@given(rows, rows)
def test_what_is_taken_away_is_seen_no_more(known: list[bytes], taken: list[bytes]) -> None:
    taken += known[:3]
    seen = Seen.of(short_digests(known), short_digests(known)).without(short_digests(taken))
    left = sorted(set(known) - set(taken))
    assert [bytes(row) for row in seen.train.tolist()] == left
    assert [bytes(row) for row in seen.validation.tolist()] == left


def test_a_trained_version_carries_what_it_saw(tmp_path: Path) -> None:
    trained = drive(train(config()))
    store = ModelStore(tmp_path)
    version = publish(trained, store, "digits")
    assert SEEN in version.manifest().files
    assert checkpoint.load(version.folder).manifest.labels == tuple("0123456789")
    seen = read_seen(version.folder, version.manifest().files)
    dataset = drive(open_dataset(DataConfig.of(dataset="digits")))
    parts = {name: part.source_digests() for name, part in dataset.parts.items()}
    assert seen.was_trained_on(parts["train"]).all()
    assert seen.was_selected_on(parts["validation"]).all()
    fresh = ~(seen.was_trained_on(parts["test"]) | seen.was_selected_on(parts["test"]))
    # Two of the digits are the same drawing twice: a copy of a seen picture is seen.
    assert 170 <= int(fresh.sum()) <= len(parts["test"])


def test_what_the_parent_saw_is_inherited(tmp_path: Path) -> None:
    from dataclasses import replace

    trained = drive(train(config()))
    store = ModelStore(tmp_path)
    first = publish(trained, store, "digits")
    pairs = [(torch.rand(1, 8, 8), index % 2) for index in range(8)]
    other = drive(open_dataset(DataConfig.of(validation_fraction=0, test_fraction=0), None, pairs))
    child = replace(trained, dataset=other, parent=str(first))
    small = replace(child, spec=trained.spec, dataset=replace(trained.dataset, parts=other.parts))
    own = seen_by(small)
    assert len(own.train) == 8
    inherited = own.with_parent(read_seen(first.folder, first.manifest().files))
    assert len(inherited.train) == 8 + len(seen_by(trained).train)


def test_a_checkpoint_without_the_file_has_seen_nothing(tmp_path: Path) -> None:
    version = publish_cnn(ModelStore(tmp_path), "digits", seed=1)
    assert not read_seen(version.folder, version.manifest().files)


@pytest.mark.parametrize(
    "tensors",
    [
        {"train": torch.zeros(2, 16, dtype=torch.uint8)},
        {name: torch.zeros(2, 15, dtype=torch.uint8) for name in ("train", "validation")},
        {name: torch.zeros(2, 16) for name in ("train", "validation")},
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, tensors: dict) -> None:
    save_file(tensors, tmp_path / SEEN)
    with pytest.raises(SeenDamaged, match="seen.safetensors"):
        read_seen(tmp_path, [SEEN])


def test_a_streamed_folder_and_a_resident_one_give_the_same_digests(tmp_path: Path) -> None:
    from test_datasets import picture_folder

    folder = str(picture_folder(tmp_path / "pets"))
    found = [
        drive(open_dataset(DataConfig.of(dataset=folder, memory_budget_mb=budget, num_workers=0)))
        for budget in (0, 100)
    ]
    assert torch.equal(*[one.train.source_digests() for one in found])
