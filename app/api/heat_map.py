"""Attributions as a picture: what speaks for the class in red, what speaks against it in blue."""

import io
import math
from typing import Final

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from app.errors import BadInput
from models.preprocessing import Preprocessing

# Small pictures are enlarged to this many pixels a side, or nobody would see anything.
SIDE: Final = 256
MAX_SIDE: Final = 1024
# One glaring pixel must not hide all others: this share of them stays below full colour.
FULL_COLOUR: Final = 0.995
RED, BLUE = np.array([214, 39, 40], np.float32), np.array([31, 119, 180], np.float32)


def heat_map_png(preprocessing: Preprocessing, inputs: Tensor, attributions: Tensor) -> bytes:
    """A PNG of the picture in grey, as the network saw it, under its attributions.

    Args:
        inputs: float32 `[1, *input_shape]`.
        attributions: float32 `[*input_shape]`.

    Raises:
        BadInput: the model takes no pictures.
    """
    shape = preprocessing.raw_shape
    if len(shape) != 3:
        raise BadInput(
            f"inputs of shape {list(shape)} are no picture to draw on; ask for application/json",
            param="Accept",
        )
    grey = _grey(preprocessing.undone(inputs)[0])
    heat = _heat(attributions.view(shape).sum(0))
    colour = np.where(heat[..., None] > 0, RED, BLUE)
    opacity = np.abs(heat)[..., None] ** 1.5 * 0.8
    pixels = grey[..., None] * (1 - opacity) + colour * opacity
    return _png(Image.fromarray(pixels.round().astype(np.uint8)))


def _grey(picture: Tensor) -> np.ndarray:
    """`[C, H, W]` as `[H, W]` of 0..255; numbers that are no bytes are stretched to that."""
    values: np.ndarray = picture.mean(0).numpy()
    low, high = min(0.0, float(values.min())), max(1e-6, float(values.max()))
    return values if low == 0 and high > 1 else (values - low) / (high - low) * 255


def _heat(summed: Tensor) -> np.ndarray:
    """`[H, W]` in -1..1; pixels of large maps are spread a little, or they are seen as dust."""
    radius = min(summed.shape) // 96
    spread = F.avg_pool2d(summed[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0]
    values: np.ndarray = spread.numpy()
    strongest = max(float(np.quantile(np.abs(values), FULL_COLOUR)), 1e-12)
    return np.clip(values / strongest, -1, 1)


def _png(image: Image.Image) -> bytes:
    factor = math.ceil(SIDE / min(image.size))
    if factor > 1 and max(image.size) * factor <= MAX_SIDE:
        size = (image.width * factor, image.height * factor)
        image = image.resize(size, Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
