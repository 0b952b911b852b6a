"""Preprocessing as data: a short list of named steps that travels with the weights.

The first step says what comes in: `decode` (an encoded picture) or `tensor` (numbers of a given
shape). The picture steps run in Pillow and end in uint8; the tensor steps run in torch on whole
batches and end in float32. Training, evaluation and serving all call the two functions here, so
the same picture is the same tensor everywhere.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, Self, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from models.picture import (
    EncodedPicture,
    PictureLimits,
    PictureTooLarge,
    open_picture,
    oriented,
    to_mode,
)
from models.resizing import Threads, by_shorter_side, cropped, resized

Side: TypeAlias = Annotated[int, Field(ge=1, le=8192)]
Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
S = TypeVar("S", bound=BaseModel)
Interpolation: TypeAlias = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Decode(_Step):
    """Bytes of a JPEG, PNG or WebP become a picture."""

    step: Literal["decode"] = "decode"


class TensorInput(_Step):
    """Numbers of this shape come in, without the batch dimension."""

    step: Literal["tensor"] = "tensor"
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, max_length=8)


class Orient(_Step):
    """Turned upright as its EXIF orientation says."""

    step: Literal["orient"] = "orient"


class Color(_Step):
    """To one grey channel (`L`) or three colours (`RGB`)."""

    step: Literal["color"] = "color"
    mode: Literal["L", "RGB"]


class Resize(_Step):
    """Shorter side to `size`, or to exactly `[height, width]`."""

    step: Literal["resize"] = "resize"
    size: Side | tuple[Side, Side]
    interpolation: Interpolation = "bilinear"


class Crop(_Step):
    """`[height, width]` from the centre; black is added where the picture is smaller."""

    step: Literal["crop"] = "crop"
    size: tuple[Side, Side]


class Scale(_Step):
    """Divided by `divisor`: 255 brings bytes to 0..1."""

    step: Literal["scale"] = "scale"
    divisor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 255.0


class Normalize(_Step):
    """Minus `mean`, divided by `std`: one number each per channel (the first dimension)."""

    step: Literal["normalize"] = "normalize"
    mean: tuple[Finite, ...] = Field(min_length=1)
    std: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(min_length=1)


class Flatten(_Step):
    """To one dimension."""

    step: Literal["flatten"] = "flatten"


Step: TypeAlias = Annotated[
    Decode | TensorInput | Orient | Color | Resize | Crop | Scale | Normalize | Flatten,
    Field(discriminator="step"),
]

MAX_ELEMENTS = 1 << 25
"""Numbers in one input: 128 MiB in fp32, a picture of 3344 x 3344 pixels in colour."""

_ORDER = ("decode", "tensor", "orient", "color", "resize", "crop", "scale", "normalize", "flatten")
_FIRST = frozenset({"decode", "tensor"})
_PICTURE_STEPS = frozenset({"orient", "color", "resize", "crop"})


class Preprocessing(BaseModel):
    """The steps in order. Each occurs at most once and the order is always the one above."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: tuple[Step, ...] = Field(min_length=1, max_length=len(_ORDER))

    @model_validator(mode="after")
    def _check(self) -> Self:
        positions = [_ORDER.index(step.step) for step in self.steps]
        if positions != sorted(set(positions)):
            raise ValueError(f"steps must follow the order {', '.join(_ORDER)}, each at most once")
        first = self.steps[0].step
        if first not in _FIRST or any(step.step in _FIRST for step in self.steps[1:]):
            raise ValueError("the first step must be decode or tensor, and no other may be")
        if first == "tensor" and any(step.step in _PICTURE_STEPS for step in self.steps):
            raise ValueError("picture steps need decode as the first step")
        if first == "decode":
            self._check_picture()
        self._check_normalize()
        if math.prod(self.raw_shape) > MAX_ELEMENTS:
            raise ValueError(f"an input of {list(self.raw_shape)} has over {MAX_ELEMENTS} numbers")
        return self

    def _check_picture(self) -> None:
        if self.find(Color) is None:
            raise ValueError("a picture needs a color step, L or RGB")
        resize = self.find(Resize)
        if self.find(Crop) is None and (resize is None or isinstance(resize.size, int)):
            raise ValueError("a picture needs a crop step or a resize step to [height, width]")

    def _check_normalize(self) -> None:
        normalize = self.find(Normalize)
        channels = self.raw_shape[0]
        if normalize and {len(normalize.mean), len(normalize.std)} != {channels}:
            raise ValueError(f"normalize needs {channels} means and deviations, one a channel")

    def find(self, kind: type[S]) -> S | None:
        """The step of that kind."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    @property
    def accepts_pictures(self) -> bool:
        """Whether encoded pictures come in."""
        return self.steps[0].step == "decode"

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """Shape without batch where `finish` begins: `[C, H, W]` uint8 for pictures."""
        first = self.steps[0]
        if isinstance(first, TensorInput):
            return first.shape
        color, crop, resize = self.find(Color), self.find(Crop), self.find(Resize)
        height_width = crop.size if crop else resize.size if resize else (1, 1)
        channels = 3 if color and color.mode == "RGB" else 1
        return (channels, *height_width) if isinstance(height_width, tuple) else (channels, 1, 1)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape without batch of the float32 tensor that the network takes."""
        shape = self.raw_shape
        return (math.prod(shape),) if self.find(Flatten) else shape

    def picture(
        self,
        source: bytes | EncodedPicture | Image.Image,
        limits: PictureLimits | None = None,
        threads: Threads | None = None,
    ) -> Tensor:
        """One picture through the Pillow steps.

        Args:
            source: the bytes of a JPEG, PNG or WebP, with or without their header read before; or
                a Pillow image (used by data sets that hold pixels; it is not changed).
            limits: bounds on bytes, pixels and sides.
            threads: threads that share in the work on a large one; the bits are the same.

        Returns:
            uint8 `[C, H, W]`, the shape `raw_shape`.

        Raises:
            PictureError: a subclass names the limit or the fault.
            TypeError: this preprocessing takes tensors, not pictures.
        """
        if not self.accepts_pictures:
            raise TypeError("this preprocessing takes tensors, not pictures")
        limits = limits or PictureLimits()
        image = source if isinstance(source, Image.Image) else open_picture(source, limits)
        for step in self.steps:
            image = self._apply(step, image, limits, threads)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()

    def _apply(
        self, step: Step, image: Image.Image, limits: PictureLimits, threads: Threads | None
    ) -> Image.Image:
        match step:
            case Orient():
                return oriented(image)
            case Color():
                return to_mode(image, step.mode)
            case Resize():
                size, crop = resized_size(image.size, step, limits), self.find(Crop)
                kept = _width_height(crop) if crop else None
                resampling = Image.Resampling[step.interpolation.upper()]
                return resized(image, size, resampling, kept=kept, threads=threads)
            case Crop():
                return cropped(image, _width_height(step))
            case _:
                return image

    def finish(self, batch: Tensor) -> Tensor:
        """A batch through the tensor steps, on the device where it is.

        Args:
            batch: `[N, *raw_shape]`, uint8 for pictures or any number type.

        Returns:
            float32 `[N, *input_shape]`. Every element depends on its own pixel only, so a batch
            and its pictures one by one give the same bits.
        """
        return self.finisher(batch.device)(batch)

    def finisher(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """`finish` for batches on `device`, with its numbers brought there once and for all."""
        normalize = self.find(Normalize)
        numbers = _per_channel(normalize, len(self.raw_shape) + 1, device) if normalize else None
        return lambda batch: self._finished(batch, numbers)

    def _finished(self, batch: Tensor, numbers: tuple[Tensor, Tensor] | None) -> Tensor:
        x = batch.to(torch.float32)
        owned = x is not batch  # only a tensor made here may be changed in place
        for step in self.steps:
            if isinstance(step, Scale):
                x = x.div_(step.divisor) if owned else x.div(step.divisor)
                owned = True
            elif numbers is not None and isinstance(step, Normalize):
                mean, std = numbers
                x = x.sub_(mean).div_(std) if owned else x.sub(mean).div_(std)
            elif isinstance(step, Flatten):
                x = x.flatten(1)
        return x

    def undone(self, batch: Tensor) -> Tensor:
        """What `finish` began with, as near as numbers allow.

        Args:
            batch: float32 `[N, *input_shape]`.

        Returns:
            float32 `[N, *raw_shape]`; of pictures, in the range of bytes.
        """
        x = batch.reshape(len(batch), *self.raw_shape)
        for step in reversed(self.steps):
            if isinstance(step, Scale):
                x = x * step.divisor
            elif isinstance(step, Normalize):
                mean, std = _per_channel(step, x.ndim, x.device)
                x = x * std + mean
        return x.clamp(0, 255) if self.accepts_pictures else x


def _per_channel(step: Normalize, ndim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (1, -1) + (1,) * (ndim - 2)
    mean = torch.tensor(step.mean, dtype=torch.float32, device=device).view(shape)
    std = torch.tensor(step.std, dtype=torch.float32, device=device).view(shape)
    return mean, std


def _width_height(crop: Crop) -> tuple[int, int]:
    height, width = crop.size
    return width, height


def resized_size(size: tuple[int, int], step: Resize, limits: PictureLimits) -> tuple[int, int]:
    """Width and height of a picture of `size` after `step`.

    Raises:
        PictureTooLarge: they are over the limit.
    """
    if isinstance(step.size, int):
        width, height = by_shorter_side(size, step.size)
    else:
        height, width = step.size
    # A very long and thin picture grows enormously when its short side is brought to size.
    if width * height > limits.max_pixels:
        raise PictureTooLarge(
            f"a picture of {size[0]}x{size[1]} pixels would become {width}x{height} "
            f"when resized; the limit is {limits.max_pixels} pixels"
        )
    return width, height
