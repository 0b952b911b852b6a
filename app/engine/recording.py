"""A forward recorded as a CUDA graph: one launch instead of hundreds, for one batch size.

Recorded once, it reads from and writes to the same memory each time it is replayed.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import torch
from torch import Tensor

from app.engine.streams import CudaStreams

# Rows on the device, as they were sent, to named tensors of as many rows.
Respond: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]

# What is set up at a first call, and what tries several algorithms, must be over by then.
NUM_WARM_UPS: Final = 3
# One recording at a time in the whole process, and nobody gives memory back meanwhile: both are
# torch's rules.
RECORDING = threading.Lock()


class Recording(Protocol):
    """What was recorded: fill `inputs`, replay, read `outputs`."""

    @property
    def inputs(self) -> Tensor:
        """What it reads."""

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """What it writes."""

    def replay(self) -> None:
        """Enqueue it on the current stream."""


# Makes recordings; all of one recorder share memory, so they are never replayed at the same time.
Recorder: TypeAlias = Callable[[Respond, Tensor], Recording]


@dataclass(frozen=True, slots=True, eq=False)
class CudaRecording:
    """A graph with the memory that it knows."""

    inputs: Tensor
    outputs: Mapping[str, Tensor]
    graph: Any

    def replay(self) -> None:
        """Enqueue it on the current stream."""
        self.graph.replay()


class CudaRecorder:
    """Records for one model: its graphs share one private pool, which goes with the last of them.

    Sharing is safe because outputs are copied away before the next replay, on the same stream, and
    inputs lie outside the pool.
    """

    def __init__(self, device: torch.device, streams: CudaStreams) -> None:
        self._device = device
        self._stream = streams.compute
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, respond: Respond, rows: Tensor) -> CudaRecording:
        """Record `respond` for as many rows as there are; on the device thread.

        Args:
            rows: on the device; kept as the graph's inputs.

        Raises:
            RuntimeError: something in it cannot be recorded, or memory ran out.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with (
            RECORDING,
            torch.cuda.device(self._device),
            # Also around the recording: where that fails, older versions of torch leave its
            # stream behind as the current one.
            torch.cuda.stream(self._stream),
            torch.inference_mode(),
        ):
            inputs = rows.clone()
            for _ in range(NUM_WARM_UPS):
                respond(inputs)
            # Other threads may load a version meanwhile: only this one must keep the rules.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = respond(inputs)
        current.wait_stream(self._stream)
        return CudaRecording(inputs, dict(outputs), graph)
