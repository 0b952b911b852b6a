"""One live version, ready to answer: decoding before the batcher, probabilities after it."""

import asyncio
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from app.engine.batch import Run
from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher, Lane
from app.engine.decoding import Decoder
from app.engine.device_thread import compute_with
from app.engine.item_queue import Answer
from app.engine.loading import LoadedVersion
from app.engine.pictures import Pictures, Reader, Rows
from app.engine.pipeline import Accelerator, Pipeline
from app.engine.respond import pipeline_of, pixel_pipeline_of, run_of
from app.engine.statistics import Duration, Statistics
from app.errors import BadInput, DeviceLost
from models.preprocessing import Preprocessing

# More numbers than these are finished on a thread.
INLINE_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that goes in or comes out; `shape` is without the batch dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Prediction(NamedTuple):
    """The answer to one request.

    Attributes:
        logits: float32 `[n, classes]` on the CPU.
        probabilities: float32 `[n, classes]` on the CPU; rows sum to one.
        queue_ms: from submission to the start of the first batch that held one of its rows.
        compute_ms: time on the device of the batches that held its rows.
        batch_size: rows in the largest of these batches, others' included.
        decode_ms: time in which pictures of these batches became rows, where they did then.
        best_values, best_labels: probabilities and indices `[n, NUM_BEST]`, the best first, where
            they were picked with the batch.
    """

    logits: Tensor
    probabilities: Tensor
    queue_ms: float
    compute_ms: float
    batch_size: int
    best_values: Tensor | None = None
    best_labels: Tensor | None = None
    decode_ms: float = 0.0

    def best(self, num_labels: int) -> tuple[Tensor, Tensor]:
        """The `num_labels` largest probabilities of each row and their indices, the best first."""
        num_labels = min(num_labels, self.probabilities.shape[1])
        values, labels = self.best_values, self.best_labels
        if values is None or labels is None or values.shape[1] < num_labels:
            values, labels = self.probabilities.topk(num_labels, dim=1)
        if values.shape[1] == num_labels:
            return values, labels
        return values[:, :num_labels], labels[:, :num_labels]


class Predictor:
    """A loaded version with its lane in the batcher.

    Nobody closes it: a request holds on to the predictor that it was given, and when the last
    one lets go, the lane is closed and the network's memory is free.

    Args:
        loaded: from `app.engine.loading`.
        batcher: of the device that the network is on.
        decoder: shared by all models.
        options: of the lane.

    Raises:
        DeviceLost, Draining: nothing is computed here any more.
    """

    def __init__(
        self, loaded: LoadedVersion, batcher: Batcher, decoder: Decoder, options: LaneOptions
    ) -> None:
        manifest = loaded.manifest
        self.name, self.version, self.manifest = (
            loaded.version.name,
            loaded.version.number,
            manifest,
        )
        self.loaded = loaded
        self.labels = manifest.labels
        self.input_shape = manifest.preprocessing.input_shape
        self.accepts_pictures = manifest.preprocessing.accepts_pictures
        self.inputs = _inputs(manifest.preprocessing)
        self.outputs = tuple(
            TensorSpec(name, "FP32", (len(self.labels),)) for name in ("logits", "probabilities")
        )
        self.memory_bytes = _memory_bytes(loaded)
        self.decode_time = Duration()
        self.encode_time = Duration()  # kept by whoever writes the answers
        self.opened_at = time.time()
        self.answered_at = 0.0
        self._decoder = decoder
        # The lanes must not know this object, or none of them would ever be let go of.
        self.lane = _lane(loaded, batcher, options, self.input_shape, pipeline_of)
        self.pixels: Lane | None = None
        if self.accepts_pictures and batcher.accelerators[0] is not None:
            raw_shape = manifest.preprocessing.raw_shape
            as_bytes = replace(options, dtype=torch.uint8)
            self.pixels = _lane(loaded, batcher, as_bytes, raw_shape, pixel_pipeline_of)
            self.pixels.count_with(self.lane)
        self._reader = self._reader_in_turn()
        for lane in self.lanes:
            weakref.finalize(self, lane.let_go).atexit = False
        weakref.finalize(self, batcher.free_soon).atexit = False

    def foresee(self, num_rows: int, deadline: float) -> None:
        """Refuse a request of so many rows now, if it would be refused once it is read.

        Raises:
            QueueFull, DeadlineUnreachable, QueueTooSlow: as `Lane.submit`.
        """
        (self.pixels or self.lane).foresee(num_rows, deadline)

    async def rows_of(self, pictures: Sequence[bytes], deadline: float) -> Rows:
        """Encoded pictures as `predict` takes them; decoded now, or when their turn comes.

        Raises:
            As `decode`.
        """
        waiting = self._in_turn(pictures)
        return await self.decode(pictures, deadline) if waiting is None else waiting

    def rows_at_once(self, pictures: Sequence[bytes]) -> Rows | None:
        """The same without a wait; None where only `rows_of` can tell.

        Raises:
            models.picture.PictureError: one of them cannot be used.
        """
        if not self.accepts_pictures:
            return None
        waiting = self._in_turn(pictures)
        if waiting is not None:
            return waiting
        began = time.perf_counter_ns()
        batch = self._decoder.at_once(
            pictures, self.manifest.preprocessing, finished=self.pixels is None
        )
        if batch is not None:
            self.decode_time.add(time.perf_counter_ns() - began)
        return batch

    async def decode(self, pictures: Sequence[bytes], deadline: float) -> Tensor:
        """Encoded pictures as numbers: finished, unless the device does that.

        Raises:
            BadInput: this version takes tensors only. QueueFull, DeadlineUnreachable: its queue is
                too long already. Others as in `Decoder.decode`.
        """
        if not self.accepts_pictures:
            raise BadInput(f"{self.name} takes tensors of shape {list(self.input_shape)}")
        # Under overload most are refused, and their pictures would take the processors of the rest.
        self.foresee(len(pictures), deadline)
        began = time.perf_counter_ns()
        batch = await self._decoder.decode(
            pictures, self.manifest.preprocessing, deadline, finished=self.pixels is None
        )
        self.decode_time.add(time.perf_counter_ns() - began)
        return batch

    async def from_pixels(self, pixels: Tensor) -> Tensor:
        """uint8 `[n, *raw_shape]` as `predict` takes it."""
        if self.pixels is not None:
            return pixels
        if pixels.numel() <= INLINE_ELEMENTS:
            return self.finished(pixels)
        return await asyncio.to_thread(self._finished_beside, pixels)

    @property
    def is_copied(self) -> bool:
        """Whether a shadow gets copies of its requests, which only `predict` makes."""
        return False

    def finished(self, batch: Tensor) -> Tensor:
        """What `predict` takes as the network takes it, float32 `[n, *input_shape]`."""
        as_bytes = batch.dtype is torch.uint8
        return self.manifest.preprocessing.finish(batch) if as_bytes else batch

    def _finished_beside(self, pixels: Tensor) -> Tensor:
        """The same on a thread whose helpers would stay, and take the processors of others."""
        compute_with(1)
        return self.finished(pixels)

    async def predict(self, batch: Rows, deadline: float, priority: int = 0) -> Prediction:
        """Answer a batch.

        Args:
            batch: float32 `[n, *input_shape]` on the CPU, n at least 1; or what `rows_of`,
                `decode` and `from_pixels` gave.
            deadline: of `time.monotonic`, in seconds.
            priority: smaller is sooner.

        Raises:
            As `Lane.submit`: app.errors.QueueFull, DeadlineExceeded, ForwardFailed, DeviceLost,
            and models.picture.PictureError.
        """
        return self.prediction(await self.lane_of(batch).submit(batch, deadline, priority))

    def lane_of(self, batch: Rows) -> Lane:
        """The way to the device for a batch as `predict` takes it."""
        pixels = self.pixels
        return self.lane if pixels is None or batch.dtype is torch.float32 else pixels

    def prediction(self, answer: Answer) -> Prediction:
        """What a lane of this version answered."""
        self.answered_at = time.time()
        if answer.decode_ms:
            self.decode_time.add(int(answer.decode_ms * 1e6))
        outputs = answer.outputs
        return Prediction(
            outputs["logits"],
            outputs["probabilities"],
            answer.queue_ms,
            answer.compute_ms,
            answer.batch_size,
            outputs.get("best_values"),
            outputs.get("best_labels"),
            answer.decode_ms,
        )

    def _in_turn(self, pictures: Sequence[bytes]) -> Pictures | None:
        """Pictures that become numbers when their turn comes; None for those that do so before."""
        if self._reader is None or self.lane.is_inline:
            return None
        return self._decoder.in_turn(pictures, self._reader)

    def _reader_in_turn(self) -> Reader | None:
        """Who decodes pictures in their turn; None where nobody does."""
        if not self.accepts_pictures:
            return None
        preprocessing = self.manifest.preprocessing
        if self.pixels is None:
            return self._decoder.host_reader(preprocessing)
        return self._decoder.device_reader(preprocessing)

    @property
    def loaded_as(self) -> "Predictor":
        """The predictor of the version itself; another object where requests are shadowed."""
        return self

    @property
    def used_at(self) -> float:
        """When it last answered, or became live; of `time.time`, in seconds."""
        return max(self.answered_at, self.opened_at)

    @property
    def lanes(self) -> list[Lane]:
        """Its ways to the device: for numbers, and for pixels where those go there as bytes."""
        return [self.lane] if self.pixels is None else [self.lane, self.pixels]

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return all(lane.is_idle for lane in self.lanes)

    @property
    def num_waiting_rows(self) -> int:
        """Rows that wait for their turn."""
        return sum(lane.num_waiting_rows for lane in self.lanes)

    def forget_warm_up(self) -> None:
        """Count anew: what was answered so far was nobody's request."""
        self.lane.forget_statistics()
        if self.pixels is not None:
            self.pixels.count_with(self.lane)
        self.answered_at = 0.0

    @property
    def statistics(self) -> Statistics:
        """What it has done so far, in the terms of the statistics extension."""
        lane = self.lane.statistics
        batches = {
            size: Duration(count.num_batches, int(count.compute_s * 1e9))
            for size, count in lane.batches.items()
        }
        executions = sum(one.count for one in batches.values())
        compute_ns = sum(one.ns for one in batches.values())
        failed = lane.num_failed + lane.num_expired + lane.num_refused_full + lane.num_refused_late
        return Statistics(
            inference_count=lane.num_rows,
            execution_count=executions,
            last_inference_ms=int(self.answered_at * 1000),
            success=Duration(lane.num_requests, int(lane.success_s * 1e9)),
            fail=Duration(failed, 0),
            queue=Duration(lane.num_requests, int(lane.queue_s.total * 1e9)),
            compute_input=self.decode_time,
            compute_infer=Duration(executions, compute_ns),
            compute_output=Duration(lane.num_requests, self.encode_time.ns),
            batches=batches,
        )


def _lane(
    loaded: LoadedVersion,
    batcher: Batcher,
    options: LaneOptions,
    row_shape: tuple[int, ...],
    pipeline: Callable[[LoadedVersion, Accelerator], Pipeline],
) -> Lane:
    everywhere = [loaded, *loaded.elsewhere]
    run, *elsewhere = (
        _run_on(accelerator, one, pipeline)
        for accelerator, one in zip(batcher.accelerators, everywhere, strict=True)
    )
    name = str(loaded.version)
    return batcher.open_lane(name, run, options, row_shape=row_shape, elsewhere=elsewhere)


def _run_on(
    accelerator: Accelerator | None,
    loaded: LoadedVersion | None,
    pipeline: Callable[[LoadedVersion, Accelerator], Pipeline],
) -> Run:
    """The forward of one device; of a lost one, which is never asked again."""
    if loaded is None:
        return _gone
    return run_of(loaded) if accelerator is None else pipeline(loaded, accelerator)


def _gone(rows: Tensor) -> dict[str, Tensor]:
    raise DeviceLost(f"the device for these {len(rows)} rows is gone")


def _inputs(preprocessing: Preprocessing) -> tuple[TensorSpec, ...]:
    numbers = TensorSpec("input", "FP32", preprocessing.input_shape)
    if not preprocessing.accepts_pictures:
        return (numbers,)
    pixels = TensorSpec("pixels", "UINT8", preprocessing.raw_shape)
    return (numbers, TensorSpec("image", "BYTES", ()), pixels)


def _memory_bytes(loaded: LoadedVersion) -> int:
    """Of the weights, and of a second form's own."""
    networks = {id(one): one for one in (loaded.network, loaded.execution.form.network)}
    tensors = [
        tensor
        for network in networks.values()
        for tensor in (*network.parameters(), *network.buffers())
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
