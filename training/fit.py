"""The training loop: a generator of Progress that ends with the best weights.

The whole state of a run is a step number and tensors, because order, augmentation and dropout are
functions of the seed and the step. Stopping at any yield and resuming from the snapshot therefore
gives the same bits as never stopping, on the same processor type, thread count and versions.
"""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.device import choose_device, supports_bf16
from training.augment import augmentation
from training.average import Average
from training.config import FitConfig
from training.datasets import Dataset
from training.feed import feed_for, finished_ahead
from training.layout import laid_out, layout_of
from training.mixing import mixed
from training.optim import learning_rate_at, optimizer_for, parameter_groups
from training.order import Batch, Order
from training.pace import Pace
from training.progress import Progress
from training.randomness import seed_device, seed_for
from training.replayed_step import ReplayedStep, recorder_for
from training.snapshot import Snapshot, Snapshots
from training.source import Part
from training.state import Epoch, State
from training.validation import validate

LONGEST_SILENCE_S = 0.1
"""The loop yields at least this often, or every step where one takes longer."""


def never() -> bool:
    """Nobody asks a run to stop."""
    return False


class LossNotFinite(Exception):
    """The loss became infinite or no number; the sentence names the step."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
        network: holds the best weights, in `eval()`, on the device where it was trained.
        best: the epoch whose weights these are: the best by validation accuracy, then by loss,
            or the last one where there is no validation part.
        history: every epoch.
        seconds: spent in training and validation, over all attempts.
        stopped_early: whether validation had stopped improving.
        notes: what a person should know, such as a resumption on other versions.
    """

    network: nn.Module
    best: Epoch
    history: tuple[Epoch, ...]
    seconds: float
    stopped_early: bool
    notes: tuple[str, ...]


def fit(
    network: nn.Module,
    dataset: Dataset,
    config: FitConfig,
    *,
    snapshots: Path | None = None,
    train_mode: Callable[[nn.Module], object] = nn.Module.train,
    scale_of: Callable[[str], float] | None = None,
    stop: Callable[[], bool] = never,
) -> Generator[Progress, None, FitResult]:
    """Train `network` on `dataset`.

    Args:
        network: changed in place; moved to the device that `config` names.
        dataset: its training part is learned, its validation part chooses the best weights.
        config: everything that can be set.
        snapshots: a folder of this run's own. A snapshot there is resumed from; snapshots are
            written there every so often, at the end, and when the generator is closed.
        train_mode: puts the network into training mode; replaced where a part of it stays frozen.
        scale_of: a parameter's name to the factor of its learning rate.
        stop: asked after every step; once it says yes, the weights of that moment are validated
            and the run ends with the best ones.

    Yields:
        Phase `train`: the loss every `report_every` steps and signs of life in between; phase
        `validate`: samples done; phase `epoch`: loss and accuracy on the validation part.

    Raises:
        LossNotFinite: training diverged.
        SnapshotMismatch: the folder's snapshots belong to another run.
        models.device.DeviceUnavailable: there is no such device.
    """
    run = _Run(network, dataset, config, train_mode, scale_of, stop)
    store = Snapshots(snapshots) if snapshots else None
    snapshot = store.newest() if store else None
    with _repeatable(run.device, _threads(config, snapshot), config.determinism):
        run.resume(snapshot)
        try:
            for progress in run.loop():
                yield progress
                run.save_if_due(store)
        except GeneratorExit:
            run.save(store)
            raise
        run.save(store)
    return run.result()


class _Run:
    """One run: what it is made of, and the steps that change its state."""

    def __init__(
        self,
        network: nn.Module,
        dataset: Dataset,
        config: FitConfig,
        train_mode: Callable[[nn.Module], object],
        scale_of: Callable[[str], float] | None,
        stop: Callable[[], bool],
    ) -> None:
        self.stop, self.is_stopped = stop, False
        self.config, self.dataset, self.train_mode = config, dataset, train_mode
        self.device = choose_device(config.device)
        self.layout = layout_of(network)
        network = network.to(self.device).to(memory_format=self.layout)
        groups = parameter_groups(network, config.weight_decay, scale_of)
        self.parameters = [parameter for group in groups for parameter in group.parameters]
        average = Average(network, config.ema_decay) if config.ema_decay else None
        self.state = State(network, optimizer_for(config, groups), average)
        self.augment = augmentation(config.augment, config.seed)
        self.autocast = _autocast(config, self.device)
        self.order = Order(len(dataset.train), config.batch_size, config.epochs, config.seed)
        self.pace = Pace(self.order.num_steps)
        self.last = Progress("train", 0, self.order.num_steps, num_epochs=config.epochs)
        train, self.finish_train = _train_part(
            dataset, self.device, is_changed=self.augment is not None
        )
        held_out, num_workers = dataset.validation, dataset.num_workers
        self.finish = dataset.preprocessing.finisher(self.device)
        self.feed = feed_for(train, self.device, num_workers)
        self.validation = feed_for(held_out, self.device, num_workers) if held_out else None
        self.weights = _class_weights(dataset, config, self.device)
        self.change: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = self._change
        self.notes: tuple[str, ...] = ()

    def resume(self, snapshot: Snapshot | None) -> None:
        """Go on from `snapshot`, if there is one."""
        if snapshot:
            fingerprint = self.dataset.fingerprint
            self.notes = self.state.restore(snapshot, self.config, fingerprint)
            self.state.unreported = [loss.to(self.device) for loss in self.state.unreported]
        recorder = recorder_for(self.device, self.order.num_steps - self.state.step)
        if recorder is not None:
            optimizer, num_rows = self.state.optimizer, self.config.batch_size
            self.change = ReplayedStep(self._change, optimizer, recorder, num_rows)
        self.pace.start(self.state.step, self.state.seconds)

    def loop(self) -> Iterator[Progress]:
        """Train and validate, epoch by epoch, until the last or until it no longer helps."""
        with closing(self.feed(self.order.batches(self.state.step))) as batches:
            while not self.is_over:
                self.train_mode(self.state.network)
                yield from self._train_epoch(batches)
                yield from self._end_epoch()

    @property
    def is_over(self) -> bool:
        """Whether there is no epoch to come."""
        history = self.state.history
        asked = bool(history) and (self.is_stopped or self.stop())
        return len(history) >= self.config.epochs or self.stopped_early or asked

    @property
    def stopped_early(self) -> bool:
        """Whether the best epoch lies further back than `early_stopping` allows."""
        patience, best, history = self.config.early_stopping, self.state.best, self.state.history
        return bool(patience and best and len(history) - best.epoch >= patience)

    def save_if_due(self, store: Snapshots | None) -> None:
        """Write a snapshot if the last one is old."""
        if store and self.pace.is_due("snapshot", self.config.snapshot_seconds):
            self.save(store)

    def save(self, store: Snapshots | None) -> None:
        """Write a snapshot, unless the run has already diverged."""
        if store and all(math.isfinite(loss) for loss in _numbers(self.state.unreported)):
            self.state.seconds = self.pace.seconds
            snapshot = self.state.snapshot(self.config, self.dataset.fingerprint)
            store.save(self.state.step, snapshot)

    def result(self) -> FitResult:
        """The best weights, put into the network that was given."""
        state = self.state
        if state.best is None:
            raise RuntimeError("a run that ends has finished an epoch")
        state.network.load_state_dict(state.best_weights)
        network = state.network.eval()
        stopped = len(state.history) < self.config.epochs
        return FitResult(
            network, state.best, tuple(state.history), self.pace.seconds, stopped, self.notes
        )

    def _train_epoch(self, batches: Iterator[tuple[Batch, Tensor, Tensor]]) -> Iterator[Progress]:
        end = self.order.steps_per_epoch * (len(self.state.history) + 1)
        while self.state.step < end:
            batch, inputs, targets = next(batches)
            logits = self._step(batch, inputs, targets)
            self.pace.did(len(targets))
            if self.state.step % self.config.report_every == 0 or self.state.step == end:
                yield self._report(batch, logits, targets)
            elif self.pace.is_due("yield", LONGEST_SILENCE_S):
                yield self._progress(batch)
            if self.state.step < end and self.stop():
                self.is_stopped = True
                yield self._report(batch, logits, targets)
                return

    def _step(self, batch: Batch, inputs: Tensor, targets: Tensor) -> Tensor:
        """One change of the weights; the loss stays on the device, nothing waits for it."""
        state, config = self.state, self.config
        seed_device(self.device, seed_for(config.seed, "step", step=batch.step))
        if self.augment:
            inputs = self.augment(inputs, batch.epoch, batch.indices)
        x, others, share = self.finish_train(inputs), targets, 1.0
        if config.mixup or config.cutmix:
            x, others, share = mixed(
                x, targets, config.mixup, config.cutmix, config.seed, batch.step
            )
        rate = self._learning_rate(batch.step)
        if share < 1:
            loss, logits = self._change(x, targets, rate, (others, share))
        else:
            loss, logits = self.change(x, targets, rate)
        state.step += 1
        if state.average:
            state.average.update(state.network, state.step)
        state.unreported.append(loss)
        return logits

    def _change(
        self,
        x: Tensor,
        targets: Tensor,
        learning_rate: float | Tensor,
        mix: tuple[Tensor, float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Forward, backward and one change of the weights: its loss and logits.

        Args:
            mix: targets of what was mixed in, and the share of the sample itself.
        """
        state = self.state
        with self.autocast():
            logits = state.network(laid_out(x, self.layout))
        loss = self._loss(logits, targets)
        if mix is not None:
            others, share = mix
            loss = share * loss + (1 - share) * self._loss(logits, others)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        state.optimizer.step(learning_rate)
        return loss.detach(), logits.detach()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch; a sample counts as much as its class weighs."""
        smoothing, logits = self.config.label_smoothing, logits.float()
        if self.weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        each = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        return (each * self.weights[targets]).mean()

    def _report(self, batch: Batch, logits: Tensor, targets: Tensor) -> Progress:
        """Bring the losses since the last report off the device, all at once."""
        losses = _numbers(self.state.unreported)
        first_step = self.state.step - len(losses) + 1
        for step, loss in enumerate(losses, start=first_step):
            if not math.isfinite(loss):
                raise LossNotFinite(self._advice(step, loss))
            self.state.epoch_loss += loss
        self.state.unreported.clear()
        self.last = replace(
            self.last,
            loss=sum(losses) / len(losses) if losses else self.last.loss,
            accuracy=float((logits.argmax(1) == targets).float().mean()),
            images_per_second=self.pace.images_per_second(),
        )
        return self._progress(batch)

    def _progress(self, batch: Batch) -> Progress:
        return replace(
            self.last,
            step=self.state.step,
            epoch=batch.epoch + 1,
            learning_rate=self._learning_rate(batch.step),
            seconds_left=self.pace.seconds_left,
        )

    def _end_epoch(self) -> Iterator[Progress]:
        """Validate, keep the weights if they are the best, and write the epoch down."""
        state, number = self.state, len(self.state.history) + 1
        num_steps = state.step - self.order.steps_per_epoch * (number - 1)
        record = Epoch(number, state.step, state.epoch_loss / num_steps)
        if self.validation and self.dataset.validation:
            num_samples = len(self.dataset.validation)
            state.answering.eval()
            loss, accuracy = yield from validate(self._predict, self.validation, num_samples)
            record = replace(record, validation_loss=loss, validation_accuracy=accuracy)
        state.epoch_loss = 0.0
        state.keep_best(record)
        yield Progress(
            "epoch",
            state.step,
            self.order.num_steps,
            epoch=number,
            num_epochs=self.config.epochs,
            loss=record.validation_loss,
            accuracy=record.validation_accuracy,
            metrics={"train_loss": record.loss},
        )

    def _predict(self, inputs: Tensor) -> Tensor:
        x = laid_out(self.finish(inputs), self.layout)
        with self.autocast():
            logits: Tensor = self.state.answering(x)
        return logits

    def _learning_rate(self, step: int) -> float:
        return learning_rate_at(self.config, step, self.order.num_steps)

    def _advice(self, step: int, loss: float) -> str:
        return (
            f"the loss of step {step} (epoch {(step - 1) // self.order.steps_per_epoch + 1}) is "
            f"{loss}; lower --lr, which is {self.config.learning_rate:g}, or set --gradient-clip"
        )


def _numbers(losses: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack(losses).tolist() if losses else []
    return numbers


def _train_part(
    dataset: Dataset, device: torch.device, *, is_changed: bool
) -> tuple[Part, Callable[[Tensor], Tensor]]:
    """The training samples and how they are finished: now, unless each epoch changes them."""
    if is_changed:
        return dataset.train, dataset.preprocessing.finisher(device)
    part, finish = finished_ahead(dataset.train, dataset.preprocessing.finish)
    return part, finish if part is not dataset.train else dataset.preprocessing.finisher(device)


def _class_weights(dataset: Dataset, config: FitConfig, device: torch.device) -> Tensor | None:
    """float32 `[classes]`, with a mean of 1 over the training samples; None where all are 1."""
    if config.class_weights == "none":
        return None
    counts = dataset.train.targets.bincount(minlength=len(dataset.classes)).float()
    present = int((counts > 0).sum())
    return (counts.sum() / (present * counts.clamp(min=1))).to(device)


def _autocast(config: FitConfig, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """bf16 where it is wanted; `auto` wants it on GPUs, whose hardware has it.

    On a CPU `auto` stays with fp32: the result would otherwise depend on the processor type.
    """
    automatic = device.type == "cuda" and supports_bf16(device)
    if config.precision == "bf16" or (config.precision == "auto" and automatic):
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return nullcontext


def _threads(config: FitConfig, snapshot: Snapshot | None) -> int:
    """As many as wanted, or as the run had before, or as this process has: sums depend on it."""
    before = int(snapshot.state["environment"]["threads"]) if snapshot else 0
    return config.threads or before or torch.get_num_threads()


@contextmanager
def _repeatable(device: torch.device, threads: int, determinism: str) -> Iterator[None]:
    """This many threads and cuDNN's repeatable algorithms while a run lasts; if it must be
    exact, operations that have no repeatable form are refused.
    """
    cudnn, mode = torch.backends.cudnn, torch.get_deterministic_debug_mode()
    before = cudnn.deterministic, cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(threads)
    if device.type == "cuda":
        cudnn.deterministic, cudnn.benchmark = True, False
    if determinism == "exact" or (determinism == "auto" and device.type == "cpu"):
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before[:2]
        torch.set_num_threads(before[2])
        torch.set_deterministic_debug_mode(mode)
