"""The preprocessing that an import assumes: torchvision's published one, or what the options say.

Weights do not say how pictures were prepared for them, and a wrong guess costs accuracy in silence.
So what is assumed is described in words.
"""

from dataclasses import dataclass

from pydantic import ValidationError

from models.preprocessing import (
    Color,
    Crop,
    Decode,
    Interpolation,
    Normalize,
    Orient,
    Preprocessing,
    Resize,
    Scale,
    Step,
    TensorInput,
)

GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""For grey pictures: the means over ImageNet's channels."""


class PictureOptionsInvalid(ValueError):
    """The options of a preprocessing contradict each other or the network."""


@dataclass(frozen=True, slots=True)
class PictureOptions:
    """What a person says about the preparation of pictures; None where nothing is said.

    Attributes:
        resize: pixels of the shorter side.
        crop: pixels a side of the square taken from the centre.
        mean, std: one number, or one a channel, for pixels from 0 to 1.
        channels: 1 for grey pictures, 3 for colour.
        shape: of numbers that come in instead of pictures, without batch.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    shape: tuple[int, ...] | None = None


def assumed_preprocessing(
    options: PictureOptions,
    published: Preprocessing | None = None,
    channels: int | None = None,
    image_size: int | None = None,
) -> Preprocessing:
    """What `options` say, and for the rest what was published.

    Args:
        options: of a person.
        published: with the network, where it is torchvision's.
        channels: that the network takes, where its weights show it.
        image_size: the only one that the network takes, where it is a vision transformer.

    Raises:
        PictureOptionsInvalid: a number is out of range, missing, or contradicts the network.
    """
    try:
        if options.shape is not None:
            return Preprocessing(steps=(TensorInput(shape=options.shape),))
        fit = _fit_steps(options, published, image_size)
        num_channels = _channels(options, channels)
        color = Color(mode="L" if num_channels == 1 else "RGB")
        levels = _level_steps(options, published, num_channels)
        return Preprocessing(steps=(Decode(), Orient(), color, *fit, *levels))
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise PictureOptionsInvalid(f"the pictures cannot be prepared so: {reason}") from None


def describe(preprocessing: Preprocessing) -> str:
    """Such as `RGB, shorter side 256 (bilinear), centre 224x224, 0..255 to 0..1, mean …, std …`."""
    return ", ".join(filter(None, (_describe(step) for step in preprocessing.steps)))


def _fit_steps(
    options: PictureOptions, published: Preprocessing | None, image_size: int | None
) -> tuple[Resize, Crop]:
    """Resize and crop; where one is said, the other follows in the published proportion."""
    own_resize, own_crop, interpolation = _published_fit(published)
    if image_size is not None:
        own_resize, own_crop = round(own_resize * image_size / own_crop), image_size
    crop, resize = options.crop, options.resize
    if crop is None and resize is None and published is None:
        raise PictureOptionsInvalid(
            "nothing is published for this network: say --resize or --crop, and --mean and --std "
            "if it was trained with them; or --input with the shape of its numbers"
        )
    if crop is None:
        crop = own_crop if resize is None or published is not None else resize
        crop = min(crop, resize or crop)
    if resize is None:
        resize = round(crop * own_resize / own_crop)
    return Resize(size=resize, interpolation=interpolation), Crop(size=(crop, crop))


def _published_fit(published: Preprocessing | None) -> tuple[int, int, Interpolation]:
    """Shorter side, crop and interpolation."""
    steps = published.steps if published else ()
    resize = next((step for step in steps if isinstance(step, Resize)), None)
    crop = next((step for step in steps if isinstance(step, Crop)), None)
    if resize is None or crop is None or not isinstance(resize.size, int):
        return 1, 1, "bilinear"
    return resize.size, crop.size[0], resize.interpolation


def _channels(options: PictureOptions, channels: int | None) -> int:
    wanted = options.channels or channels or 3
    if channels is not None and wanted != channels:
        raise PictureOptionsInvalid(
            f"--channels {wanted}: the network's first convolution takes {channels}"
        )
    if wanted not in (1, 3):
        raise PictureOptionsInvalid(f"pictures have 1 channel or 3; the network takes {wanted}")
    return wanted


def _level_steps(
    options: PictureOptions, published: Preprocessing | None, num_channels: int
) -> tuple[Scale | Normalize, ...]:
    """From bytes to what the network was trained on."""
    if (options.mean is None) != (options.std is None) and published is None:
        raise PictureOptionsInvalid("--mean and --std belong together; say both")
    own = (
        next((s for s in published.steps if isinstance(s, Normalize)), None) if published else None
    )
    own_mean, own_std = (own.mean, own.std) if own else ((0.0,), (1.0,))
    if own and num_channels == 1:
        own_mean, own_std = GREY_MEAN, GREY_STD
    mean = _one_each(options.mean or own_mean, num_channels, "--mean")
    std = _one_each(options.std or own_std, num_channels, "--std")
    if own is None and options.mean is None:
        return (Scale(),)
    return Scale(), Normalize(mean=mean, std=std)


def _one_each(values: tuple[float, ...], num_channels: int, option: str) -> tuple[float, ...]:
    if len(values) not in (1, num_channels):
        raise PictureOptionsInvalid(f"{option} needs 1 number or {num_channels}, not {len(values)}")
    return values * num_channels if len(values) == 1 else values


def _describe(step: Step) -> str:
    match step:
        case Color():
            return "grey" if step.mode == "L" else "RGB"
        case Resize():
            size = step.size if isinstance(step.size, int) else "{}x{}".format(*step.size)
            side = "shorter side" if isinstance(step.size, int) else "resized to"
            return f"{side} {size} ({step.interpolation})"
        case Crop():
            return f"{step.size[0]}x{step.size[1]} from the centre"
        case Scale():
            return f"divided by {step.divisor:g}"
        case Normalize():
            mean, std = (" ".join(f"{value:g}" for value in each) for each in (step.mean, step.std))
            return f"mean {mean}, std {std}"
        case TensorInput():
            return f"numbers of shape {list(step.shape)}"
        case _:
            return ""
