"""The preprocessing that an import assumes, and how it is said."""

import pytest

from models.backbones import picture_preprocessing
from training.assumed import (
    PictureOptions,
    PictureOptionsInvalid,
    assumed_preprocessing,
    describe,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PUBLISHED = picture_preprocessing(256, 224, *IMAGENET, interpolation="bicubic")


def test_nothing_said_is_what_was_published():
    assert assumed_preprocessing(PictureOptions(), PUBLISHED, channels=3) == PUBLISHED


def test_it_is_said_in_words():
    assert describe(PUBLISHED) == (
        "RGB, shorter side 256 (bicubic), 224x224 from the centre, divided by 255, "
        "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (PictureOptions(crop=112), "shorter side 128 (bicubic), 112x112"),
        (PictureOptions(resize=232), "shorter side 232 (bicubic), 224x224"),
        (PictureOptions(resize=64), "shorter side 64 (bicubic), 64x64"),
        (PictureOptions(resize=300, crop=288), "shorter side 300 (bicubic), 288x288"),
        (PictureOptions(mean=(0.5,)), "mean 0.5 0.5 0.5, std 0.229 0.224 0.225"),
        (PictureOptions(std=(1.0, 2.0, 3.0)), "std 1 2 3"),
    ],
)
def test_what_is_said_overrules(options, said):
    assert said in describe(assumed_preprocessing(options, PUBLISHED, channels=3))


def test_grey_networks_get_grey_pictures():
    steps = assumed_preprocessing(PictureOptions(), PUBLISHED, channels=1)
    assert steps.raw_shape == (1, 224, 224)
    assert "grey" in describe(steps)
    assert "mean 0.449, std 0.226" in describe(steps)


def test_a_vision_transformer_takes_its_own_size():
    steps = assumed_preprocessing(PictureOptions(), PUBLISHED, channels=3, image_size=448)
    assert "shorter side 512 (bicubic), 448x448" in describe(steps)


def test_a_network_of_ones_own():
    steps = assumed_preprocessing(PictureOptions(resize=28, channels=1))
    assert (
        describe(steps) == "grey, shorter side 28 (bilinear), 28x28 from the centre, divided by 255"
    )
    steps = assumed_preprocessing(PictureOptions(crop=32, mean=(0.5,), std=(0.25,)))
    assert "mean 0.5 0.5 0.5, std 0.25 0.25 0.25" in describe(steps)
    steps = assumed_preprocessing(PictureOptions(shape=(1, 28, 28)))
    assert steps.input_shape == (1, 28, 28)
    assert not steps.accepts_pictures


@pytest.mark.parametrize(
    ("options", "published", "channels", "sentence"),
    [
        (PictureOptions(channels=1), PUBLISHED, 3, "first convolution takes 3"),
        (PictureOptions(), PUBLISHED, 4, "1 channel or 3; the network takes 4"),
        (PictureOptions(mean=(0.1, 0.2)), PUBLISHED, 3, "--mean needs 1 number or 3, not 2"),
        (PictureOptions(std=(0.0,)), PUBLISHED, 3, "greater than 0"),
        (PictureOptions(crop=100_000), PUBLISHED, 3, "less than or equal to 8192"),
        (PictureOptions(), None, None, "--resize or --crop"),
        (PictureOptions(crop=8, mean=(0.1,)), None, None, "--mean and --std belong together"),
        (PictureOptions(shape=(0,)), None, None, "greater than or equal to 1"),
    ],
)
def test_contradictions_are_refused(options, published, channels, sentence):
    with pytest.raises(PictureOptionsInvalid, match=sentence):
        assumed_preprocessing(options, published, channels)
