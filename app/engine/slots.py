"""A ring of slots: memory for a batch on its way to the device and back, kept and used in turn.

Each slot has its bytes twice, page-locked in host memory and on the device, so that a copy between
the two runs by itself while the batch before it is computed.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from app.engine.streams import Streams

# One that is laid out, one that is computed, and one whose answers are being read.
NUM_SLOTS = 3
# Larger ones are made for one batch and not kept.
MOST_BYTES = 1 << 28
# CUDA's own allocations begin at multiples of it, and any number may begin there.
ALIGNMENT = 256


class Buffer:
    """Bytes in host memory and as many on the device; grown when needed, seldom shrunk."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._take(0)

    def hold(self, num_bytes: int) -> bool:
        """Have at least so many; whether they had to be taken anew."""
        if self.host.numel() >= num_bytes:
            return False
        self._take(num_bytes)
        return True

    def shed(self) -> None:
        """Give back what is too much to keep."""
        if self.host.numel() > MOST_BYTES:
            self._take(0)

    def _take(self, num_bytes: int) -> None:
        pinned = self._device.type == "cuda" and num_bytes > 0
        self.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.there = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


class Slot:
    """One batch's inputs and outputs; belongs to the device thread."""

    def __init__(self, device: torch.device, streams: Streams) -> None:
        self.is_taken = False
        self._streams = streams
        self._in, self._out = Buffer(device), Buffer(device)
        self._outputs: dict[str, tuple[torch.dtype, Sequence[int], int]] = {}

    def inputs(self, num_rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for `num_rows` rows of the shape and type of `like`'s, here and there."""
        shape, dtype = (num_rows, *like.shape[1:]), like.dtype
        if self._in.hold(math.prod(shape) * like.itemsize):
            # New memory on the device may be old memory that something still reads. This happens
            # a few times in a life, so the surest way is not too slow.
            self._streams.rest()
        return _view(self._in.host, dtype, shape, 0), _view(self._in.there, dtype, shape, 0)

    def gather(self, outputs: Mapping[str, Tensor]) -> None:
        """Copy `outputs` side by side on the device; as a piece of work of its compute stream."""
        at, self._outputs = 0, {}
        for name, output in outputs.items():
            self._outputs[name] = (output.dtype, output.shape, at)
            at += -(-output.numel() * output.itemsize // ALIGNMENT) * ALIGNMENT
        self._out.hold(at)
        for name, output in outputs.items():
            _view(self._out.there, *self._outputs[name]).copy_(output)

    def bring_back(self) -> None:
        """What was gathered to host memory; as a piece of work of the download stream."""
        if self._outputs:
            dtype, shape, at = next(reversed(self._outputs.values()))
            end = at + math.prod(shape) * dtype.itemsize
            self._out.host[:end].copy_(self._out.there[:end], non_blocking=True)

    def answers(self) -> dict[str, Tensor]:
        """What was brought back, as tensors that outlive the slot's next batch."""
        return {name: _view(self._out.host, *of).clone() for name, of in self._outputs.items()}

    def release(self) -> None:
        """It is nobody's again."""
        self.is_taken, self._outputs = False, {}
        self._in.shed()
        self._out.shed()


class Ring:
    """The slots of one device."""

    def __init__(self, device: torch.device, streams: Streams, num_slots: int = NUM_SLOTS) -> None:
        self._slots = [Slot(device, streams) for _ in range(num_slots)]
        self._next = 0

    def take(self) -> Slot:
        """The slot that has rested for the longest.

        Raises:
            RuntimeError: its batch has not come back; more fly than there are slots.
        """
        slot = self._slots[self._next]
        if slot.is_taken:
            raise RuntimeError(f"more than {len(self._slots)} batches are on their way")
        self._next = (self._next + 1) % len(self._slots)
        slot.is_taken = True
        return slot


def _view(memory: Tensor, dtype: torch.dtype, shape: Sequence[int], at: int) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    return memory[at : at + num_bytes].view(dtype).view(tuple(shape))
