"""Answers to samples that a network did not learn from, kept to be compared with another's."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.report import Counts, Report

FILE = "answers.safetensors"
TENSORS = ("digests", "targets", "logits", "seen")


@dataclass(frozen=True)
class Answers:
    """One row a sample.

    Attributes:
        classes: names in the order of the logits and targets.
        digests: the sha256 of what each sample was read from, uint8 `[N, 32]`.
        targets: int64 `[N]`.
        logits: float32 `[N, classes]`.
        seen: bool `[N]`: whether the base that it began with had seen the sample, so that the
            answer is no evidence.
    """

    classes: tuple[str, ...]
    digests: Tensor
    targets: Tensor
    logits: Tensor
    seen: Tensor

    @property
    def num_seen(self) -> int:
        """Answers that are no evidence."""
        return int(self.seen.sum())

    @property
    def num_evidence(self) -> int:
        """Answers that are."""
        return len(self.targets) - self.num_seen

    def report(self) -> Report:
        """The figures of those that are evidence; of all, where none is."""
        counted = ~self.seen if self.num_evidence else torch.ones_like(self.seen)
        counts = Counts(len(self.classes))
        counts.update(self.logits[counted], self.targets[counted])
        return counts.report(self.classes)

    def save(self, folder: Path) -> Path:
        """As `answers.safetensors` in a run's folder."""
        tensors = {name: getattr(self, name) for name in TENSORS}
        path, staging = folder / FILE, folder / f".{FILE}"
        named = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, staging, metadata={"classes": json.dumps(self.classes)})
        staging.replace(path)
        return path

    @classmethod
    def load(cls, folder: Path) -> "Answers":
        """What `save` wrote."""
        with safe_open(folder / FILE, framework="pt") as file:
            classes = tuple(json.loads(file.metadata()["classes"]))
            return cls(classes, *(file.get_tensor(name) for name in TENSORS))


def digest_rows(digests: tuple[bytes, ...]) -> Tensor:
    """uint8 `[N, 32]`."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)
