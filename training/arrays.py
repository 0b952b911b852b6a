"""NPZ files with `x` and `y`, or with `x_train`, `y_train`, `x_test`, `y_test`."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.faults import DatasetFaults
from training.samples import InMemory, tensor_of
from training.source import (
    TEST,
    TRAIN,
    VALIDATION,
    Part,
    Source,
    class_names,
    plain_labels,
    targets_of,
)

_NUMBERS = frozenset(
    {
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    }
)
"""What torch takes; not the long doubles of some machines."""
_SUFFIXES = {
    "": TRAIN,
    "_train": TRAIN,
    "_validation": VALIDATION,
    "_val": VALIDATION,
    "_test": TEST,
}


def read_npz(path: Path) -> Source:
    """The arrays in `path`; nothing in it is unpickled.

    Bytes `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]` with C of 1 or 3 are pictures; anything
    else is numbers. Labels are whole numbers or texts, one a sample.

    Raises:
        DatasetFaults: arrays that are missing, of other lengths, of objects, or not finite.
    """
    arrays = _arrays(path)
    found = {
        part: (arrays[f"x{suffix}"], arrays[f"y{suffix}"])
        for suffix, part in _SUFFIXES.items()
        if f"x{suffix}" in arrays and f"y{suffix}" in arrays
    }
    faults = [fault for part, (x, y) in found.items() for fault in _faults(part, x, y)]
    if TRAIN not in found:
        names = ", ".join(sorted(arrays)) or "nothing"
        faults.append(f"arrays x and y (or x_train and y_train) are needed; there is {names}")
    if faults:
        raise DatasetFaults(str(path), faults)
    tensors = {part: _samples(x) for part, (x, _) in found.items()}
    looks = sorted({f"{one.dtype} {list(one.shape[1:])}" for one in tensors.values()})
    if len(looks) > 1:
        raise DatasetFaults(str(path), [f"the parts differ: samples of {' and '.join(looks)}"])
    labels = {part: plain_labels(y) for part, (_, y) in found.items()}
    classes = class_names([label for part in labels.values() for label in part])
    parts = {
        part: Part(InMemory(tensor), targets_of(labels[part], classes))
        for part, tensor in tensors.items()
    }
    return Source(path.stem, classes, parts)


def _arrays(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetFaults(str(path), [f"{path.name}: not a readable NPZ file: {error}"]) from None


def _faults(part: str, x: Any, y: Any) -> list[str]:
    faults = []
    if x.dtype.name not in _NUMBERS or x.ndim < 2 or not x.size:
        faults.append(f"{part}: x must be numbers [N, ...], not {x.dtype} {list(x.shape)}")
    elif x.dtype.kind == "f" and not np.isfinite(x).all():
        bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1)).tolist()
        faults += [f"{part} sample {index}: a number in it is not finite" for index in bad]
    if y.dtype.kind not in "uiUb" or y.size != len(y):
        faults.append(
            f"{part}: y must be whole numbers or texts [N], not {y.dtype} {list(y.shape)}"
        )
    if len(x) != len(y):
        faults.append(f"{part}: x has {len(x)} samples and y has {len(y)}")
    return faults


def _samples(x: Any) -> torch.Tensor:
    is_grey = x.dtype == np.uint8 and x.ndim == 3
    return tensor_of(x[:, None] if is_grey else x)
