"""The ideal that the tails are held against: what it is charged with, and what it is not."""

import numpy as np
import pytest

from benchmarks.ideal_batcher import BatchTimes
from benchmarks.poisson import ideal_p99_ms, served_s, whole
from benchmarks.quantiles import drawable_ms, quantiles_ms
from benchmarks.stage import Timing, connections_named, stalls_named, stalls_of

TIMING = Timing(warm_up_s=1.0, closed_s=1.0, open_s=4.0)
SAMPLE = {"asked_per_s": 500.0, "seed": 3.0}
QUICK = BatchTimes({size: [0.0001] * 2 for size in (1, 2, 4, 8, 16, 32)})


def test_one_time_in_a_thousand_is_drawn_once_in_a_thousand() -> None:
    times_ms = [1.0] * 9990 + [50.0] * 10
    drawable = drawable_ms(quantiles_ms(times_ms))
    assert len(drawable) == 1000
    assert (drawable.count(1.0), drawable.count(50.0)) == (999, 1)


def test_the_mean_of_a_batch_is_what_the_connections_got() -> None:
    times_ms = np.random.default_rng(0).gamma(4.0, 0.5, 10_000)
    cell = {**quantiles_ms(times_ms.tolist()), "rate_per_s": 4000.0}
    served = served_s(8, cell)
    assert np.mean(served) == pytest.approx(8 / 4000.0)
    assert np.quantile(served, 0.999) / np.median(served) == pytest.approx(
        np.quantile(times_ms, 0.999) / np.median(times_ms), rel=0.05
    )


def test_http_in_the_batch_lies_on_a_line_and_is_not_padded() -> None:
    samples = {
        connections_named(number): {**quantiles_ms([1.0] * 100), "rate_per_s": number / seconds}
        for number, seconds in ((1, 0.002), (16, 0.017))
    }
    times, constant_s = whole(16)(samples)
    assert times.sizes == list(range(1, 33))
    assert [times.median_s(size) for size in (1, 2, 3, 16, 32)] == pytest.approx(
        [0.002, 0.003, 0.004, 0.017, 0.033]
    )
    assert (times.take(3), times.take(40), constant_s) == ((3, 3), (32, 32), 0.0)


def test_what_left_late_is_late_for_the_ideal_too() -> None:
    undisturbed_ms = ideal_p99_ms(SAMPLE, (QUICK, 0.0), TIMING)
    assert undisturbed_ms < 0.3
    stalled = {**SAMPLE, **stalls_named([(2.0, 2.2)])}
    assert stalls_of(stalled) == [(2.0, 2.2)]
    assert 100 < ideal_p99_ms(stalled, (QUICK, 0.0), TIMING) < 201
    before = {**SAMPLE, **stalls_named([(0.2, 0.4)])}
    assert ideal_p99_ms(before, (QUICK, 0.0), TIMING) == undisturbed_ms, "while it warmed up"
