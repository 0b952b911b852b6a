"""Image folders: one sub-folder a class, or `train/`, `val/` and `test/` with those inside."""

from collections.abc import Mapping
from pathlib import Path

import torch

from training.dataset_names import LITTER, PART_FOLDERS, PICTURE_SUFFIXES, SKIPPED_SUFFIXES
from training.faults import DatasetFaults
from training.picture_files import PictureFiles
from training.source import TRAIN, Part, Source


def read_folder(root: Path) -> Source:
    """The pictures below `root`; opened later, when they are read.

    Raises:
        DatasetFaults: empty or unknown class folders, and files that are no pictures, all of them.
    """
    folders = _part_folders(root)
    classes = tuple(sorted(path.name for path in _visible(folders[TRAIN]) if path.is_dir()))
    faults, notes = _class_faults(root, folders, classes), []
    parts: dict[str, Part] = {}
    for part, folder in folders.items():
        paths, targets = [], []
        for index, name in enumerate(classes):
            found = _Class(root, folder / name)
            paths += found.pictures
            targets += [index] * len(found.pictures)
            faults += found.faults
            notes += found.notes
        samples = PictureFiles(root, tuple(paths))
        parts[part] = Part(samples, torch.tensor(targets, dtype=torch.int64))
    if faults:
        raise DatasetFaults(str(root), faults)
    return Source(root.name, classes, parts, tuple(notes))


def _part_folders(root: Path) -> dict[str, Path]:
    inside = [path for path in _visible(root) if path.is_dir()]
    folders = {PART_FOLDERS[path.name.lower()]: path for path in inside if _is_part(path)}
    return folders if TRAIN in folders else {TRAIN: root}


def _is_part(path: Path) -> bool:
    return path.name.lower() in PART_FOLDERS


def _class_faults(root: Path, folders: Mapping[str, Path], classes: tuple[str, ...]) -> list[str]:
    faults = []
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        faults.append(f"{folders[TRAIN]}: two class folders or more are needed; there is {found}")
    for folder in folders.values():
        for path in _visible(folder):
            if path.is_dir() and path.name not in classes:
                faults.append(
                    f"{path.relative_to(root)}: no class of this name among the training ones"
                )
    return faults


class _Class:
    """What lies in one class folder of one part, by paths relative to the dataset."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.pictures: list[str] = []
        self.notes: list[str] = []
        self.faults: list[str] = []
        for path in _files(folder):
            self._sort(str(path.relative_to(root)), path.suffix.lower())
        if not self.pictures:
            self.faults.append(f"{folder.relative_to(root)}: no pictures in this class folder")

    def _sort(self, name: str, suffix: str) -> None:
        if suffix in PICTURE_SUFFIXES:
            self.pictures.append(name)
        elif suffix in SKIPPED_SUFFIXES:
            self.notes.append(f"{name}: skipped; JPEG, PNG and WebP are read")
        else:
            self.faults.append(f"{name}: not a picture; JPEG, PNG and WebP are read")


def _visible(folder: Path) -> list[Path]:
    """What lies in `folder`, in order, without hidden files and what systems leave behind."""
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name.lower() not in LITTER
    ]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files: list[Path] = []
    for path in _visible(folder):
        files += _files(path) if path.is_dir() else [path]
    return files
