"""Samples by index, and the simplest kind of them: one tensor in memory.

A sample is what a model's `Preprocessing.finish` takes: uint8 `[C, H, W]` for pictures, numbers of
a fixed shape otherwise. `training/picture_files.py` and `training/items.py` have the other kinds.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.preprocessing import Crop, Preprocessing, Resize

GREY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "F"})
"""Pillow's modes that hold no colour."""


@dataclass(frozen=True)
class Look:
    """How samples look before any preprocessing.

    Attributes:
        pictures: whether they are pictures of bytes; numbers of a fixed shape otherwise.
        shape: `[C, H, W]` of pictures that are all alike, or of the numbers; `[C]` alone where
            pictures differ in size.
    """

    pictures: bool
    shape: tuple[int, ...]


class Samples(Protocol):
    """Inputs by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, bytes]:
        """One sample, and the sha256 of what it was read from.

        Raises:
            models.picture.PictureError, ValueError, OSError: this sample is at fault.
        """

    def name(self, index: int) -> str:
        """What a person would call this sample."""

    def look(self) -> Look:
        """How the samples look, from headers alone."""

    def prepared(self, preprocessing: Preprocessing) -> "Samples":
        """The same samples through the picture steps of `preprocessing`."""

    def select(self, indices: Tensor) -> "Samples":
        """Some of them, in the order of `indices`."""


@dataclass(frozen=True)
class InMemory:
    """A tensor `[N, *shape]` that holds every sample.

    Attributes:
        data: the samples.
        names: what a person would call each; by its position where there are none.
        digests: the sha256 of what each was read from; of its own bytes where there are none.
    """

    data: Tensor
    names: Sequence[str] = ()
    digests: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Tensor, bytes]:
        """See `Samples`."""
        sample = self.data[index]
        return sample, self.digests[index] if self.digests else digest_of(sample)

    def name(self, index: int) -> str:
        """See `Samples`."""
        return self.names[index] if self.names else f"sample {index}"

    def look(self) -> Look:
        """See `Samples`."""
        return look_of(self.data[0])

    def prepared(self, preprocessing: Preprocessing) -> Samples:
        """See `Samples`; pictures that the steps would not change stay in memory as they are."""
        if not preprocessing.accepts_pictures or changes_nothing(preprocessing, self.look()):
            return self
        from training.items import Items  # which builds on this file

        return Items(self, tuple(range(len(self))), preprocessing)

    def select(self, indices: Tensor) -> "InMemory":
        """See `Samples`."""
        positions = indices.tolist()
        names = [self.names[position] for position in positions] if self.names else ()
        digests = [self.digests[position] for position in positions] if self.digests else ()
        return InMemory(self.data[indices], names, digests)

    def __getitem__(self, index: int) -> tuple[Tensor, None]:
        """As a sequence of pairs that know no `y`."""
        return self.data[index], None


def look_of(sample: Tensor) -> Look:
    """How one sample looks, and with it all that have its shape and type."""
    shape = tuple(sample.shape)
    return Look(sample.dtype == torch.uint8 and len(shape) == 3 and shape[0] in (1, 3), shape)


def changes_nothing(preprocessing: Preprocessing, look: Look) -> bool:
    """Whether the Pillow steps give back every picture that looks like this, byte for byte."""
    sizes = [step.size for step in preprocessing.steps if isinstance(step, (Resize, Crop))]
    return preprocessing.raw_shape == look.shape and all(size == look.shape[1:] for size in sizes)


def picture_of(pixels: Tensor) -> Image.Image:
    """A Pillow image of uint8 `[C, H, W]` pixels, C being 1 or 3."""
    array = pixels.cpu().numpy()
    if len(array) == 1:
        return Image.fromarray(array[0])
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def tensor_of(x: Any) -> Tensor:
    """One sample, or many with a leading dimension, from an array or a tensor.

    Bytes as `[..., H, W, C]` with C of 1 or 3, as NumPy keeps pictures, become `[..., C, H, W]`,
    and 64-bit floats become 32-bit ones.
    """
    tensor = x if isinstance(x, Tensor) else torch.from_numpy(np.ascontiguousarray(x))
    if tensor.dtype == torch.float64:
        return tensor.float()
    from_numpy = not isinstance(x, Tensor) and tensor.dtype == torch.uint8 and tensor.ndim >= 3
    if from_numpy and tensor.shape[-1] in (1, 3):
        return tensor.movedim(-1, -3).contiguous()
    return tensor


def digest_of(tensor: Tensor) -> bytes:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().data).digest()
