"""Mixup and cutmix: shares that add up, and draws that belong to the step."""

import pytest
import torch

from training.mixing import mixed

X = torch.stack([torch.full((3, 8, 8), float(index)) for index in range(4)])
TARGETS = torch.arange(4)


def test_cutmix_says_how_much_of_each_picture_is_left() -> None:
    for step in range(30):
        x, others, share = mixed(X, TARGETS, 0.0, 1.0, seed=1, step=step)
        kept = (x == X).float().mean((1, 2, 3))
        assert kept.tolist() == pytest.approx([share] * 4)
        assert others.tolist() == [3, 0, 1, 2]


def test_mixup_mixes_by_the_share_it_says() -> None:
    x, others, share = mixed(X, TARGETS, 0.4, 0.0, seed=1, step=3)
    assert torch.allclose(x, share * X + (1 - share) * X[others])


def test_draws_belong_to_seed_and_step() -> None:
    shares = [mixed(X, TARGETS, 0.4, 0.0, seed=1, step=step)[2] for step in (1, 2, 1)]
    assert shares[0] == shares[2] != shares[1]


def test_numbers_are_never_cut() -> None:
    x, _, share = mixed(torch.ones(4, 5), TARGETS, 0.0, 1.0, seed=1, step=1)
    assert torch.equal(x, torch.ones(4, 5))
    assert share == 1.0
