"""The temperature that makes probabilities honest: logits divided by it before the softmax.

Guo et al., "On calibration of modern neural networks", 2017: the one that makes the right answers
most likely. What it is fitted on is a bounded number of samples, so memory stays what it is.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.randomness import generator

MAX_SAMPLES = 10_000
MAX_LOGITS = 4_000_000
"""So many numbers are kept at most: 16 MB."""
LOWEST, HIGHEST = 0.05, 20.0
MAX_STEPS = 60


@dataclass(frozen=True, slots=True)
class Temperature:
    """A fitted temperature.

    Attributes:
        value: the logits are to be divided by it; above 1 softens, below 1 sharpens.
        negative_log_likelihood: with it, over the samples that it was fitted on.
        num_samples: how many these are.
    """

    value: float
    negative_log_likelihood: float
    num_samples: int


class KeptLogits:
    """Some of the logits that stream by: all of them while they are few, then a fair sample.

    Args:
        num_classes: width of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        self.max_samples = max(1, min(MAX_SAMPLES, MAX_LOGITS // num_classes))
        self.num_offered = 0
        # Memory is taken from the system only as rows are written.
        self._logits = torch.empty(self.max_samples, num_classes)
        self._targets = torch.empty(self.max_samples, dtype=torch.int64)
        self._generator = generator(0, "kept logits")

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Offer a batch, float `[n, classes]` and int64 `[n]` on the CPU."""
        room = max(0, min(len(targets), self.max_samples - self.num_offered))
        stop = self.num_offered + room
        self._logits[self.num_offered : stop] = logits[:room]
        self._targets[self.num_offered : stop] = targets[:room]
        self.num_offered = stop
        if room < len(targets):
            self._replace(logits[room:], targets[room:])

    def fit(self) -> Temperature | None:
        """The temperature between 0.05 and 20 under which the targets are most likely.

        None where there is none in between, as when every answer is right.
        """
        num = min(self.num_offered, self.max_samples)
        return fit_temperature(self._logits[:num], self._targets[:num]) if num else None

    def _replace(self, logits: Tensor, targets: Tensor) -> None:
        """Every sample ever offered is kept with the same probability (Vitter 1985, R)."""
        offered = self.num_offered + 1 + torch.arange(len(targets))
        draws = torch.rand(len(targets), dtype=torch.float64, generator=self._generator)
        places = (draws * offered).long()
        for index in torch.nonzero(places < self.max_samples).flatten().tolist():
            self._logits[places[index]] = logits[index]
            self._targets[places[index]] = targets[index]
        self.num_offered += len(targets)


def fit_temperature(logits: Tensor, targets: Tensor) -> Temperature | None:
    """The temperature for `logits` `[n, classes]` and `targets`, int64 `[n]`.

    The likelihood is concave in the inverse of the temperature, so Newton's steps, kept within a
    bracket, find its only maximum.
    """
    logits = logits.double()
    logits = logits - logits.max(dim=1, keepdim=True).values
    at_target = logits.gather(1, targets.unsqueeze(1)).squeeze(1).mean()
    low, high = 1 / HIGHEST, 1 / LOWEST
    if _slope(logits, at_target, low)[0] >= 0 or _slope(logits, at_target, high)[0] <= 0:
        return None
    inverse = 1.0
    for _ in range(MAX_STEPS):
        slope, curvature = _slope(logits, at_target, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        after = inverse - slope / curvature if curvature > 0 else math.inf
        if not low < after < high:
            after = math.sqrt(low * high)
        if abs(after - inverse) <= 1e-12 * inverse:
            break
        inverse = after
    loss = float((inverse * logits).logsumexp(dim=1).mean() - inverse * at_target)
    return Temperature(1 / inverse, loss, len(targets))


def _slope(logits: Tensor, at_target: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean loss by the inverse of the temperature."""
    probabilities = (inverse * logits).softmax(dim=1)
    mean = (probabilities * logits).sum(dim=1)
    spread = (probabilities * logits.square()).sum(dim=1) - mean.square()
    return float(mean.mean() - at_target), float(spread.mean())
