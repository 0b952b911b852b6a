"""The memory that one thread lays its large batches out in, one after the other.

A fresh tensor of some megabytes is fresh pages from the system, which cost more than the copy.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Smaller ones come cheaply from the allocator, larger ones are not worth keeping for ever.
LEAST_BYTES = 1 << 18
MOST_BYTES = 1 << 28


class Scratch:
    """Kept memory; what goes on to a graphics card is laid out in `app.engine.slots` instead."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def joined(self, rows: Sequence[Tensor], num_rows: int) -> Tensor:
        """`rows`, `[k, ...]` each, as one tensor of `num_rows` rows, good until the next call."""
        first = rows[0]
        shape = (num_rows, *first.shape[1:])
        num_bytes = math.prod(shape) * first.itemsize
        if not LEAST_BYTES <= num_bytes <= MOST_BYTES:
            return torch.cat(list(rows))
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        target = self._memory[:num_bytes].view(first.dtype).view(shape)
        return torch.cat(list(rows), out=target)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is a view of this memory and must be copied to be kept."""
        if not self._memory.numel():
            return False
        return tensor.untyped_storage().data_ptr() == self._memory.data_ptr()
