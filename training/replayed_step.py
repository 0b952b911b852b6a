"""A training step recorded once and replayed: small networks wait for what surrounds the kernels.

On a GPU, the first steps run eagerly on the stream that will record; then one is recorded as a CUDA
graph, which computes nothing, and replayed, which does. On a processor, the calls of eager steps
are noted on tapes. What cannot be recorded goes on eagerly.
"""

import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from training.optim import Optimizer
from training.tape import Tape

log = logging.getLogger(__name__)

NUM_WARM_UPS: Final = 3
# On a GPU recording takes some tenths of a second, on a processor some hundredths; either saves
# less than a millisecond a step.
LEAST_STEPS: Final = {"cuda": 500, "cpu": 150}
# The 0.15 ms that a replay saves on a processor are nothing to a longer step, and a tape holds all
# that a step computes until its end.
LONGEST_FIRST_STEP_S: Final = 0.1

# Inputs, targets and the learning rate of one step to its loss and logits.
Change: TypeAlias = Callable[[Tensor, Tensor, "float | Tensor"], tuple[Tensor, Tensor]]


class Replay(Protocol):
    """A recorded step."""

    def __call__(self, x: Tensor, targets: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Do it with these; loss and logits are good until the next call."""


class Recorder(Protocol):
    """What a device records with."""

    def eagerly(
        self, change: Change, x: Tensor, targets: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """One step as it is."""

    def record(self, change: Change, x: Tensor, targets: Tensor) -> Replay:
        """Without doing it; raises RuntimeError where it cannot be recorded."""


class CudaRecorder:
    """Of a GPU: one stream for warm-up and recording, replays on the caller's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def eagerly(
        self, change: Change, x: Tensor, targets: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """On the side, and in order with what the caller does before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Copies of its own: memory of one stream must not be freed while another reads it.
            loss, logits = change(x.clone(), targets.clone(), learning_rate)
        current.wait_stream(self._stream)
        return loss.clone(), logits.clone()

    def record(self, change: Change, x: Tensor, targets: Tensor) -> Replay:
        """Into a private pool, which holds the gradients too."""
        inputs, labels = x.clone(), targets.clone()
        rate = torch.zeros((), device=self._device)
        graph = torch.cuda.CUDAGraph()
        # The stream also around the recording: where that fails, older versions of torch leave
        # it behind as the current one.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, stream=self._stream),
        ):
            loss, logits = change(inputs, labels, rate)

        def replay(x: Tensor, targets: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
            inputs.copy_(x)
            labels.copy_(targets)
            rate.fill_(learning_rate)
            graph.replay()
            return loss, logits

        return replay


@dataclass(frozen=True)
class _Noted:
    """A step on a tape: how its inputs lay, its loss and logits, and whether others drew lots."""

    tape: Tape
    strides: tuple[int, ...]
    answers: tuple[Tensor, Tensor]
    drew: bool


class ProcessorRecorder:
    """Of a processor: the last two eager steps are noted, and were alike if replays may follow.

    A network that goes another way in a later step, by a counter of its own, is not noticed; nor is
    it on a GPU.
    """

    def __init__(self) -> None:
        self._rate = torch.zeros((), dtype=torch.float64)
        self._first_step_s: float | None = None
        self._noted: list[_Noted] = []

    def eagerly(
        self, change: Change, x: Tensor, targets: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """The first step as it is; the others noted, unless that one took long."""
        if self._first_step_s is None:
            began = time.perf_counter()
            answers = change(x, targets, learning_rate)
            self._first_step_s = time.perf_counter() - began
            return answers
        if self._first_step_s > LONGEST_FIRST_STEP_S:
            return change(x, targets, learning_rate)
        self._rate.fill_(learning_rate)
        tape, lots = Tape((x, targets, self._rate)), _lots()
        with tape:
            answers = change(x, targets, self._rate)
        self._noted.append(_Noted(tape, x.stride(), answers, drew=lots != _lots()))
        return answers

    def record(self, change: Change, x: Tensor, targets: Tensor) -> Replay:
        """From the tapes of the steps before, which are let go."""
        del change, x, targets
        noted, self._noted = self._noted[-2:], []
        if len(noted) < 2:
            raise RuntimeError("it takes so long that a replay would save little")
        before, last = noted
        if last.drew or not last.tape.agrees_with(before.tape):
            raise RuntimeError("another step may be other calls, or the same on other memory")
        repeat, rate, strides = last.tape.repeated(last.answers), self._rate, last.strides

        def replay(x: Tensor, targets: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
            if x.stride() != strides:  # which operations there are may depend on it
                x = torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
            rate.fill_(learning_rate)
            loss, logits = repeat(x, targets, rate)
            return loss, logits

        return replay


def _lots() -> object:
    """Where the generators are that Python decides by; torch's are set before each step."""
    return random.getstate(), np.random.get_state(legacy=False)["state"]["pos"]


class ReplayedStep:
    """`change`, replayed from its fourth call on.

    Args:
        num_rows: of the batches that are replayed; others, such as an epoch's last, run eagerly.
    """

    def __init__(
        self, change: Change, optimizer: Optimizer, recorder: Recorder, num_rows: int
    ) -> None:
        self.replay: Replay | None = None
        self._change, self._optimizer, self._recorder = change, optimizer, recorder
        self._num_rows = num_rows
        self._num_eager = 0
        self._is_refused = False

    def __call__(self, x: Tensor, targets: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
        """One change of the weights: its loss and logits, which stay as they are."""
        if len(x) != self._num_rows or self._is_refused:
            return self._change(x, targets, learning_rate)
        if self.replay is None and self._num_eager < NUM_WARM_UPS:
            self._num_eager += 1
            return self._recorder.eagerly(self._change, x, targets, learning_rate)
        num_steps = self._optimizer.steps
        if self.replay is None:
            self.replay = self._recorded(x, targets)
            self._optimizer.steps = num_steps
        if self.replay is None:
            return self._change(x, targets, learning_rate)
        loss, logits = self.replay(x, targets, learning_rate)
        # A replay changes the weights and the counter on the device, and knows nothing of ours.
        self._optimizer.steps = num_steps + 1
        return loss.clone(), logits.clone()

    def _recorded(self, x: Tensor, targets: Tensor) -> Replay | None:
        try:
            self._optimizer.zero_grad()  # so that the gradients lie where the graph writes them
            return self._recorder.record(self._change, x, targets)
        except RuntimeError as error:
            self._is_refused = True
            log.info("the step is not recorded: %s", " ".join(str(error).split())[:200])
            return None


def recorder_for(device: torch.device, num_steps: int) -> Recorder | None:
    """What records on `device`, where so many steps are enough to pay for it."""
    if num_steps < LEAST_STEPS.get(device.type, math.inf):
        return None
    return CudaRecorder(device) if device.type == "cuda" else ProcessorRecorder()
