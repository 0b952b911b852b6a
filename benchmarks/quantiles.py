"""The distribution of a measured time in a few numbers, its tail told finer than the rest.

A machine that stands still twice a second is in less than a hundredth of the times, and is most of
what a 99th percentile under load is made of: steps of two per cent would leave it out.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

NUM_COARSE: Final = 49
NUM_FINE: Final = 20
COARSE, FINE = 0.02, 0.001
LEVELS: Final = (
    *((np.arange(NUM_COARSE) + 0.5) * COARSE),
    *(NUM_COARSE * COARSE + (np.arange(NUM_FINE) + 0.5) * FINE),
)
"""From 0 to 1: the middle of each step."""


def named(times_ms: Sequence[float]) -> dict[str, float]:
    """Times at `LEVELS` as figures of a sample: `t0_ms`, `t1_ms` and so on, to 0.1 us."""
    return {f"t{index}_ms": round(time_ms, 4) for index, time_ms in enumerate(times_ms)}


def quantiles_ms(times_ms: Sequence[float]) -> dict[str, float]:
    """The same of times that were measured one by one."""
    return named(np.quantile(times_ms, LEVELS, method="inverted_cdf").tolist())


def drawable_ms(sample: Mapping[str, float]) -> list[float]:
    """What a sample tells of a distribution, as times that are all as likely as each other."""
    times_ms = [sample[f"t{index}_ms"] for index in range(len(LEVELS))]
    coarse, fine = times_ms[:NUM_COARSE], times_ms[NUM_COARSE:]
    return coarse * round(COARSE / FINE) + fine
