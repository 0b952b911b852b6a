"""The ideal batcher against queues whose waits are known from theory."""

import numpy as np
import pytest

from benchmarks.ideal_batcher import BatchTimes, latencies_s
from benchmarks.pace import Pace, Span


def poisson(rate_per_s: float, count: int) -> list[float]:
    return np.random.default_rng(1).exponential(1 / rate_per_s, count).cumsum().tolist()


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    service_s = 0.01
    found = latencies_s(poisson(load / service_s, 200_000), BatchTimes({1: service_s}))
    expected_s = service_s + load * service_s / (2 * (1 - load))
    assert found.mean() == pytest.approx(expected_s, rel=0.05)


def test_batches_wait_no_longer_than_inoue_bounds() -> None:
    start_s, row_s, load = 0.002, 0.00005, 0.5
    times = BatchTimes({size: start_s + row_s * size for size in range(1, 513)})
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
    steep = BatchTimes({size: 0.01 * size for size in (1, 2, 4, 8)})
    flat = BatchTimes(dict.fromkeys((1, 2, 4, 8), 0.01))
    assert (steep.take(5), flat.take(5)) == ((4, 4), (5, 8))
    assert steep.take(100) == (8, 8)
    together = latencies_s([0.0] * 5, flat, constant_s=1.0)
    assert together == pytest.approx([1.01] * 5)
    assert latencies_s([0.0] * 5, steep) == pytest.approx([0.04] * 4 + [0.05])


def test_a_slow_machine_makes_those_wait_who_come_while_it_is_slow() -> None:
    machine = Pace([Span(1.0, 1.0), Span(0.5, 4.0)])
    moments = [0.0, 1.1, 1.45, 2.0]
    found = latencies_s(moments, BatchTimes({1: 0.05}), machine)
    # In the slow span a batch takes four times as long, and the third ends after it.
    assert found == pytest.approx([0.05, 0.2, 0.0875, 0.05])
    assert latencies_s([0.0], BatchTimes({1: 0.05}), machine, at_s=1.1) == pytest.approx([0.2])
