"""Rounds: every cell once a round, compared within the round, disturbed rounds left out."""

import random

import pytest

from benchmarks.rounds import (
    Cell,
    Round,
    difference,
    estimate,
    measure_rounds,
    ratio,
    undisturbed,
)


def rounds_of(pairs: list[tuple[float, float]]) -> list[Round]:
    return [
        Round({"ours": {"rate": ours}, "limit": {"rate": limit}}, 0.0, 1.0) for ours, limit in pairs
    ]


def test_each_round_visits_every_cell_once_and_in_another_order() -> None:
    visited: list[str] = []

    def cell(name: str) -> Cell:
        return Cell(name, lambda: visited.append(name) or {"rate_per_s": 1.0})

    rounds = measure_rounds([cell(name) for name in "abcdef"], 6)
    visits = ["".join(visited[start : start + 6]) for start in range(0, 36, 6)]
    assert {"".join(sorted(visit)) for visit in visits} == {"abcdef"}
    assert len(set(visits)) > 1
    assert set(rounds[0].samples) == set("abcdef")


def test_a_ratio_does_not_see_what_slows_a_whole_round() -> None:
    rounds = rounds_of([(speed * 30, speed * 60) for speed in (1.0, 0.2, 3.0, 0.7, 1.1, 0.5, 2.0)])
    found = estimate(rounds, ratio("ours", "limit", "rate"))
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.num_rounds == 7


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    noise = random.Random(1)
    held = 0
    for _ in range(100):
        found = estimate(
            rounds_of([(noise.gauss(1.0, 0.1), 0.0) for _ in range(9)]),
            difference("ours", "limit", "rate"),
        )
        held += found.low <= 1.0 <= found.high
    assert held >= 85


def test_disturbed_rounds_are_left_out() -> None:
    quiet = [Round({}, 0.0, 10.0 + number / 10) for number in range(5)]
    stolen, slow = Round({}, 0.05, 10.0), Round({}, 0.0, 13.0)
    assert undisturbed([stolen, *quiet, slow]) == quiet


def test_where_too_few_would_be_left_all_are_kept() -> None:
    rounds = [Round({}, 0.5, 10.0) for _ in range(7)]
    assert undisturbed(rounds) == rounds


def test_an_estimate_reads_as_a_line() -> None:
    found = estimate(rounds_of([(1, 2)] * 3), ratio("ours", "limit", "rate"))
    assert str(found) == "0.5 (0.5 to 0.5)"
    assert found.median == pytest.approx(0.5)
