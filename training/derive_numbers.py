"""A stored dataset of numbers with rows dropped, relabelled or moved: written anew, as one NPZ.

Its rows have no names but their part and their position, which are counted anew.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.sync import sync_file
from training.arrays import read_npz
from training.dataset_manifest import SampleRecord
from training.dataset_names import PARTS
from training.dataset_store import Draft, StoredDataset
from training.samples import InMemory
from training.stored_numbers import ARRAYS, numbers_draft, read_numbers


def rewritten(
    base: StoredDataset, kept: Sequence[tuple[int, SampleRecord]], staging: Path, name: str
) -> Draft:
    """The draft of the rows that stay.

    Args:
        kept: each with its position in the list of samples, and what it is from now on.

    Raises:
        training.faults.DatasetFaults: what is left is no dataset.
    """
    source = read_numbers(base.folder, base.manifest.kind)
    held = [part.samples for part in source.parts.values()]
    data = torch.cat([one.data for one in held if isinstance(one, InMemory)])
    arrays: dict[str, Any] = {}
    for part in PARTS:
        rows = [position for position, one in kept if one.part == part]
        if rows:
            arrays[f"x_{part}"] = _saved(data[rows])
            arrays[f"y_{part}"] = np.array([one.label for _, one in kept if one.part == part])
    path = staging / ARRAYS
    np.savez(path, **arrays)
    sync_file(path)
    draft = numbers_draft(name, lambda: read_npz(path), "arrays", path)
    return replace(draft, parent=base.id)


def _saved(data: Tensor) -> Any:
    """As `training.arrays` reads it back: pictures of bytes with their channels last."""
    are_pictures = data.dtype == torch.uint8 and data.ndim == 4 and data.shape[1] in (1, 3)
    return np.ascontiguousarray((data.movedim(1, -1) if are_pictures else data).numpy())
