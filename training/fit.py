"""The training loop: a generator of Progress that ends with the best weights.

The whole state of a run is a step number and tensors, because order, augmentation and dropout are
functions of the seed and the step. Stopping at any yield and resuming from the snapshot therefore
gives the same bits as never stopping, on the same processor type, thread count and versions.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.manifest import NetworkSpec
from training.config import FitConfig
from training.datasets import Dataset
from training.feed import Fed, feed_for
from training.layout import laid_out
from training.order import Batch
from training.pace import Pace
from training.progress import Progress
from training.ranks import Ranks, threads_each
from training.snapshot import Snapshot, Snapshots
from training.source import TRAIN
from training.state import PROCESSES, Epoch, environment
from training.stepper import Stepper, TrainMode, repeatable
from training.task import Task, name_of_mode
from training.validation import validate

LONGEST_SILENCE_S = 0.1
"""The loop yields at least this often, or every step where one takes longer."""


def never() -> bool:
    """Nobody asks a run to stop."""
    return False


class LossNotFinite(Exception):
    """The loss became infinite or no number; the sentence names the step."""


@dataclass(frozen=True)
class Team:
    """Who shares the steps of a run, and how they build its network."""

    ranks: Ranks
    spec: NetworkSpec


def team_of(ranks: Ranks | None, spec: NetworkSpec) -> Team | None:
    """`ranks` for a network, if there are any."""
    return Team(ranks, spec) if ranks else None


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
        environment: what its bits depend on besides the seed: versions, processor, threads of
            each process, and how many processes shared each step.
    """

    network: nn.Module
    best: Epoch
    history: tuple[Epoch, ...]
    seconds: float
    stopped_early: bool
    notes: tuple[str, ...]
    environment: Mapping[str, str]


def fit(
    network: nn.Module,
    dataset: Dataset,
    config: FitConfig,
    *,
    snapshots: Path | None = None,
    train_mode: TrainMode = nn.Module.train,
    scale_of: Callable[[str], float] | None = None,
    stop: Callable[[], bool] = never,
    last_epoch: int = 0,
    team: Team | None = None,
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
        last_epoch: where to end on a schedule of more epochs; 0 is after all of them.
        team: other processes that take a share of each step; none where not given.

    Yields:
        Phase `train`: the loss every `report_every` steps and signs of life in between; phase
        `validate`: samples done; phase `epoch`: loss and accuracy on the validation part.

    Raises:
        LossNotFinite: training diverged.
        SnapshotMismatch: the folder's snapshots belong to another run.
        models.device.DeviceUnavailable: there is no such device.
        training.ranks.RankFailed, training.ranks.RankLost, training.task.Unshareable: of a team.
    """
    ranks = team.ranks if team else None
    exchange = ranks.exchange if ranks else None
    stepper = Stepper(network, dataset, config, train_mode, scale_of, exchange)
    run = _Run(stepper, dataset, stop, ranks)
    run.last_epoch = last_epoch or config.epochs
    store = Snapshots(snapshots) if snapshots else None
    snapshot = store.newest() if store else None
    threads = _threads(config, snapshot, run.num_ranks)
    with repeatable(stepper.device, threads, config.determinism):
        run.resume(snapshot)
        with _sharing(run, team, scale_of, threads):
            try:
                for progress in run.loop():
                    yield progress
                    run.save_if_due(store)
            except GeneratorExit:
                run.save(store)
                raise
        run.save(store)
        return run.result()


@contextmanager
def _sharing(
    run: "_Run", team: Team | None, scale_of: Callable[[str], float] | None, threads: int
) -> Iterator[None]:
    """With the other ranks ready for the next step, and told that there is none after the last."""
    if team is None or run.is_over:
        yield
        return
    team.ranks.begin(run.task(team.spec, scale_of, threads), run.stepper.device)
    try:
        yield
    except GeneratorExit:
        team.ranks.end()
        raise
    team.ranks.end()


class _Run:
    """One run: what it is made of, and the steps that change its state."""

    def __init__(
        self, stepper: Stepper, dataset: Dataset, stop: Callable[[], bool], ranks: Ranks | None
    ) -> None:
        self.stepper, self.dataset, self.ranks = stepper, dataset, ranks
        self.stop, self.is_stopped = stop, False
        self.config, self.state, self.order = stepper.config, stepper.state, stepper.order
        self.pace = Pace(self.order.num_steps)
        self.last = Progress("train", 0, self.order.num_steps, num_epochs=self.config.epochs)
        held_out, device, workers = dataset.validation, stepper.device, dataset.num_workers
        finish = dataset.preprocessing.finisher(device)
        self.validation = feed_for(held_out, device, workers, finish) if held_out else None
        self.notes: tuple[str, ...] = ()
        self.last_epoch = self.config.epochs

    @property
    def num_ranks(self) -> int:
        """Processes that share each step."""
        return self.ranks.num_ranks if self.ranks else 1

    def resume(self, snapshot: Snapshot | None) -> None:
        """Go on from `snapshot`, if there is one."""
        if snapshot:
            fingerprint, device = self.dataset.fingerprint, self.stepper.device
            self.notes = self.state.restore(snapshot, self.config, fingerprint, self.num_ranks)
            self.state.unreported = [loss.to(device) for loss in self.state.unreported]

        self.stepper.may_record(self.order.num_steps - self.state.step)

    def task(
        self, spec: NetworkSpec, scale_of: Callable[[str], float] | None, threads: int
    ) -> Task:
        """What the other ranks need to go on from here."""
        network, dataset = self.state.network, self.dataset
        names = [name for name, _ in network.named_parameters()] if scale_of else []
        num_workers = -(-dataset.num_workers // self.num_ranks)
        return Task(
            spec,
            self.config.model_copy(update={"threads": threads}),
            name_of_mode(self.stepper.train_mode),
            {name: scale_of(name) for name in names} if scale_of else {},
            self.state.step,
            replace(dataset, parts={TRAIN: dataset.train}, num_workers=num_workers),
            network.state_dict(),
            self.state.optimizer.state(),
        )

    def loop(self) -> Iterator[Progress]:
        """Train and validate, epoch by epoch, until the last or until it no longer helps."""
        self.pace.start(self.state.step, self.state.seconds)
        with closing(self.stepper.batches()) as batches:
            while not self.is_over:
                self.stepper.train()
                yield from self._train_epoch(batches)
                yield from self._end_epoch()

    @property
    def is_over(self) -> bool:
        """Whether there is no epoch to come."""
        history = self.state.history
        asked = bool(history) and (self.is_stopped or self.stop())
        return len(history) >= self.last_epoch or self.stopped_early or asked

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
            fingerprint = self.dataset.fingerprint
            snapshot = self.state.snapshot(self.config, fingerprint, self.num_ranks)
            store.save(self.state.step, snapshot)

    def result(self) -> FitResult:
        """The best weights, put into the network that was given."""
        state = self.state
        if state.best is None:
            raise RuntimeError("a run that ends has finished an epoch")
        state.network.load_state_dict(state.best_weights)
        network = state.network.eval()
        stopped = len(state.history) < self.last_epoch
        return FitResult(
            network,
            state.best,
            tuple(state.history),
            self.pace.seconds,
            stopped,
            self.notes,
            environment(self.num_ranks),
        )

    def _train_epoch(self, batches: Fed) -> Iterator[Progress]:
        end = self.order.steps_per_epoch * (len(self.state.history) + 1)
        while self.state.step < end:
            if self.ranks:
                self.ranks.step()
            batch, inputs, targets = next(batches)
            self.stepper.step(batch, inputs, targets)
            self.pace.did(batch.size)
            if self.state.step % self.config.report_every == 0 or self.state.step == end:
                yield self._report(batch)
            elif self.pace.is_due("yield", LONGEST_SILENCE_S):
                yield self._progress(batch)
            if self.state.step < end and self.stop():
                self.is_stopped = True
                yield self._report(batch)
                return

    def _report(self, batch: Batch) -> Progress:
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
            accuracy=self.stepper.accuracy,
            images_per_second=self.pace.images_per_second(),
        )
        return self._progress(batch)

    def _progress(self, batch: Batch) -> Progress:
        return replace(
            self.last,
            step=self.state.step,
            epoch=batch.epoch + 1,
            learning_rate=self.stepper.learning_rate(batch.step),
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
            learning_rate=self.stepper.learning_rate(state.step - 1),
            metrics={"train_loss": record.loss},
        )

    def _predict(self, inputs: Tensor) -> Tensor:
        with self.stepper.autocast():
            logits: Tensor = self.state.answering(laid_out(inputs, self.stepper.layout))
        return logits

    def _advice(self, step: int, loss: float) -> str:
        return (
            f"the loss of step {step} (epoch {(step - 1) // self.order.steps_per_epoch + 1}) is "
            f"{loss}; lower --lr, which is {self.config.learning_rate:g}, or set --gradient-clip"
        )


def _numbers(losses: list[Tensor]) -> list[float]:
    numbers: list[float] = torch.stack(losses).tolist() if losses else []
    return numbers


def _threads(config: FitConfig, snapshot: Snapshot | None, num_ranks: int) -> int:
    """As many as wanted, or as the run had before, or as this process has: sums depend on it."""
    if config.threads or snapshot is None:
        return config.threads or threads_each(num_ranks)
    before = snapshot.state["environment"]
    same = int(before.get(PROCESSES, "1")) == num_ranks
    return int(before["threads"]) if same else threads_each(num_ranks)
