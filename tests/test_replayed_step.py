"""A recorded step changes the weights as an eager one does, and counts as one."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from test_fit import config, fresh, opened, small_cnn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import training.stepper
from training.fit import fit
from training.progress import drive
from training.replayed_step import (
    LEAST_STEPS,
    Change,
    ProcessorRecorder,
    ReplayedStep,
    recorder_for,
)


class Recorder:
    """Records as a GPU does: without doing it, into fixed memory, with a tensor as the rate."""

    def __init__(self, *_: object) -> None:
        self.num_replays = self.num_eager = 0
        self.refuses = False

    def eagerly(
        self, change: Change, x: Tensor, targets: Tensor, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        self.num_eager += 1
        return change(x, targets, learning_rate)

    def record(
        self, change: Change, x: Tensor, targets: Tensor
    ) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        inputs, labels, rate = x.clone(), targets.clone(), torch.zeros(())

        def replay(x: Tensor, targets: Tensor, learning_rate: float) -> tuple[Tensor, Tensor]:
            self.num_replays += 1
            inputs.copy_(x)
            labels.copy_(targets)
            rate.fill_(learning_rate)
            return change(inputs, labels, rate)

        return replay


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[ReplayedStep]:
    """Every replayed step that the test makes."""
    made: list[ReplayedStep] = []
    make = ReplayedStep.__init__
    monkeypatch.setattr(
        ReplayedStep, "__init__", lambda self, *rest: (made.append(self), make(self, *rest))[1]
    )
    return made


def weights_of(**options: object) -> tuple[list[Tensor], list[float]]:
    settings = config(**options)
    fitted = drive(fit(small_cnn(), opened(settings), settings))
    return list(fitted.network.parameters()), [one.loss for one in fitted.history]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("refuses", [False, True])
def test_a_run_ends_alike_whether_its_steps_are_replayed(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, refuses: bool
) -> None:
    eager, losses = weights_of(optimizer=optimizer, epochs=3)
    recorder = Recorder()
    recorder.refuses = refuses
    monkeypatch.setattr(training.stepper, "recorder_for", lambda *_: recorder)
    replayed, others = weights_of(optimizer=optimizer, epochs=3)
    assert (recorder.num_replays > 0) is not refuses
    assert recorder.num_eager == 3
    for one, other in zip(eager, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert losses == pytest.approx(others, rel=1e-5)


def test_short_runs_record_nothing() -> None:
    assert recorder_for(torch.device("cpu"), 10) is None
    assert recorder_for(torch.device("cuda"), 10) is None


class Changing(nn.Module):
    """One layer more in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.num_calls = nn.Linear(64, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        found: Tensor = self.layer(x.flatten(1))
        return found.relu() if self.num_calls % 2 else found


class Drawing(nn.Linear):
    """Could leave its layer out, by a lot that torch knows nothing of."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x.flatten(1))
        return found if random.random() < 2 else found * 0


NETWORKS = {
    "cnn": small_cnn,
    "mlp": partial(fresh, dropout=0.3),
    "changing": Changing,
    "drawing": partial(Drawing, 64, 2),
}
SETTINGS = [
    {"optimizer": "sgd", "nesterov": True, "schedule": "one-cycle"},
    {"gradient_clip": 1.0, "class_weights": "balanced", "weight_decay": 0.1, "precision": "bf16"},
    {"augment": "digits", "ema_decay": 0.9, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_replays_on_a_processor_have_the_bits_of_eager_steps(
    monkeypatch: pytest.MonkeyPatch,
    replays: list[ReplayedStep],
    network: str,
    options: dict[str, Any],
) -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        settings = config(epochs=4, **options)
        return [
            *drive(fit(NETWORKS[network](), opened(settings, 44), settings)).network.parameters()
        ]

    eager = weights()
    monkeypatch.setitem(LEAST_STEPS, "cpu", 1)
    replayed = weights()
    assert (replays[-1].replay is None) is (network in ("changing", "drawing"))
    assert all(torch.equal(one, other) for one, other in zip(eager, replayed, strict=True))


def test_long_steps_are_not_recorded(
    monkeypatch: pytest.MonkeyPatch, replays: list[ReplayedStep]
) -> None:
    monkeypatch.setitem(LEAST_STEPS, "cpu", 1)
    monkeypatch.setattr("training.replayed_step.LONGEST_FIRST_STEP_S", 0.0)
    weights_of()
    assert replays[-1].replay is None


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_on_a_gpu_too(
    monkeypatch: pytest.MonkeyPatch, replays: list[ReplayedStep], optimizer: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    options = {"optimizer": optimizer, "epochs": 3, "device": "cuda", "precision": "fp32"}
    eager, losses = weights_of(**options)
    monkeypatch.setitem(LEAST_STEPS, "cuda", 1)
    replayed, others = weights_of(**options)
    assert replays[-1].replay is not None
    assert losses == pytest.approx(others, rel=1e-3)
    for one, other in zip(eager, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers that are brought to Python."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        self.num += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def steps_of(**options: object) -> Iterator[Callable[[], None]]:
    """Every step of a short run, still to be done."""
    settings = config(**options)
    stepper = training.stepper.Stepper(
        small_cnn(), opened(settings), settings, torch.nn.Module.train
    )
    stepper.may_record(stepper.order.num_steps)
    stepper.train()
    for batch, inputs, targets in stepper.batches():
        yield partial(stepper.step, batch, inputs, targets)


EVERYTHING = [
    {"optimizer": "sgd"},
    {"optimizer": "adamw", "gradient_clip": 1.0, "class_weights": "balanced"},
    {"augment": "digits", "ema_decay": 0.9, "label_smoothing": 0.1},
    {"mixup": 0.2, "cutmix": 1.0},
]


@pytest.mark.parametrize("options", EVERYTHING)
def test_no_step_brings_a_number_to_python(options: dict[str, object]) -> None:
    waits = Waits()
    for step in steps_of(**options):
        with waits:
            step()
    assert waits.num == 0
    with waits:
        torch.ones(1).item()
    assert waits.num == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("options", EVERYTHING)
def test_no_step_waits_for_the_device(options: dict[str, object]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    for number, step in enumerate(steps_of(**options, device="cuda")):
        # Some things are set up in a first step.
        torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_batch_that_lies_in_memory_otherwise_is_replayed_alike() -> None:
    layer, recorder = nn.Linear(8, 2), ProcessorRecorder()

    def change(x: Tensor, targets: Tensor, learning_rate: float | Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            layer.weight.mul_(1 - learning_rate)
            logits = layer(x.reshape(3, 8))  # a view, or a copy where it lies otherwise
        return nn.functional.cross_entropy(logits, targets), logits

    x, targets = torch.randn(6, 4), torch.zeros(3, dtype=torch.int64)
    for _ in range(3):
        recorder.eagerly(change, x, targets, 0.1)
    replay, before = recorder.record(change, x, targets), layer.weight.clone()
    loss, logits = replay(x.t().contiguous().t(), targets, 0.5)
    torch.testing.assert_close(layer.weight, before / 2)
    torch.testing.assert_close((loss, logits), change(x, targets, 0.0))
