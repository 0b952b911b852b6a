"""Exponents: curves of known growth are found again, and what grows too fast is missed."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from benchmarks.growth.exponent import fit
from benchmarks.growth.figure import draw
from benchmarks.growth.row import Curve, Found, Row, found_in
from benchmarks.rounds import Round

SIZES = [1, 4, 16, 64, 256, 1024]


def measured(cost: Callable[[float], float], noise: float = 0.05) -> list[list[float]]:
    random = np.random.default_rng(0)
    return [[cost(size) * random.lognormal(0, noise) for size in SIZES] for _ in range(7)]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_power_is_found_again(power: float) -> None:
    found = fit(SIZES, measured(lambda size: 3 * size**power))
    assert found.whole.low <= power <= found.whole.high
    assert found.whole.high - found.whole.low < 0.1


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_what_a_cost_begins_with_hides_no_power(power: float) -> None:
    found = fit(SIZES, measured(lambda size: 100 + size**power))
    assert found.whole.median < power - 0.3
    assert found.marginal is not None
    assert found.marginal.median == pytest.approx(power, abs=0.15)
    assert found.unit == pytest.approx(1024 ** (power - 1), rel=0.2)


def test_a_constant_cost_has_no_marginal_exponent() -> None:
    found = fit(SIZES, measured(lambda _: 5.0, noise=0.02))
    assert found.marginal is None
    assert abs(found.whole.median) < 0.02


def found_of(cost: Callable[[float], float], target: float) -> Found:
    row = Row(
        "story", "things", SIZES, [Curve("cpu_us", "CPU us", target)], lambda _: nullcontext(dict)
    )
    rounds = [
        Round({str(size): {"cpu_us": one} for size, one in zip(SIZES, costs, strict=True)}, 0, 1)
        for costs in measured(cost)
    ]
    return Found(row, rounds)


def test_a_square_misses_a_straight_line() -> None:
    assert found_of(lambda size: 50 + size, 1.0).verdicts()[0].state != "missed"
    assert found_of(lambda size: 5 + 0.3 * size**0.9, 1.0).verdicts()[0].state == "met"
    assert found_of(lambda size: 5000 + size**2, 1.0).verdicts()[0].state == "missed"
    assert found_of(lambda size: size**0.2, 0.0).verdicts()[0].state == "missed"


def test_points_tell_the_same_again_and_can_be_drawn(tmp_path: Path) -> None:
    found = found_of(lambda size: 50 + size, 1.0)
    again = found_in(found.row, list(found.points()))
    assert again.verdicts() == found.verdicts()
    assert draw([found, again], tmp_path / "f.svg").read_text().count("story: CPU us") == 2
