"""Preprocessing: the same picture is the same tensor, whichever way it comes, bit for bit."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from models.picture import PictureLimits, PictureTooLarge
from models.preprocessing import Preprocessing

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET = [
    {"step": "decode"},
    {"step": "orient"},
    {"step": "color", "mode": "RGB"},
    {"step": "resize", "size": 256},
    {"step": "crop", "size": [224, 224]},
    {"step": "scale"},
    {"step": "normalize", "mean": MEAN, "std": STD},
]
GREY = [{"step": "decode"}, {"step": "color", "mode": "L"}]


def photographs(real_data: Path, number: int) -> list[Path]:
    return sorted((real_data / "hymenoptera" / "val" / "ants").glob("*.jpg"))[:number]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def preprocessing(*steps: dict[str, Any]) -> Preprocessing:
    return Preprocessing(steps=steps)


def test_every_step_is_what_torchvision_does_to_real_photographs(real_data: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    theirs = Compose([Resize(256), CenterCrop(224), ToTensor(), Normalize(MEAN, STD)])
    ours = preprocessing(*IMAGENET)
    for path in photographs(real_data, 12):
        with Image.open(path) as image:
            wanted = theirs(image.convert("RGB"))
        got = ours.finish(ours.picture(path.read_bytes()).unsqueeze(0))[0]
        assert torch.equal(got, wanted), path.name


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "bicubic", "lanczos"])
def test_every_interpolation_is_torchvisions(name: str) -> None:
    from torchvision.transforms import InterpolationMode, Resize

    wanted = Resize((20, 31), InterpolationMode(name))(noise(50, 40))
    steps = [IMAGENET[0], IMAGENET[2]]
    ours = preprocessing(*steps, {"step": "resize", "size": [20, 31], "interpolation": name})
    assert np.array_equal(ours.picture(noise(50, 40)).permute(1, 2, 0), wanted)


@pytest.mark.parametrize(
    "size", [(30, 30), (31, 30), (37, 61), (61, 37), (25, 25), (24, 90), (1, 9)]
)
def test_resize_and_crop_round_as_torchvision_does(size: tuple[int, int]) -> None:
    """Also where the picture is smaller than the crop, by an even and by an odd number."""
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    image = noise(*size)
    for side, crop in [(25, [24, 24]), (25, [32, 29]), (7, [14, 10])]:
        wanted = Compose([Resize(side), CenterCrop(crop), PILToTensor()])(image)
        resize, cropped = {"step": "resize", "size": side}, {"step": "crop", "size": crop}
        ours = preprocessing(IMAGENET[0], IMAGENET[2], resize, cropped)
        assert torch.equal(ours.picture(image), wanted), (side, crop)


def test_a_batch_and_its_pictures_one_by_one_give_the_same_bits(real_data: Path) -> None:
    ours = preprocessing(*IMAGENET, {"step": "flatten"})
    pictures = [ours.picture(path.read_bytes()) for path in photographs(real_data, 5)]
    together = ours.finish(torch.stack(pictures))
    alone = torch.cat([ours.finish(picture.unsqueeze(0)) for picture in pictures])
    assert torch.equal(together, alone)


def test_bytes_and_an_opened_image_give_the_same_bits(real_data: Path) -> None:
    ours = preprocessing(*IMAGENET)
    turned = sorted((real_data / "images").glob("*rientation*"))
    assert len(turned) >= 8
    for path in [*photographs(real_data, 5), *turned]:
        with Image.open(path) as image:
            if image.format in ("JPEG", "PNG", "WEBP"):
                assert torch.equal(ours.picture(path.read_bytes()), ours.picture(image)), path


def test_neither_the_image_nor_the_batch_is_changed() -> None:
    ours, image = preprocessing(*IMAGENET), noise(300, 280)
    before = image.tobytes()
    batch = ours.picture(image).unsqueeze(0)
    kept = batch.clone()
    floats = preprocessing({"step": "tensor", "shape": [2]}, {"step": "scale", "divisor": 2})
    numbers = torch.ones(1, 2)
    assert torch.equal(ours.finish(batch), ours.finish(batch))
    assert torch.equal(floats.finish(numbers), torch.full((1, 2), 0.5))
    assert image.tobytes() == before
    assert torch.equal(batch, kept)
    assert torch.equal(numbers, torch.ones(1, 2))


def test_shapes_are_known_beforehand() -> None:
    ours = preprocessing(*IMAGENET)
    assert (ours.accepts_pictures, ours.raw_shape) == (True, (3, 224, 224))
    assert ours.input_shape == (3, 224, 224)
    flat = preprocessing(*GREY, {"step": "resize", "size": [8, 6]}, {"step": "flatten"})
    assert (flat.raw_shape, flat.input_shape) == ((1, 8, 6), (48,))
    numbers = preprocessing({"step": "tensor", "shape": [2, 3]})
    assert (numbers.accepts_pictures, numbers.input_shape) == (False, (2, 3))
    with pytest.raises(TypeError, match="takes tensors"):
        numbers.picture(noise(4, 4))


def test_numbers_of_any_type_become_floats_per_channel() -> None:
    normalize = {"step": "normalize", "mean": [1.0, 2.0], "std": [1.0, 0.5]}
    ours = preprocessing({"step": "tensor", "shape": [2, 2]}, normalize)
    for dtype in (torch.float64, torch.int64, torch.uint8, torch.float16):
        out = ours.finish(torch.tensor([[[1, 2], [3, 4]]], dtype=dtype))
        assert out.dtype == torch.float32
        assert out.tolist() == [[[0, 1], [2, 4]]]


def test_a_thin_picture_cannot_grow_beyond_the_limit() -> None:
    ours = preprocessing(*IMAGENET)
    with pytest.raises(PictureTooLarge, match="8000x1 pixels would become 2048000x256"):
        ours.picture(noise(8000, 1))
    with pytest.raises(PictureTooLarge, match="the limit is 1000 pixels"):
        ours.picture(noise(30, 30), PictureLimits(max_pixels=1000))


DECODE, ORIENT, RGB, RESIZE, CROP, SCALE, NORMALIZE = IMAGENET
TENSOR, FLATTEN = {"step": "tensor", "shape": [3, 4, 4]}, {"step": "flatten"}


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([], "at least 1 item"),
        ([SCALE], "the first step must be decode or tensor"),
        (
            [DECODE, TENSOR],
            "the first step must be|picture needs|each at most once|decode and tensor",
        ),
        ([TENSOR, RGB], "picture steps need decode"),
        ([TENSOR, SCALE, SCALE], "each at most once"),
        ([DECODE, CROP, RGB], "must follow the order decode, tensor, orient"),
        ([DECODE, ORIENT, CROP], "a picture needs a color step"),
        ([DECODE, RGB], "needs a crop step or a resize step to"),
        ([DECODE, RGB, RESIZE], "needs a crop step or a resize step to"),
        ([DECODE, {"step": "color", "mode": "L"}, CROP, NORMALIZE], "normalize needs 1 means"),
        ([TENSOR, {"step": "normalize", "mean": [0], "std": [1]}], "normalize needs 3 means"),
        ([DECODE, {"step": "color", "mode": "CMYK"}], "'L' or 'RGB'"),
        ([DECODE, RGB, {"step": "resize", "size": 0}], "greater than or equal to 1"),
        ([DECODE, RGB, {"step": "resize", "size": 10**6}], "less than or equal to 8192"),
        ([DECODE, RGB, {"step": "resize", "size": 8, "interpolation": "magic"}], "'nearest'"),
        ([DECODE, RGB, {"step": "crop", "size": 8}], "valid tuple"),
        ([DECODE, RGB, {"step": "crop", "size": [8192, 8192]}], "numbers"),
        ([{"step": "tensor", "shape": []}], "at least 1 item"),
        ([{"step": "tensor", "shape": [0]}], "greater than or equal to 1"),
        ([{"step": "tensor", "shape": [10**9] * 8}], "has over 33554432 numbers"),
        ([TENSOR, {"step": "scale", "divisor": 0}], "greater than 0"),
        ([TENSOR, {"step": "scale", "divisor": float("inf")}], "finite number"),
        ([TENSOR, {"step": "normalize", "mean": [0] * 3, "std": [1, 0, 1]}], "greater than 0"),
        ([TENSOR, {"step": "normalize", "mean": [float("nan")] * 3, "std": [1] * 3}], "finite"),
        ([TENSOR, {"step": "whiten"}], "'whiten'"),
        ([TENSOR, {"step": "flatten", "order": "F"}], "Extra inputs"),
    ],
)
def test_a_list_of_steps_that_cannot_work_is_refused(
    steps: list[dict[str, Any]], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        preprocessing(*steps)


def test_survives_being_written_down() -> None:
    ours = preprocessing(*IMAGENET, FLATTEN)
    text = ours.model_dump_json()
    assert Preprocessing.model_validate_json(text) == ours
    assert [step["step"] for step in json.loads(text)["steps"]][:2] == ["decode", "orient"]


sides = st.integers(1, 24)
picture_steps = st.fixed_dictionaries(
    {},
    optional={
        "orient": st.just({}),
        "color": st.fixed_dictionaries({"mode": st.sampled_from(["L", "RGB"])}),
        "resize": st.fixed_dictionaries(
            {"size": sides | st.tuples(sides, sides)},
            optional={"interpolation": st.sampled_from(["nearest", "bilinear", "lanczos"])},
        ),
        "crop": st.fixed_dictionaries({"size": st.tuples(sides, sides)}),
        "scale": st.fixed_dictionaries({}, optional={"divisor": st.floats(0.5, 300)}),
        "normalize": st.integers(1, 3).flatmap(
            lambda n: st.just({"mean": [0.5] * n, "std": [0.25] * n})
        ),
        "flatten": st.just({}),
    },
)


@given(picture_steps, sides, sides, st.sampled_from(["L", "RGB"]))
@settings(max_examples=200, deadline=None)
def test_whatever_is_accepted_ends_in_the_shape_that_it_says(
    chosen: dict[str, dict[str, Any]], width: int, height: int, mode: str
) -> None:
    steps = [{"step": name, **options} for name, options in chosen.items()]
    try:
        ours = preprocessing(DECODE, *steps)
    except ValidationError:
        return
    raw = ours.picture(noise(width, height, mode))
    assert (raw.shape, raw.dtype) == (ours.raw_shape, torch.uint8)
    assert raw.is_contiguous()
    out: Tensor = ours.finish(raw.unsqueeze(0))
    assert (out.shape, out.dtype) == ((1, *ours.input_shape), torch.float32)
    assert Preprocessing.model_validate_json(ours.model_dump_json()) == ours


def test_picture_and_its_png_give_the_same_bits() -> None:
    ours = preprocessing(*GREY, {"step": "crop", "size": [9, 7]})
    image, file = noise(12, 11, "L"), io.BytesIO()
    image.save(file, "PNG")
    assert torch.equal(ours.picture(file.getvalue()), ours.picture(image))
