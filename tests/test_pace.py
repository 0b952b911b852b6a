"""The pace of a machine: told in spans, and gone through again and again."""

import numpy as np
import pytest

from benchmarks.pace import STEP_S, Pace, Span, heard, spans_of, told


def test_what_is_usual_is_one_span_and_a_pause_another() -> None:
    usual = [0.001] * 1000
    spans = spans_of([*usual, 0.02, *usual])
    assert [round(span.slowness, 1) for span in spans] == [1.0, 20.0, 1.0]
    assert sum(span.seconds for span in spans) == pytest.approx(2.02, abs=STEP_S)
    assert heard({"rate_per_s": 1.0, **told(spans)}) == [
        Span(round(span.seconds, 6), round(span.slowness, 6)) for span in spans
    ]


def test_a_slow_time_lasts() -> None:
    spans = spans_of([0.0001] * 5000 + [0.0002] * 1000 + [0.0001] * 5000)
    slow = [span for span in spans if span.slowness > 1.5]
    assert sum(span.seconds for span in slow) == pytest.approx(0.2, abs=2 * STEP_S)


def test_one_long_piece_is_a_span_too() -> None:
    assert spans_of([0.0001]) == [Span(0.0001, 1.0)]
    assert spans_of([0.8, 0.8, 1.6]) == [Span(1.6, 1.0), Span(1.6, 2.0)]


@pytest.mark.parametrize("seed", range(5))
def test_work_ends_where_small_steps_say(seed: int) -> None:
    random = np.random.default_rng(seed)
    spans = [Span(*pair) for pair in random.uniform(0.2, 3.0, (6, 2))]
    machine = Pace(spans)
    for begin_s, work_s in random.uniform(0.0, 40.0, (20, 2)):
        step_s, now_s, left_s = 0.001, begin_s, work_s
        edges = np.cumsum([span.seconds for span in spans])
        while left_s > 0:
            rest_s = (now_s + step_s / 2) % machine.length_s
            left_s -= step_s / spans[int(np.searchsorted(edges, rest_s))].slowness
            now_s += step_s
        assert machine.after(begin_s, work_s) == pytest.approx(now_s, abs=0.02)
