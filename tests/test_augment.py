"""Augmentation: the same picture is changed alike in any company, and within its bounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.augment import PRESETS, augmentation


def pictures(num: int, channels: int = 3, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num)
    shape = (num, channels, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", ["shift", "digits", "natural"])
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), start=st.integers(0, 15))
@settings(max_examples=20, deadline=None)
def test_a_picture_changes_alike_in_any_batch(name: str, seed: int, epoch: int, start: int) -> None:
    augment, batch, samples = augmentation(name, seed), pictures(16), torch.arange(100, 116)
    assert augment is not None
    whole = augment(batch, epoch, samples)
    part = augment(batch[start:].flip(0), epoch, samples[start:].flip(0)).flip(0)
    assert torch.equal(whole[start:], part)


@pytest.mark.parametrize("name", ["shift", "digits", "natural"])
def test_epochs_and_samples_draw_differently(name: str) -> None:
    augment, batch = augmentation(name, seed=1), pictures(1).expand(8, -1, -1, -1).contiguous()
    assert augment is not None
    first, second = (augment(batch, epoch, torch.arange(8)) for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert len({picture.numpy().tobytes() for picture in first}) > 4


def test_none_is_no_function_at_all() -> None:
    assert augmentation("none", seed=0) is None


def test_shift_moves_by_whole_pixels_up_to_its_bound() -> None:
    augment, batch = augmentation("shift", seed=3), torch.zeros(200, 1, 25, 25, dtype=torch.uint8)
    assert augment is not None
    batch[:, :, 12, 12] = 255
    moved = augment(batch, 0, torch.arange(200)).flatten(1).float().argmax(1)
    rows, columns = moved // 25 - 12, moved % 25 - 12
    assert set(rows.tolist()) == set(columns.tolist()) == {-2, -1, 0, 1, 2}


def test_digits_are_never_mirrored_and_natural_pictures_are() -> None:
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(64, 1, 24, 24).contiguous()
    for name, mirrored in (("digits", 0), ("natural", 32)):
        augment = augmentation(name, seed=0)
        assert augment is not None
        out = augment(ramp, 0, torch.arange(64)).float()
        num_falling = int((out[..., 0].mean((1, 2)) > out[..., -1].mean((1, 2))).sum())
        assert abs(num_falling - mirrored) <= (12 if mirrored else 0)


@pytest.mark.parametrize("name", PRESETS)
def test_an_even_white_picture_keeps_its_border(name: str) -> None:
    augment = augmentation(name, seed=5)
    white = torch.full((32, 1, 8, 8), 255, dtype=torch.uint8)
    out = augment(white, 0, torch.arange(32)) if augment else white
    assert out.dtype == torch.uint8
    assert out.min() >= (150 if name == "natural" else 255)
