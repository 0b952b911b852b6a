"""The ideal that the tails are held against: what it is charged with, and what it is not."""

import pytest

from benchmarks.ideal_batcher import STEADY, BatchTimes
from benchmarks.pace import Pace, Span
from benchmarks.poisson import ideal_p99_ms, whole
from benchmarks.stage import Timing, connections_named, stalls_named, stalls_of

TIMING = Timing(warm_up_s=1.0, closed_s=1.0, open_s=4.0)
SAMPLE = {"asked_per_s": 500.0, "seed": 3.0}
QUICK = BatchTimes(dict.fromkeys((1, 2, 4, 8, 16, 32), 0.0001)), 0.0


def test_http_in_the_batch_lies_on_a_line_and_is_not_padded() -> None:
    samples = {connections_named(1): {"p50_ms": 2.0}, connections_named(16): {"p50_ms": 17.0}}
    times, constant_s = whole(16)(samples)
    assert times.sizes == list(range(1, 33))
    assert [times.usual_s[size] for size in (1, 2, 3, 16, 32)] == pytest.approx(
        [0.002, 0.003, 0.004, 0.017, 0.033]
    )
    assert (times.take(3), times.take(40), constant_s) == ((3, 3), (32, 32), 0.0)


def test_what_left_late_is_late_for_the_ideal_too() -> None:
    undisturbed_ms = ideal_p99_ms(SAMPLE, QUICK, STEADY, TIMING)
    assert undisturbed_ms < 0.3
    stalled = {**SAMPLE, **stalls_named([(2.0, 2.2)])}
    assert stalls_of(stalled) == [(2.0, 2.2)]
    assert 100 < ideal_p99_ms(stalled, QUICK, STEADY, TIMING) < 201
    before = {**SAMPLE, **stalls_named([(0.2, 0.4)])}
    assert ideal_p99_ms(before, QUICK, STEADY, TIMING) == undisturbed_ms, "while it warmed up"


def test_a_machine_that_stands_still_is_no_fault_of_the_server() -> None:
    machine = Pace([Span(0.5, 1.0), Span(0.02, 1000.0)])
    assert 5 < ideal_p99_ms(SAMPLE, QUICK, machine, TIMING) < 21
