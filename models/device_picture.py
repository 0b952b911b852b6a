"""The picture steps of a preprocessing in torch, for pictures that a device has decoded itself.

They do what Pillow does in `models/preprocessing.py`, in floats instead of rounded bytes, so a
pixel may differ by a level or two of 255. What Pillow alone can do stays with it.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from models.picture import PictureLimits
from models.preprocessing import Crop, Orient, Preprocessing, Resize, resized_size
from models.resizing import centred

# As Pillow computes them: with the pixels that fall under a wider kernel where a picture shrinks.
_MODES: Final = {"bilinear": "bilinear", "bicubic": "bicubic"}
# EXIF orientation -> swap height and width first, then mirror these dimensions.
_TURNS: Final[dict[int, tuple[bool, tuple[int, ...]]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


def is_possible(preprocessing: Preprocessing) -> bool:
    """Whether all of its picture steps can be done here."""
    resize = preprocessing.find(Resize)
    return preprocessing.accepts_pictures and (resize is None or resize.interpolation in _MODES)


def picture_on_device(
    decoded: Tensor, orientation: int, preprocessing: Preprocessing, limits: PictureLimits
) -> Tensor:
    """One picture through the steps between decoding and bytes, on the device where it is.

    Args:
        decoded: uint8 `[C, H, W]`, in the colours that the preprocessing asks for.
        orientation: of EXIF, 1 to 8.
        limits: bounds on what it becomes.

    Returns:
        uint8 `[C, H, W]`, the shape `raw_shape`.

    Raises:
        models.picture.PictureTooLarge: it would become too large.
    """
    picture = decoded
    for step in preprocessing.steps:
        match step:
            case Orient():
                picture = _oriented(picture, orientation)
            case Resize():
                picture = _resized(picture, step, limits)
            case Crop():
                picture = _cropped(picture, step.size)
            case _:
                pass
    return picture.contiguous()


def _oriented(picture: Tensor, orientation: int) -> Tensor:
    swapped, mirrored = _TURNS.get(orientation, (False, ()))
    picture = picture.transpose(-2, -1) if swapped else picture
    return picture.flip(mirrored) if mirrored else picture


def _resized(picture: Tensor, step: Resize, limits: PictureLimits) -> Tensor:
    height, width = picture.shape[-2:]
    new_width, new_height = resized_size((width, height), step, limits)
    if (new_width, new_height) == (width, height):
        return picture
    resized = functional.interpolate(
        picture.unsqueeze(0).float(),
        size=(new_height, new_width),
        mode=_MODES[step.interpolation],
        align_corners=False,
        antialias=True,
    )
    return resized.squeeze(0).round_().clamp_(0, 255).to(torch.uint8)


def _cropped(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """From the centre; outside the picture is black."""
    height, width = size
    top, left = centred(picture.shape[-2], height), centred(picture.shape[-1], width)
    bottom, right = top + height - picture.shape[-2], left + width - picture.shape[-1]
    return functional.pad(picture, (-left, right, -top, bottom))
