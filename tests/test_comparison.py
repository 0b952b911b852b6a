"""Two versions on the same samples: scipy's exact binomial test is the oracle."""

import math

import pytest
import torch
from scipy.stats import binomtest, chi2, norm

from training.comparison import MAX_LISTED, PairedCounts, mcnemar, samples_needed

LABELS = ("a", "b", "c")


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 0), (5, 5), (9, 1), (2, 11), (60, 40), (4000, 4200)]
)
def test_scipy_finds_the_same_p_value(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, abs=1e-9)


def test_beyond_ten_thousand_the_corrected_statistic_is_used() -> None:
    expected = chi2.sf((abs(6200 - 6000) - 1) ** 2 / 12_200, 1)
    assert mcnemar(6200, 6000) == pytest.approx(expected, rel=1e-9)


def counted(right: list[bool], other_right: list[bool]):
    targets = torch.zeros(len(right), dtype=torch.int64)
    pair = PairedCounts(LABELS, LABELS)
    answers = [(~torch.tensor(one)).long() for one in (right, other_right)]
    indices = torch.arange(len(right))
    for rows in indices.split(7):
        pair.update(answers[0][rows], targets[rows], answers[1][rows], targets[rows], rows)
    return pair.comparison()


def test_gained_and_lost_are_named_with_both_answers() -> None:
    found = counted([True, True, False, False], [True, False, True, False])
    assert (found.num_both_right, found.num_gained, found.num_lost, found.num_both_wrong) == (
        *(1, 1, 1, 1),
    )
    [gained], [lost] = found.gained, found.lost
    assert (gained.index, gained.target, gained.answer, gained.other_answer) == (1, "a", "a", "b")
    assert (lost.index, lost.answer, lost.other_answer) == (2, "b", "a")


def test_lists_are_bounded_and_counts_are_not() -> None:
    found = counted([True] * 200, [False] * 200)
    assert (found.num_gained, len(found.gained)) == (200, MAX_LISTED)
    assert found.num_needed is None
    assert "chance does not explain it" in found.sentence


def test_too_little_evidence_is_said_with_the_number_that_is_enough() -> None:
    found = counted([True] * 97 + [False] * 3, [True] * 95 + [False] * 5)
    assert found.p_value == 0.5
    assert found.num_needed == samples_needed(2, 0, 100)
    assert f"about {found.num_needed} samples would be enough" in found.sentence


def test_the_number_that_is_enough_gives_the_promised_power() -> None:
    gained, lost, num = 30, 20, 1000
    needed = samples_needed(gained, lost, num)
    discordant, difference = 0.05, 0.01
    z = (difference * math.sqrt(needed) - 1.96 * math.sqrt(discordant)) / math.sqrt(
        discordant - difference**2
    )
    assert norm.cdf(z) == pytest.approx(0.8, abs=0.005)


def test_two_that_answer_alike_need_enough_for_one_point() -> None:
    found = counted([True] * 50, [True] * 50)
    assert found.p_value == 1
    assert found.num_needed == samples_needed(0, 0, 50) == 783
    assert "a difference of one point" in found.sentence


def test_no_common_sample_is_no_comparison() -> None:
    assert PairedCounts(LABELS, LABELS).comparison() is None
