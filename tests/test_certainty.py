"""How sure an accuracy is, in words that a person can act on."""

import pytest
import torch

from training.certainty import MARGIN, certainty, samples_enough
from training.report import Counts, Report, wilson_interval


def report(num_right: int, num_samples: int) -> Report:
    counts = Counts(2)
    right = torch.arange(num_samples) < num_right
    counts.update(
        torch.stack([right.float(), 1 - right.float()], 1), torch.zeros(num_samples).long()
    )
    return counts.report(("ant", "bee"))


def test_the_sentence_says_interval_and_what_would_be_enough() -> None:
    sentence = certainty(report(147, 153))
    assert sentence.startswith("96.1% of 153 samples right, between 91.7% and 98.2% with 95 %")
    assert "samples would be enough to know it within one point" in sentence
    assert certainty(report(9900, 10_000)).endswith("which is sure to a point")


@pytest.mark.parametrize("accuracy", [0.5, 0.9, 0.96, 1.0])
def test_so_many_are_enough_and_fewer_are_not(accuracy: float) -> None:
    enough = samples_enough(accuracy)
    low, high = wilson_interval(round(accuracy * enough), enough)
    assert (high - low) / 2 <= MARGIN
    fewer = int(enough * 0.9)
    low, high = wilson_interval(round(accuracy * fewer), fewer)
    assert (high - low) / 2 > MARGIN
