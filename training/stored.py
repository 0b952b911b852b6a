"""A stored dataset as a source: what training and evaluation open."""

from pathlib import Path

import torch

from training.dataset_manifest import SampleRecord
from training.dataset_names import PARTS
from training.dataset_store import FILES, stored_in
from training.picture_files import PictureFiles
from training.source import Part, Source
from training.stored_numbers import read_numbers


def read_stored(folder: Path) -> Source:
    """The dataset that lies in `folder`, under its classes' names and its samples' own.

    Raises:
        training.dataset_store.DatasetDamaged: it is not what was stored.
        training.dataset_store.DatasetRefused: nothing can be learned from it.
    """
    stored = stored_in(folder)
    stored.check_usable()
    manifest = stored.manifest
    if manifest.kind != "pictures":
        found = read_numbers(folder, manifest.kind)
        return Source(manifest.id, found.classes, found.parts, found.notes)
    samples = stored.samples()
    parts = {
        name: _part(folder, [one for one in samples if one.part == name], manifest.classes)
        for name in PARTS
        if any(one.part == name for one in samples)
    }
    notes = [one.sentence for one in manifest.report.faults if one.severity == "warning"]
    return Source(manifest.id, manifest.classes, parts, tuple(notes))


def _part(folder: Path, samples: list[SampleRecord], classes: tuple[str, ...]) -> Part:
    positions = {name: index for index, name in enumerate(classes)}
    files = PictureFiles(
        folder / FILES,
        tuple(str(one.file) for one in samples),
        names=tuple(one.name for one in samples),
        digests=tuple(one.sha256 for one in samples),
    )
    return Part(files, torch.tensor([positions[one.label] for one in samples], dtype=torch.int64))
