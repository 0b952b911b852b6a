"""A dataset as its reader found it: classes in order, and parts not yet split or preprocessed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.seen import short_digests
from training.dataset_names import TEST as TEST
from training.dataset_names import TRAIN as TRAIN
from training.dataset_names import VALIDATION as VALIDATION
from training.dataset_names import class_names as class_names
from training.samples import Samples


@dataclass(frozen=True)
class Part:
    """Samples with their targets.

    Attributes:
        samples: inputs by index.
        targets: int64 `[N]`: positions in the dataset's list of classes.
        digests: the sha256 of what each sample was read from, once all were read.
    """

    samples: Samples
    targets: Tensor
    digests: tuple[bytes, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, indices: Tensor) -> "Part":
        """Some of the samples, in the order of `indices`."""
        digests = tuple(self.digests[index] for index in indices.tolist()) if self.digests else ()
        return Part(self.samples.select(indices), self.targets[indices], digests)

    def source_digests(self) -> Tensor:
        """Short ones, uint8 `[N, 16]`; taken now of samples that lay in memory from the start."""
        if self.digests:
            return short_digests(self.digests)
        return short_digests([self.samples.read(index)[1] for index in range(len(self))])


@dataclass(frozen=True)
class Source:
    """What a reader found.

    Attributes:
        name: what a person calls the dataset.
        classes: names in the order of the targets.
        parts: `train` always; `validation` and `test` where the source has them apart.
        notes: what a person should know, such as files that were skipped.
    """

    name: str
    classes: tuple[str, ...]
    parts: Mapping[str, Part]
    notes: tuple[str, ...] = ()


def targets_of(labels: Sequence[Any], classes: Sequence[str]) -> Tensor:
    """The positions of `labels` in `classes`, int64 `[N]`."""
    positions = {name: index for index, name in enumerate(classes)}
    return torch.tensor([positions[str(label)] for label in labels], dtype=torch.int64)


def plain_labels(y: Any) -> list[Any]:
    """Labels as a list of Python values, from a list, an array or a tensor `[N]`."""
    values: list[Any] = np.asarray(y).reshape(-1).tolist()
    return values
