"""One live version, ready to answer: decoding before the batcher, probabilities after it."""

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.decoding import Decoder
from app.engine.loading import LoadedVersion
from app.engine.statistics import Duration, Statistics
from app.errors import BadInput


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
    """

    logits: Tensor
    probabilities: Tensor
    queue_ms: float
    compute_ms: float
    batch_size: int


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
        self.inputs = _inputs(self.input_shape, self.accepts_pictures)
        self.outputs = tuple(
            TensorSpec(name, "FP32", (len(self.labels),)) for name in ("logits", "probabilities")
        )
        self.memory_bytes = _memory_bytes(loaded)
        self.decode_time = Duration()
        self.encode_time = Duration()  # kept by whoever writes the answers
        self.opened_at = time.time()
        self.answered_at = 0.0
        self._decoder = decoder
        # The lane must not know this object, or neither would ever be let go of.
        run = _forward(loaded)
        self.lane = batcher.open_lane(str(loaded.version), run, options, row_shape=self.input_shape)
        weakref.finalize(self, self.lane.let_go).atexit = False

    async def decode(self, pictures: Sequence[bytes], deadline: float) -> Tensor:
        """Encoded pictures as this version's input, float32 `[n, *input_shape]`.

        Raises:
            BadInput: this version takes tensors only. QueueFull, DeadlineUnreachable: its queue is
                too long already. Others as in `Decoder.decode`.
        """
        if not self.accepts_pictures:
            raise BadInput(f"{self.name} takes tensors of shape {list(self.input_shape)}")
        # Under overload most are refused, and their pictures would take the processors of the rest.
        self.lane.foresee(len(pictures), deadline)
        began = time.perf_counter_ns()
        batch = await self._decoder.decode(pictures, self.manifest.preprocessing, deadline)
        self.decode_time.add(time.perf_counter_ns() - began)
        return batch

    async def predict(self, batch: Tensor, deadline: float, priority: int = 0) -> Prediction:
        """Answer a batch.

        Args:
            batch: float32 `[n, *input_shape]` on the CPU, n at least 1.
            deadline: of `time.monotonic`, in seconds.
            priority: smaller is sooner.

        Raises:
            As `Lane.submit`: app.errors.QueueFull, DeadlineExceeded, ForwardFailed, DeviceLost.
        """
        answer = await self.lane.submit(batch, deadline, priority)
        self.answered_at = time.time()
        outputs = answer.outputs
        assert isinstance(outputs, dict)  # what `_forward` returns
        return Prediction(
            outputs["logits"],
            outputs["probabilities"],
            answer.queue_ms,
            answer.compute_ms,
            answer.batch_size,
        )

    @property
    def loaded_as(self) -> "Predictor":
        """The predictor of the version itself; another object where requests are shadowed."""
        return self

    @property
    def used_at(self) -> float:
        """When it last answered, or became live; of `time.time`, in seconds."""
        return max(self.answered_at, self.opened_at)

    def forget_warm_up(self) -> None:
        """Count anew: what was answered so far was nobody's request."""
        self.lane.forget_statistics()
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


def _forward(loaded: LoadedVersion) -> Callable[[Tensor], dict[str, Tensor]]:
    """Logits and probabilities on the CPU; the manifest's temperature sharpens or softens these."""
    execution, device = loaded.execution, loaded.device
    temperature = loaded.manifest.temperature or 1.0

    def run(batch: Tensor) -> dict[str, Tensor]:
        logits = execution(batch)
        scaled = logits if temperature == 1.0 else logits / temperature
        return {"logits": logits, "probabilities": torch.softmax(scaled, 1)}

    def run_there(batch: Tensor) -> dict[str, Tensor]:
        answers = run(batch.to(device, non_blocking=True))
        return {name: answer.float().cpu() for name, answer in answers.items()}

    return run if device.type == "cpu" else run_there


def _inputs(shape: tuple[int, ...], pictures: bool) -> tuple[TensorSpec, ...]:
    numbers = TensorSpec("input", "FP32", shape)
    return (numbers, TensorSpec("image", "BYTES", ())) if pictures else (numbers,)


def _memory_bytes(loaded: LoadedVersion) -> int:
    """Of the weights, and of a second form's own."""
    networks = {id(one): one for one in (loaded.network, loaded.execution.form.network)}
    tensors = [
        tensor
        for network in networks.values()
        for tensor in (*network.parameters(), *network.buffers())
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
