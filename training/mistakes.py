"""The worst mistakes: wrong answers that were given with the most confidence, a bounded list."""

import heapq
from dataclasses import dataclass

from torch import Tensor

MAX_MISTAKES = 24


@dataclass(frozen=True, slots=True)
class Mistake:
    """One wrong answer.

    Attributes:
        index: of the sample, in the part that was evaluated.
        target: position of its class among the labels.
        predicted: position of the class that it was given.
        probability: of the class it was given.
        loss: -log(probability of the right class), in nats.
    """

    index: int
    target: int
    predicted: int
    probability: float
    loss: float


class Mistakes:
    """The `limit` mistakes with the highest loss among all that were counted."""

    def __init__(self, limit: int = MAX_MISTAKES) -> None:
        self._limit = limit
        self._heap: list[tuple[float, int, Mistake]] = []

    def update(self, logits: Tensor, targets: Tensor, indices: Tensor) -> None:
        """Look at one batch.

        Args:
            logits: float `[n, classes]` on the CPU.
            targets: int64 `[n]`.
            indices: int64 `[n]`: which samples these are.
        """
        log_probabilities = logits.double().log_softmax(dim=1)
        best, predicted = log_probabilities.max(dim=1)
        loss = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
        wrong = (predicted != targets).nonzero().flatten()
        worst = wrong[loss[wrong].argsort(descending=True, stable=True)[: self._limit]]
        for place in worst.tolist():
            mistake = Mistake(
                int(indices[place]),
                int(targets[place]),
                int(predicted[place]),
                float(best[place].exp()),
                float(loss[place]),
            )
            # Of equals the earlier sample stays, however they were batched.
            entry = (mistake.loss, -mistake.index, mistake)
            if len(self._heap) < self._limit:
                heapq.heappush(self._heap, entry)
            elif entry[:2] > self._heap[0][:2]:
                heapq.heapreplace(self._heap, entry)

    def worst_first(self) -> list[Mistake]:
        """All that are kept."""
        return [one for _, _, one in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
