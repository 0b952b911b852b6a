"""The ideal batcher against queues whose waits are known from theory."""

import numpy as np
import pytest

from benchmarks.ideal_batcher import BatchTimes, latencies_s


def poisson(rate_per_s: float, count: int) -> list[float]:
    return np.random.default_rng(1).exponential(1 / rate_per_s, count).cumsum().tolist()


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    service_s = 0.01
    found = latencies_s(poisson(load / service_s, 200_000), BatchTimes({1: [service_s] * 2}))
    expected_s = service_s + load * service_s / (2 * (1 - load))
    assert found.mean() == pytest.approx(expected_s, rel=0.05)


def test_batches_wait_no_longer_than_inoue_bounds() -> None:
    start_s, row_s, load = 0.002, 0.00005, 0.5
    times = BatchTimes({size: [start_s + row_s * size] * 2 for size in range(1, 513)})
    found = latencies_s(poisson(load / row_s, 200_000), times)
    # arXiv 1912.06322: the wait until the end of the batch is at most
    rate = load / row_s
    bound_s = (
        (row_s + start_s)
        / (2 * (1 - load))
        * (1 + 2 * rate * start_s + (1 - rate * start_s) / (1 + load))
    )
    other_s = 1.5 * start_s / (1 - load) + row_s * (load + 2) / (2 * (1 - load**2))
    assert 0.8 * min(bound_s, other_s) < found.mean() < 1.05 * min(bound_s, other_s)


def test_it_takes_what_waits_and_pads_only_where_that_is_quicker() -> None:
    steep = BatchTimes({size: [0.01 * size] * 2 for size in (1, 2, 4, 8)})
    flat = BatchTimes({size: [0.01] * 2 for size in (1, 2, 4, 8)})
    assert (steep.take(5), flat.take(5)) == ((4, 4), (5, 8))
    assert steep.take(100) == (8, 8)
    together = latencies_s([0.0] * 5, flat, constant_s=1.0)
    assert together == pytest.approx([1.01] * 5)
    assert latencies_s([0.0] * 5, steep) == pytest.approx([0.04] * 4 + [0.05])


def test_times_are_drawn_from_what_was_measured() -> None:
    times = BatchTimes({1: [0.01, 0.02, 0.5]})
    found = latencies_s([60.0 * number for number in range(3000)], times).round(6)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0.01, 0.02, 0.5]
    assert counts.min() > 850
