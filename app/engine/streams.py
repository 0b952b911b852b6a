"""What a device does by itself: streams of work, each in order, and marks to wait for.

The seam between what is ours and what is CUDA's: on a processor everything happens at once, and
the tests have streams that run as late and as out of order as marks allow.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch

Stream: TypeAlias = Literal["upload", "compute", "download"]
T = TypeVar("T")
# A moment of a stream; what it is made of is the business of whoever gave it.
Mark: TypeAlias = Any


class Streams(Protocol):
    """The three streams of one device; called on its thread alone."""

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Let `stream` do the work, behind what it was given before."""

    def made(self, stream: Stream, work: Callable[[], T]) -> T:
        """The same with tensors that the work returns; only `stream` may read them."""

    def mark(self, stream: Stream) -> Mark:
        """The moment at which everything that `stream` was given so far is done."""

    def wait(self, stream: Stream, mark: Mark) -> None:
        """What `stream` is given from now on happens after `mark`."""

    def settle(self, mark: Mark) -> None:
        """Wait here until `mark` has passed.

        Raises:
            torch.AcceleratorError: the device failed at something on the way to it.
        """

    def rest(self) -> None:
        """Wait here until the device has nothing to do, whoever gave it."""


class HostStreams:
    """Of a processor: whatever is given is done at once, so there is nothing to wait for."""

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """At once, whichever stream it is."""
        del stream
        work()

    def made(self, stream: Stream, work: Callable[[], T]) -> T:
        """At once, whichever stream it is."""
        del stream
        return work()

    def mark(self, stream: Stream) -> None:
        """Has passed already."""

    def wait(self, stream: Stream, mark: Mark) -> None:
        """Has passed already."""

    def settle(self, mark: Mark) -> None:
        """Has passed already."""

    def rest(self) -> None:
        """There is nothing left to do."""


class CudaStreams:
    """Of a GPU: three streams beside the default one.

    Warm-up, recording, replays and eager forwards all have the compute stream: what cuBLAS and
    cuDNN keep for a stream is then never used by two things at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[Stream, torch.cuda.Stream] = {
            "upload": torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
            "compute": torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
            "download": torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
        }

    @property
    def compute(self) -> torch.cuda.Stream:
        """The stream that forwards run on."""
        return self._streams["compute"]

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Enqueue it; kernels run later, an exception of Python comes at once."""
        with torch.cuda.stream(self._streams[stream]):
            work()

    def made(self, stream: Stream, work: Callable[[], T]) -> T:
        """Enqueue it; the tensors are there at once, their numbers later."""
        with torch.cuda.stream(self._streams[stream]):
            return work()

    def mark(self, stream: Stream) -> torch.cuda.Event:
        """An event; whoever waits for it sleeps, because a core that spins is taken from HTTP."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._streams[stream])
        return event

    def wait(self, stream: Stream, mark: torch.cuda.Event) -> None:
        """On the device; this thread goes on."""
        self._streams[stream].wait_event(mark)

    def settle(self, mark: torch.cuda.Event) -> None:
        """Without the interpreter lock."""
        mark.synchronize()

    def rest(self) -> None:
        """Of all threads of this process."""
        torch.cuda.synchronize(self._device)
