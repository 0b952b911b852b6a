"""Snapshots: everything a training run resumes from, to the bit. Never served, never unpickled.

    <folder>/step-0000000700/weights.safetensors    and whatever other tensors the run has
    <folder>/step-0000000700/state.json             counters, settings, and the files' sha256; last

A snapshot is written beside, synced and renamed, so it is whole or absent. The newest sound one is
used; the two newest are kept.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import sha256_of, sync_folder

STATE = "state.json"
NUM_KEPT = 2
_NAME = re.compile(r"step-\d{10}")
_STAGING = ".writing-"


class SnapshotMismatch(Exception):
    """A snapshot belongs to another run: other settings, another dataset or another network."""


class SnapshotUnwritten(Exception):
    """The disk takes no snapshot: it is full, or broken."""


@dataclass(frozen=True)
class Snapshot:
    """What was saved: tensors by file and name, on the CPU, and everything else as JSON."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class Snapshots:
    """The snapshots of one run, in a folder that no other run writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write the snapshot of `step`, then drop all but the newest two.

        Raises:
            SnapshotUnwritten, OSError: the disk takes no more.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = self.folder / f"{_STAGING}{uuid.uuid4().hex}"
        staging.mkdir()
        _write(staging, snapshot)
        final = self.folder / f"step-{step:010d}"
        if final.exists():
            shutil.rmtree(final)  # of the same step: as good as this one, or damaged
        staging.rename(final)
        sync_folder(self.folder)
        self._sweep()
        return final

    def newest(self) -> Snapshot | None:
        """The newest snapshot that is whole and undamaged; None where there is none."""
        for path in reversed(self._paths()):
            snapshot = _read(path)
            if snapshot is not None:
                return snapshot
        return None

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def _sweep(self) -> None:
        dropped = self._paths()[:-NUM_KEPT]
        dropped += [path for path in self.folder.iterdir() if path.name.startswith(_STAGING)]
        for path in dropped:
            shutil.rmtree(path, ignore_errors=True)


def _write(folder: Path, snapshot: Snapshot) -> None:
    files = {}
    for name, tensors in snapshot.tensors.items():
        path = folder / f"{name}.safetensors"
        try:
            save_file({key: _plain(tensor) for key, tensor in tensors.items()}, path)
        except SafetensorError as error:
            raise SnapshotUnwritten(f"{path} cannot be written: {error}") from None
        _sync(path)
        files[path.name] = sha256_of(path)
    document = {"files": files, "state": snapshot.state}
    path = folder / STATE
    path.write_text(json.dumps({**document, "sha256": _digest(document)}, indent=1) + "\n")
    _sync(path)
    sync_folder(folder)


def _read(folder: Path) -> Snapshot | None:
    """The snapshot in `folder`, or None if anything of it is missing or damaged."""
    try:
        document = json.loads((folder / STATE).read_text())
        recorded = document.pop("sha256")
        if recorded != _digest(document):
            return None
        if any(sha256_of(folder / name) != digest for name, digest in document["files"].items()):
            return None
        tensors = {Path(name).stem: load_file(folder / name) for name in document["files"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None
    return Snapshot(tensors, document["state"])


def _plain(tensor: Tensor) -> Tensor:
    """A copy, because safetensors wants contiguous tensors that share no memory."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
