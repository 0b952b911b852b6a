"""Which samples each step sees: a pure function of the seed and the step.

Resident and streamed feeding, and a run that resumes, all ask here and get the same answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from training.randomness import generator


@dataclass(frozen=True)
class Batch:
    """The samples of one step.

    Attributes:
        step: counted from 0 over the whole run.
        epoch: counted from 0.
        indices: int64 `[n]`, on the CPU.
        first: where the first of these stands in the batch that several ranks share.
        num_whole: samples of that batch; None where it is not shared.
        has_neighbour: whether the first index only serves to be mixed into the second.
    """

    step: int
    epoch: int
    indices: Tensor
    first: int = 0
    num_whole: int | None = None
    has_neighbour: bool = False

    @property
    def size(self) -> int:
        """Samples that all ranks together learn from in this step."""
        return len(self.indices) if self.num_whole is None else self.num_whole

    @property
    def weight(self) -> float:
        """The share of the whole batch that these samples are."""
        return (len(self.indices) - self.has_neighbour) / self.size


@dataclass(frozen=True)
class Order:
    """A shuffled pass over `num_samples` for each of `num_epochs`.

    The last batch of a pass is shorter where the numbers do not divide; a single sample left over
    joins the batch before it, because a batch norm cannot learn from one.
    """

    num_samples: int
    batch_size: int
    num_epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass; at least one."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return max(1, whole + (rest > 1))

    @property
    def num_steps(self) -> int:
        """Batches in the whole run."""
        return self.steps_per_epoch * self.num_epochs

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """Every batch from `first_step` on."""
        permutation, known_epoch = torch.empty(0), -1
        for step in range(first_step, self.num_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != known_epoch:
                permutation, known_epoch = self._permutation(epoch), epoch
            yield Batch(step, epoch, permutation[self._span(position)])

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(
            self.num_samples, generator=generator(self.seed, "shuffle", epoch=epoch)
        )

    def _span(self, position: int) -> slice:
        last = position == self.steps_per_epoch - 1
        start = position * self.batch_size
        return slice(start, self.num_samples if last else start + self.batch_size)


def in_turn(num_samples: int, batch_size: int) -> Iterator[Batch]:
    """Every sample once, unshuffled: how a model is measured."""
    for step, start in enumerate(range(0, num_samples, batch_size)):
        yield Batch(step, 0, torch.arange(start, min(start + batch_size, num_samples)))
