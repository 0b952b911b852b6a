"""The exponent of a cost: `cost = c0 + c1 * size ** p`, measured at several sizes in rounds.

A plain slope on logarithms is too small where `c0` is large, so there are two: that of the cost,
and that of what the cost rises above its value at the smallest size, against what the size rises.
For a straight line the second is 1 whatever `c0` is; of what should not grow it says nothing. Both
are Theil-Sen slopes, the median over all pairs of sizes, of medians over rounds; intervals come
from drawing rounds again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.rounds import Estimate

NUM_RESAMPLES: Final = 2000
LEAST_RISE: Final = 0.1
"""A size counts for the second slope once its cost is by this share above the smallest one's."""
LEAST_SIZES: Final = 3


@dataclass(frozen=True, slots=True)
class Exponent:
    """Of one cost.

    Attributes:
        whole: of the cost.
        marginal: of what it rises; None where it hardly rises, or at fewer than three sizes, or
            nobody asked.
        unit: `c1` of a straight line: the cost of one more, between the smallest and largest size.
    """

    whole: Estimate
    marginal: Estimate | None
    unit: float

    def __str__(self) -> str:
        beyond = "" if self.marginal is None else f"; rise {_short(self.marginal)}"
        return f"{_short(self.whole)}{beyond}"

    @property
    def low(self) -> float:
        """The lower end of what the exponent is at least, by the larger of the two."""
        return max(one.low for one in (self.whole, self.marginal) if one is not None)

    @property
    def high(self) -> float:
        """The upper end of what the exponent is at most."""
        return max(one.high for one in (self.whole, self.marginal) if one is not None)


def fit(
    sizes: Sequence[int],
    costs: Sequence[Sequence[float]],
    *,
    with_marginal: bool = True,
    seed: int = 0,
) -> Exponent:
    """The exponent of a cost.

    Args:
        sizes: at least two, ascending.
        costs: a row a round, a column a size; above 0.
        with_marginal: whether what it rises is of interest.
    """
    x, table = np.array(sizes, float), np.array(costs, float)
    drawn = np.random.default_rng(seed).integers(0, len(table), (NUM_RESAMPLES, len(table)))
    medians, resampled = np.median(table, axis=0), np.median(table[drawn], axis=1)
    whole = _estimate(slopes(x, medians[None]), slopes(x, resampled), len(table))
    rises = np.flatnonzero(medians[1:] - medians[0] >= LEAST_RISE * medians[0]) + 1
    marginal = None
    if with_marginal and len(rises) >= LEAST_SIZES:
        rise = x[rises] - x[0]
        marginal = _estimate(
            slopes(rise, _rise(medians[None], rises)),
            slopes(rise, _rise(resampled, rises)),
            len(table),
        )
    return Exponent(whole, marginal, float((medians[-1] - medians[0]) / (x[-1] - x[0])))


def slopes(x: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Theil-Sen slopes of `log cost` over `log x`, one for each row of `costs`."""
    left, right = np.triu_indices(len(x), 1)
    across = np.log(x[right]) - np.log(x[left])
    up = np.log(costs[:, right]) - np.log(costs[:, left])
    return np.median(up / across, axis=1)


def _rise(costs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Above the smallest size's; a resample in which it does not rise rises by next to nothing."""
    first = costs[:, :1]
    return np.maximum(costs[:, columns] - first, 1e-3 * first)


def _estimate(found: np.ndarray, resampled: np.ndarray, num_rounds: int) -> Estimate:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Estimate(float(found[0]), float(low), float(high), num_rounds)


def _short(found: Estimate) -> str:
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
