"""One live version, ready to answer: preprocessing before the batcher, probabilities after it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from app.engine.batcher import Batcher, LaneOptions
from app.engine.decoding import Decoder
from app.engine.statistics import Statistics
from app.errors import BadInput, LoadFailed
from models.checkpoint import Checkpoint, Golden
from models.store import Version

# Largest change of a golden output, relative to the largest logit, in fp32 on any device.
GOLDEN_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that goes in or comes out; `shape` is without the batch dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one request.

    Attributes:
        logits: float32 `[n, classes]` on the CPU.
        probabilities: float32 `[n, classes]` on the CPU; rows sum to one.
        queue_ms: longest wait of one of its rows.
        compute_ms: time on the device of the batches that held its rows.
        batch_size: rows in the largest of these batches, others' included.
    """

    logits: Tensor
    probabilities: Tensor
    queue_ms: float
    compute_ms: float
    batch_size: int


class Predictor:
    """A loaded version. Nobody closes it: when the last request lets go of it, its memory is free.

    Args:
        version: where it comes from.
        checkpoint: loaded and verified.
        device: where it computes.
        batcher: of that device.
        decoder: shared by all models.
        options: of its lane in the batcher.

    Raises:
        LoadFailed: its golden inputs are not answered as they were when it was published.
    """

    def __init__(
        self,
        version: Version,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        batcher: Batcher,
        decoder: Decoder,
        options: LaneOptions,
    ) -> None:
        manifest = checkpoint.manifest
        self.name, self.version, self.manifest = version.name, version.number, manifest
        self.labels = manifest.labels
        self.loaded_at = time.time()
        self.input_shape = manifest.preprocessing.input_shape
        self.inputs = _inputs(self.input_shape, manifest.preprocessing.accepts_pictures)
        self.outputs = tuple(
            TensorSpec(name, "FP32", (len(self.labels),)) for name in ("logits", "probabilities")
        )
        self.statistics = Statistics()
        self._device = device
        self._network = checkpoint.network.to(device)
        self._decoder = decoder
        self._warm_up(checkpoint.golden)
        self._lane = batcher.open_lane(str(version), self._run, options)

    @property
    def accepts_pictures(self) -> bool:
        """Whether `decode` can be called."""
        return self.manifest.preprocessing.accepts_pictures

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights and buffers."""
        return _memory_bytes(self._network)

    async def decode(self, pictures: Sequence[bytes], deadline: float) -> Tensor:
        """Encoded pictures as this version's input; see `Decoder.decode`.

        Raises:
            BadInput: this version takes tensors only.
        """
        if not self.accepts_pictures:
            raise BadInput(f"{self.name} takes tensors of shape {list(self.input_shape)}")
        began = time.perf_counter_ns()
        batch = await self._decoder.decode(pictures, self.manifest.preprocessing, deadline)
        self.statistics.compute_input.add(time.perf_counter_ns() - began)
        return batch

    async def predict(self, batch: Tensor, deadline: float, priority: int = 0) -> Prediction:
        """Answer a batch.

        Args:
            batch: float32 `[n, *input_shape]` on the CPU, n at least 1.
            deadline: of `time.monotonic`, in seconds.
            priority: lower goes first.

        Raises:
            app.errors.QueueFull, DeadlineExceeded, ForwardFailed, DeviceLost: as named.
        """
        began = time.perf_counter_ns()
        try:
            answer = await self._lane.submit(batch, deadline=deadline, priority=priority)
        except BaseException:
            self.statistics.fail.add(time.perf_counter_ns() - began)
            raise
        self._count(answer.queue_ms, time.perf_counter_ns() - began)
        outputs = answer.outputs
        return Prediction(
            outputs["logits"],
            outputs["probabilities"],
            answer.queue_ms,
            answer.compute_ms,
            answer.batch_size,
        )

    def _run(self, batch: Tensor) -> dict[str, Tensor]:
        """On the device thread: `[n, *input_shape]` -> logits and probabilities on the CPU."""
        logits = self._network(batch.to(self._device, non_blocking=True)).float()
        return {"logits": logits.cpu(), "probabilities": torch.softmax(logits, 1).cpu()}

    def _count(self, queue_ms: float, total_ns: int) -> None:
        statistics = self.statistics
        statistics.success.add(total_ns)
        statistics.queue.add(int(queue_ms * 1e6))
        statistics.last_inference_ms = int(time.time() * 1000)

    def _warm_up(self, golden: Golden | None) -> None:
        """One forward, so that no request pays for the first; on the golden inputs if there are."""
        with torch.inference_mode():
            if golden is None:
                self._run(torch.zeros((1, *self.input_shape)))
                return
            inputs = self.manifest.preprocessing.finish(golden.inputs)
            outputs = self._run(inputs)["logits"]
        change = (outputs - golden.outputs).abs().max() / golden.outputs.abs().max().clamp_min(1e-6)
        if not change <= GOLDEN_TOLERANCE:  # a NaN is no change that can be tolerated
            raise LoadFailed(
                f"{self.name}:{self.version} answers its golden inputs differently: its outputs "
                f"moved by {float(change):.2g} of the largest, and {GOLDEN_TOLERANCE} is allowed"
            )


def _inputs(shape: tuple[int, ...], pictures: bool) -> tuple[TensorSpec, ...]:
    numbers = TensorSpec("input", "FP32", shape)
    return (numbers, TensorSpec("image", "BYTES", ())) if pictures else (numbers,)


def _memory_bytes(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
