"""Datasets by name: scikit-learn's digits, and three that torchvision reads and fetches."""

import gzip
import importlib.util
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.faults import DatasetUnavailable
from training.samples import InMemory
from training.source import TEST, TRAIN, Part, Source

TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}
NAMES = ("digits", *TORCHVISION)
DOWNLOAD_DEADLINE_S = 30.0
_DIGITS_FILE = "datasets/data/digits.csv.gz"


def read_builtin(name: str, data_root: Path) -> Source:
    """The dataset called `name`, one of `NAMES`.

    Raises:
        DatasetUnavailable: it is neither under `data_root` nor can it be downloaded.
    """
    return _digits() if name == "digits" else _from_torchvision(name, data_root)


def _digits() -> Source:
    """The 1,797 handwritten digits that come with scikit-learn: grey, 8 pixels a side."""
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise DatasetUnavailable("digits come with scikit-learn, which is not installed")
    path = Path(package.submodule_search_locations[0], _DIGITS_FILE)
    if path.is_file():
        # Importing scikit-learn takes longer than training on its digits, so read its file.
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int64)
        values, labels = table[:, :-1], table[:, -1]
    else:
        from sklearn.datasets import load_digits  # its file has moved, and it knows where

        values, labels = load_digits(return_X_y=True)
    sixteenths = torch.from_numpy(np.asarray(values, dtype=np.int64))
    pixels = ((sixteenths * 255 + 8) // 16).to(torch.uint8).view(-1, 1, 8, 8)
    targets = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    classes = tuple(str(digit) for digit in range(10))
    return Source("digits", classes, {TRAIN: Part(InMemory(pixels), targets)})


def _from_torchvision(name: str, data_root: Path) -> Source:
    from torchvision import datasets  # seconds, and only these three names need it

    dataset_class = getattr(datasets, TORCHVISION[name])
    train, test = (_read(dataset_class, name, data_root, train=train) for train in (True, False))
    classes = [str(text).partition(" - ")[0] for text in train.classes]
    parts = {TRAIN: _part(train), TEST: _part(test)}
    return Source(name, tuple(classes), parts)


def _read(dataset_class: Any, name: str, data_root: Path, *, train: bool) -> Any:
    """From `data_root` or a folder of the dataset's name in it; downloaded if in neither."""
    for root in (data_root, data_root / name):
        try:
            return dataset_class(str(root), train=train, download=False)
        except RuntimeError:
            continue  # torchvision's word for: not here, or not whole
    try:
        with _network_deadline():
            return dataset_class(str(data_root / name), train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise DatasetUnavailable(
            f"{name} is not under {data_root} and cannot be downloaded ({_reason(error)}); "
            f"put torchvision's files for it there, or name their folder with --data-root"
        ) from error


def _reason(error: Exception) -> str:
    """What was wrong at the last of the addresses that torchvision tried."""
    return str(error).strip().splitlines()[-1].strip("<>") or type(error).__name__


def _part(dataset: Any) -> Part:
    pixels = torch.as_tensor(dataset.data)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Part(InMemory(pixels), _int64(dataset.targets))


def _int64(targets: Any) -> Tensor:
    return torch.as_tensor(targets).to(torch.int64)


@contextmanager
def _network_deadline() -> Iterator[None]:
    """torchvision's download sets no deadline of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_DEADLINE_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
