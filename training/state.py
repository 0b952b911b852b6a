"""The whole state of a training run, and how it becomes a snapshot and comes back from one."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.average import Average
from training.config import FitConfig, option_name
from training.optim import Optimizer
from training.snapshot import Snapshot, SnapshotMismatch

PROCESSES = "processes"
"""In the environment of a run: how many shared each step."""
FREE_TO_CHANGE = frozenset(
    {"device", "report_every", "snapshot_seconds", "data_root", "dataset"}
    | {"memory_budget_mb", "num_workers", "num_processes"}
)
"""Settings that a resumed run may have otherwise: they change no weights, or the dataset's
fingerprint stands for them."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training samples brought; `step` is its last, counted from 1."""

    epoch: int
    step: int
    loss: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None

    @property
    def merit(self) -> tuple[float, float]:
        """The greater, the better: by accuracy, then by loss; later where nothing is validated."""
        if self.validation_accuracy is None or self.validation_loss is None:
            return (0.0, float(self.step))
        return (self.validation_accuracy, -self.validation_loss)


@dataclass
class State:
    """Counters and tensors; whatever is not here follows from the seed and the step.

    Attributes:
        network: what learns.
        optimizer: its momenta.
        average: its moving average, if wanted.
        step: steps done.
        history: the epochs that are trained and validated.
        unreported: losses of the steps since the last report, still on the device.
        epoch_loss: sum of the reported losses of the current epoch.
        best: the epoch of the best weights so far.
        best_weights: copies of these.
        seconds: spent so far, over all attempts.
    """

    network: nn.Module
    optimizer: Optimizer
    average: Average | None
    step: int = 0
    history: list[Epoch] = field(default_factory=list)
    unreported: list[Tensor] = field(default_factory=list)
    epoch_loss: float = 0.0
    best: Epoch | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def answering(self) -> nn.Module:
        """The network that is validated and kept: the average where there is one."""
        return self.average.network if self.average else self.network

    def keep_best(self, epoch: Epoch) -> None:
        """Keep today's weights if `epoch` is better than every one before."""
        self.history.append(epoch)
        if self.best is None or epoch.merit > self.best.merit:
            self.best = epoch
            weights = self.answering.state_dict()
            self.best_weights = {name: value.detach().clone() for name, value in weights.items()}

    def snapshot(self, config: FitConfig, fingerprint: str, num_ranks: int = 1) -> Snapshot:
        """Everything, as it rests on disk; `num_ranks` processes shared each step."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "weights": self.network.state_dict(),
            "optimizer": self.optimizer.state(),
            "best": self.best_weights,
            "average": self.average.network.state_dict() if self.average else {},
            "losses": {"unreported": torch.stack(self.unreported)} if self.unreported else {},
        }
        state = {
            "step": self.step,
            "history": [asdict(epoch) for epoch in self.history],
            "epoch_loss": self.epoch_loss,
            "best": asdict(self.best) if self.best else None,
            "seconds": self.seconds,
            "config": config.model_dump(mode="json"),
            "dataset_fingerprint": fingerprint,
            "environment": environment(num_ranks),
        }
        return Snapshot(tensors, state)

    def restore(
        self, snapshot: Snapshot, config: FitConfig, fingerprint: str, num_ranks: int = 1
    ) -> tuple[str, ...]:
        """Become what `snapshot` holds, in a run of `num_ranks` processes.

        Returns:
            What a person should know: versions that differ, with which the last bits may too.

        Raises:
            SnapshotMismatch: it is of another run.
        """
        saved, tensors = snapshot.state, snapshot.tensors
        _check(saved, config, fingerprint)
        try:
            self.network.load_state_dict(tensors["weights"])
            if self.average:
                self.average.network.load_state_dict(tensors["average"])
            self.optimizer.load_state(tensors["optimizer"], saved["step"])
        except (RuntimeError, KeyError) as error:
            raise SnapshotMismatch(f"the snapshot is of another network: {error}") from None
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.epoch_loss = saved["epoch_loss"]
        self.history = [Epoch(**epoch) for epoch in saved["history"]]
        self.best = Epoch(**saved["best"]) if saved["best"] else None
        self.best_weights = dict(tensors["best"])
        self.unreported = list(tensors["losses"].get("unreported", torch.empty(0)))
        return _differences({PROCESSES: "1", **saved["environment"]}, environment(num_ranks))


def environment(num_ranks: int = 1) -> dict[str, str]:
    """What the bits of a result depend on besides the seed; `threads` are those of each process."""
    return {
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": str(torch.get_num_threads()),
        PROCESSES: str(num_ranks),
    }


def _check(saved: Mapping[str, Any], config: FitConfig, fingerprint: str) -> None:
    if saved["dataset_fingerprint"] != fingerprint:
        raise SnapshotMismatch(
            "the snapshot is of a run on other data; go on with the same dataset, "
            "or begin anew in another folder"
        )
    now, before = config.model_dump(mode="json"), saved["config"]
    changed = sorted(
        name
        for name in now.keys() | before.keys()
        if name not in FREE_TO_CHANGE and now.get(name) != before.get(name)
    )
    if changed:
        pairs = [f"{option_name(n)} was {before.get(n)!r} and is {now.get(n)!r}" for n in changed]
        raise SnapshotMismatch(
            f"the snapshot is of a run with other settings: {'; '.join(pairs)}; "
            "go on with the same ones, or begin anew in another folder"
        )


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    differing: Sequence[str] = [name for name in now if before.get(name) != now[name]]
    return tuple(
        f"resumed with {name} {now[name]} where it was {before.get(name)}: "
        "the result may differ in its last bits from a run that never stopped"
        for name in differing
    )
