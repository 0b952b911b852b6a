"""Samples that are the `x` of `(x, y)` pairs, from anything with a length and an index."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from models.preprocessing import Preprocessing
from training.randomness import seed_for, seeded
from training.samples import GREY_MODES, InMemory, Look, digest_of, look_of, picture_of, tensor_of

NUM_LOOKED_AT = 256


@dataclass(frozen=True)
class Items:
    """Pillow images, arrays or tensors: a list of pairs, or a `torch.utils.data.Dataset`.

    A random transform inside the pairs draws the same numbers at every reading: here they are
    data, and what should differ from epoch to epoch is the augmentation's work.
    """

    pairs: Any
    indices: tuple[int, ...]
    preprocessing: Preprocessing | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> tuple[Tensor, bytes]:
        """See `training.samples.Samples`."""
        x = self._x(index)
        source = tensor_of(np.array(x) if isinstance(x, Image.Image) else x)
        if not self.preprocessing or not self.preprocessing.accepts_pictures:
            return source, digest_of(source)
        image = x if isinstance(x, Image.Image) else picture_of(source)
        return self.preprocessing.picture(image), digest_of(source)

    def name(self, index: int) -> str:
        """See `training.samples.Samples`."""
        position = self.indices[index]
        return self.pairs.name(position) if isinstance(self.pairs, InMemory) else f"item {position}"

    def look(self) -> Look:
        """See `training.samples.Samples`; the first items speak for all."""
        first = self._x(0)
        if not isinstance(first, Image.Image):
            return look_of(tensor_of(first))
        images = [self._x(index) for index in range(min(len(self), NUM_LOOKED_AT))]
        channels = 1 if all(image.mode in GREY_MODES for image in images) else 3
        sizes = {(image.height, image.width) for image in images}
        return Look(True, (channels, *sizes.pop()) if len(sizes) == 1 else (channels,))

    def prepared(self, preprocessing: Preprocessing) -> "Items":
        """See `training.samples.Samples`."""
        return replace(self, preprocessing=preprocessing)

    def select(self, indices: Tensor) -> "Items":
        """See `training.samples.Samples`."""
        return replace(self, indices=tuple(self.indices[index] for index in indices.tolist()))

    def _x(self, index: int) -> Any:
        position = self.indices[index]
        with seeded(seed_for(0, "item", sample=position)):
            return self.pairs[position][0]
