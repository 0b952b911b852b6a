"""The preprocessing of a dataset that comes without a model: sizes from a look at its samples,
means and deviations from its training part.
"""

import torch
from torch import Tensor

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
from training.samples import InMemory, Look, Samples

LARGEST_OWN_SIZE = 64
"""Square pictures up to this side keep their size; larger and other ones are brought to it."""
MAX_MEASURED = 10_000
MAX_MEASURED_READ = 500


def draft_preprocessing(look: Look, picture_size: int = 0) -> Preprocessing:
    """Steps for samples that look like this, without means and deviations.

    Args:
        look: of the training samples.
        picture_size: pixels a side; 0 keeps a common square size up to `LARGEST_OWN_SIZE`.
    """
    if not look.pictures:
        return Preprocessing(steps=(TensorInput(shape=look.shape),))
    side = picture_size or _own_side(look)
    is_square = len(set(look.shape[1:])) == 1
    # Pictures of one small size are never resized while training; sent enlarged, as people do to
    # see them, the box filter gives their own pixels back where others would blur them.
    own_size = is_square and side == look.shape[1]
    interpolation: Interpolation = "box" if own_size else "bilinear"
    fit: tuple[Step, ...] = (Resize(size=(side, side), interpolation=interpolation),)
    if not is_square:
        fit = (Resize(size=side), Crop(size=(side, side)))
    color = Color(mode="L" if look.shape[0] == 1 else "RGB")
    return Preprocessing(steps=(Decode(), Orient(), color, *fit, Scale()))


def normalised(draft: Preprocessing, samples: Samples) -> Preprocessing:
    """`draft` with the mean and deviation of each channel (or column) of `samples` at its end."""
    limit = MAX_MEASURED if isinstance(samples, InMemory) else MAX_MEASURED_READ
    stride = max(1, len(samples) // limit)
    if isinstance(samples, InMemory):
        raw = samples.data[::stride]
    else:
        raw = torch.stack([samples.read(index)[0] for index in range(0, len(samples), stride)])
    mean, std = _moments(draft.finish(raw).transpose(0, 1).flatten(1).double())
    return Preprocessing(steps=(*draft.steps, Normalize(mean=mean, std=std)))


def _own_side(look: Look) -> int:
    sides = set(look.shape[1:])
    return min(*sides, LARGEST_OWN_SIZE) if len(sides) == 1 else LARGEST_OWN_SIZE


def _moments(values: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each row, to four digits; a constant row has a deviation of one."""
    mean, std = values.mean(1), values.std(1, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)
    return tuple(map(_rounded, mean.tolist())), tuple(map(_rounded, std.tolist()))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
