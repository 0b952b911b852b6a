"""Batches for the device: from a tensor that lies on it, or streamed from workers that read ahead.

Both give the same batches for the same order, so how a dataset is held never changes a result.
"""

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.picture import PictureError
from training.faults import DatasetFaults
from training.order import Batch, in_turn
from training.samples import InMemory, Samples
from training.source import Part

READ_AHEAD = 4
"""Batches that each worker may have ready."""
GATHER_BYTES = 1 << 20
"""Batches are gathered and finished together up to this much: what stays in a core's cache."""
WORKER_DEADLINE_S = 300.0
"""No batch takes this long to read; a worker that does has died or hangs."""


class Piece(NamedTuple):
    """What was read of one batch: the samples that could be read, and what ails the others."""

    data: Tensor
    digests: tuple[bytes, ...]
    faults: tuple[str, ...]


Fed: TypeAlias = Generator[tuple[Batch, Tensor, Tensor], None, None]


class Feed(Protocol):
    """Batches of one part on the device: samples after `finish`, and their targets."""

    def __call__(self, order: Iterable[Batch]) -> Fed:
        """The samples and targets of every batch of `order`.

        Raises:
            DatasetFaults: a sample that could be read before cannot be read now.
        """


def feed_for(
    part: Part,
    device: torch.device,
    num_workers: int,
    finish: Callable[[Tensor], Tensor] | None = None,
) -> Feed:
    """A feed of `part` for `device`: resident if its samples lie in memory, else streamed.

    Args:
        part: samples and targets.
        device: where batches are wanted.
        num_workers: processes that read what does not lie in memory.
        finish: done to samples on the device, sample by sample; nothing without it.
    """
    finish = finish or _as_read
    if isinstance(part.samples, InMemory):
        return _Resident(part.samples.data.to(device), part.targets.to(device), finish)
    return _Streamed(part, device, num_workers, finish)


def in_batches(
    part: Part, finish: Callable[[Tensor], Tensor], batch_size: int, num_workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample of `part` once and in turn, finished, on the CPU: what evaluations take."""
    feed = feed_for(part, torch.device("cpu"), num_workers, finish)
    for _, inputs, targets in feed(in_turn(len(part), batch_size)):
        yield inputs, targets


def pieces(samples: Samples, order: Iterable[Batch], num_workers: int) -> Iterator[Piece]:
    """Read the samples of every batch of `order`, in that order.

    Args:
        samples: picklable, where the system starts its processes anew.
        order: drawn from a few batches ahead.
        num_workers: processes that read; 0 reads here.
    """
    loader: Any = DataLoader(
        _Reader(samples),
        batch_sampler=_indices(order),
        collate_fn=_as_read,
        num_workers=num_workers,
        prefetch_factor=READ_AHEAD if num_workers else None,
        timeout=WORKER_DEADLINE_S if num_workers else 0,
        worker_init_fn=_leave_interrupts_alone,
    )
    return iter(loader)


@dataclass(frozen=True)
class _Resident:
    data: Tensor
    targets: Tensor
    finish: Callable[[Tensor], Tensor]

    def __call__(self, order: Iterable[Batch]) -> Fed:
        """Several small batches at once, because each call of an operation has its price; every
        sample is finished by itself, so this changes no bit.
        """
        remaining, device = iter(order), self.data.device
        for first in remaining:
            batches = [first, *islice(remaining, self._num_at_once(first) - 1)]
            indices = on_its_way(torch.cat([batch.indices for batch in batches]), device)
            sizes = [len(batch.indices) for batch in batches]
            inputs = torch.split(self.finish(self.data.index_select(0, indices)), sizes)
            targets = torch.split(self.targets.index_select(0, indices), sizes)
            yield from zip(batches, inputs, targets, strict=True)

    def _num_at_once(self, batch: Batch) -> int:
        floats = len(batch.indices) * self.data[0].numel()
        return max(1, GATHER_BYTES // (4 * max(1, floats)))


@dataclass(frozen=True)
class _Streamed:
    part: Part
    device: torch.device
    num_workers: int
    finish: Callable[[Tensor], Tensor]

    def __call__(self, order: Iterable[Batch]) -> Fed:
        planned: deque[Batch] = deque()
        for piece in pieces(self.part.samples, _noted(order, planned), self.num_workers):
            if piece.faults:
                raise DatasetFaults("that is being streamed", piece.faults)
            batch = planned.popleft()
            targets = on_its_way(self.part.targets[batch.indices], self.device)
            yield batch, self.finish(on_its_way(piece.data, self.device)), targets


def on_its_way(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting until it is there.

    Only from page-locked memory does a copy go by itself. torch keeps that memory from being used
    again before the copy is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _noted(order: Iterable[Batch], planned: deque[Batch]) -> Iterator[Batch]:
    for batch in order:
        planned.append(batch)
        yield batch


def _indices(order: Iterable[Batch]) -> Iterator[list[int]]:
    for batch in order:
        yield batch.indices.tolist()


class _Reader(Dataset[Piece]):
    """What each worker holds: it reads a batch, and reports faults instead of raising them."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, indices: list[int]) -> Piece:
        read: list[tuple[Tensor, bytes]] = []
        faults: list[str] = []
        for index in indices:
            try:
                read.append(self.samples.read(index))
            except (PictureError, ValueError, OSError) as error:
                faults.append(f"{self.samples.name(index)}: {error}")
                continue
            if read[-1][0].shape != read[0][0].shape:
                shape, first = list(read.pop()[0].shape), list(read[0][0].shape)
                faults.append(
                    f"{self.samples.name(index)}: shape {shape} where others have {first}"
                )
        data = torch.stack([tensor for tensor, _ in read]) if read else torch.empty(0)
        return Piece(data, tuple(digest for _, digest in read), tuple(faults))


def _leave_interrupts_alone(_: int) -> None:
    """A terminal sends Ctrl-C to every process; the one that trains decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_read(piece: Any) -> Any:
    return piece
