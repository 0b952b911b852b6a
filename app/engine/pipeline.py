"""One model's way through its device: rows up, forward, answers down, each on a stream of its own.

While one batch computes, the next is laid out and copied. Where the forward was recorded for a
batch size, it is replayed; elsewhere it runs eagerly. Both answer alike, or are not used.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from app.engine.device_error import is_device_lost, is_out_of_memory
from app.engine.execution import Reference
from app.engine.recording import CudaRecorder, Recorder, Recording, Respond
from app.engine.slots import Ring, Slot
from app.engine.streams import CudaStreams, Mark, Streams

NUM_TRIES: Final = 5


@dataclass(eq=False)
class Accelerator:
    """A device that computes by itself: its streams, its slots, and who records for it.

    Attributes:
        recorder: makes a recorder for one model; None where nothing can be recorded.
        free_at: when the last batch had landed, of `time.monotonic`.
    """

    device: torch.device
    streams: Streams
    recorder: Callable[[], Recorder] | None = None
    free_at: float = 0.0
    ring: Ring = field(init=False)

    def __post_init__(self) -> None:
        self.ring = Ring(self.device, self.streams)


def accelerator_of(device: torch.device) -> Accelerator | None:
    """The one that `device` is; None for a processor, which computes when it is told to."""
    if device.type != "cuda":
        return None
    streams = CudaStreams(device)
    return Accelerator(device, streams, lambda: CudaRecorder(device, streams))


@dataclass(slots=True, eq=False)
class Flight:
    """A batch on its way through the device."""

    slot: Slot
    done: Mark
    began: float


class Pipeline:
    """Starts batches of one model and lands them, in the order in which they were started.

    Args:
        respond: rows on the device to named tensors there; called in inference mode.
    """

    def __init__(self, respond: Respond, accelerator: Accelerator) -> None:
        self.recordings: dict[int, Recording] = {}
        self.accelerator = accelerator
        self._respond = respond
        self._recorder = accelerator.recorder() if accelerator.recorder is not None else None

    @property
    def can_record(self) -> bool:
        """Whether the device has a way to record."""
        return self._recorder is not None

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        """Start and land at once."""
        return self.land(self.start([rows], len(rows)))[0]

    def start(self, rows: Sequence[Tensor], num_rows: int) -> Flight:
        """Let the device begin; this thread does not wait for it.

        Args:
            rows: together `num_rows`; those in host memory may be reused at once, others were made
                by the compute stream.
        """
        began = time.monotonic()
        streams, slot = self.accelerator.streams, self.accelerator.ring.take()
        try:
            here, there = slot.inputs(num_rows, rows[0])
            if all(row.device == here.device for row in rows):
                torch.cat(list(rows), out=here)
                streams.run("upload", lambda: _copy(there, here))
                streams.wait("compute", streams.mark("upload"))
            else:
                streams.run("compute", lambda: _gather(there, rows))
            streams.run("compute", lambda: self._compute(slot, there))
            streams.wait("download", streams.mark("compute"))
            streams.run("download", slot.bring_back)
            return Flight(slot, streams.mark("download"), began)
        except BaseException:
            self._abandon(slot)
            raise

    def land(self, flight: Flight) -> tuple[dict[str, Tensor], float]:
        """The answers in host memory, and how many seconds the device had for them alone.

        Raises:
            torch.AcceleratorError: the device failed at it.
        """
        try:
            self.accelerator.streams.settle(flight.done)
            answers = flight.slot.answers()
        finally:
            flight.slot.release()
            now = time.monotonic()
            seconds = now - max(flight.began, self.accelerator.free_at)
            self.accelerator.free_at = now
        return answers, seconds

    def record(self, rows: Tensor) -> str:
        """Record the forward for as many rows as `rows` has, and use it if it proves itself.

        It must answer as the eager forward does, and sooner. Called on the device thread, when it
        has nothing else to do.

        Args:
            rows: in host memory, such as golden inputs.

        Returns:
            How it went, in words.

        Raises:
            torch.AcceleratorError: the device was lost over it.
        """
        if self._recorder is None:
            return "is not recorded: this device cannot"
        size, device = len(rows), self.accelerator.device
        try:
            with torch.inference_mode():
                expected, eager_s = self(rows), self._best_s(rows)
                self.recordings[size] = self._recorder(self._respond, rows.to(device))
                fault = self._fault(rows, expected["logits"], eager_s)
        except Exception as error:
            # Whatever cannot be recorded (an operator that waits for the device, memory that ran
            # out) runs eagerly as before; only a device that is gone is more than that.
            self.recordings.pop(size, None)
            if is_device_lost(error, device):
                raise
            short = is_out_of_memory(error)
            return f"is not recorded: {'memory ran out' if short else _brief(error)}"
        if fault:
            del self.recordings[size]
        return f"is not replayed: recorded, it {fault}" if fault else "is recorded"

    def _fault(self, rows: Tensor, logits: Tensor, eager_s: float) -> str:
        """What is wrong with the recording for these rows; empty where nothing is."""
        # The same kernels in the same order: whatever the precision, only rounding may differ.
        _, fault = Reference(rows, logits).judged(self(rows)["logits"], "fp32")
        return fault or ("is slower" if self._best_s(rows) > eager_s else "")

    def _best_s(self, rows: Tensor) -> float:
        """The shortest of a few tries, up and down included."""
        return min(self.land(self.start([rows], len(rows)))[1] for _ in range(NUM_TRIES))

    def _compute(self, slot: Slot, rows: Tensor) -> None:
        """On the compute stream."""
        recording = self.recordings.get(len(rows))
        slot.gather(self._respond(rows) if recording is None else _replayed(recording, rows))

    def _abandon(self, slot: Slot) -> None:
        """Nobody will land it; but a copy may still read from it."""
        streams = self.accelerator.streams
        with contextlib.suppress(RuntimeError):  # the device is lost: whoever called hears why
            for stream in ("upload", "compute"):
                streams.settle(streams.mark(stream))
        slot.release()


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _gather(target: Tensor, rows: Sequence[Tensor]) -> None:
    torch.cat([row.to(target.device, non_blocking=True) for row in rows], out=target)


def _replayed(recording: Recording, rows: Tensor) -> dict[str, Tensor]:
    recording.inputs.copy_(rows)
    recording.replay()
    return dict(recording.outputs)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
