"""The child process of a job: drives a training loop, and tells the server how it goes.

Started as `python -m app.jobs.work` by `local_executor`; reads its order from the first line of
standard input. It never opens the database. It publishes only when the server says so, because
only the server knows whether the job is still its own.
"""

import contextlib
import errno
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from app.jobs.attempt_folder import open_attempt, steps_saved
from app.jobs.channel import PAUSE, PUBLISH, STOP, Channel, read_order
from app.jobs.job import Kind

if TYPE_CHECKING:
    from training.answers import Answers
    from training.progress import Progress
    from training.resolution import Choice
    from training.train import Trained

REPORT_S: Final = 0.2
DISK_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OOM_SCORE: Final = "700"
LEAST_NICE: Final = 19
RANK_LOST: Final = 4
"""Exit status of a child whose helper was killed."""
RESULT: Final = "result.json"
"""In the run's folder: everything that is known of a run that was fine-tuned."""
REPORT_EVERY: Final = 20
"""Steps between two reports of the loss; people watch."""


@dataclass(frozen=True)
class Made:
    """What a loop made.

    Attributes:
        trained: the network.
        told: what the job's result says besides its version.
        whole: the same and more, which is too large for a row.
        out_of_fold: answers of networks that learned from other samples, to be judged by.
    """

    trained: "Trained"
    told: Mapping[str, Any]
    whole: Mapping[str, Any] | None = None
    out_of_fold: "Answers | None" = None


Loop = Generator["Progress", None, Made]
Say = Callable[..., None]


def main() -> None:
    """Carry out one order."""
    step_back()
    order = read_order()
    channel = Channel(float(order["lease_s"]))
    channel.listen()
    try:
        Work(order, channel).carry_out()
    except Exception as error:  # the edge of a job: everything becomes a sentence
        traceback.print_exc()
        if is_death(error):
            sys.stderr.write(f"{error}\n")  # as of a process that died: the runner begins it again
            sys.stderr.flush()
            os._exit(RANK_LOST)
        channel.say("error", **told(error))


def step_back() -> None:
    """Leave the processor to whoever serves, and be the first to go when memory runs out.

    Threads and processes that it starts inherit the class. It stays in the server's session: where
    the kernel shares processors out among sessions, the class only counts within one.
    """
    with contextlib.suppress(OSError):  # it leads a session already
        os.setpgid(0, 0)  # Ctrl-C in the server's terminal is the server's matter
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(LEAST_NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


class Work:
    """One attempt of one job."""

    def __init__(self, order: Mapping[str, Any], channel: Channel) -> None:
        self._order, self._channel = order, channel
        self._home, self._job = Path(order["home"]), str(order["job"])
        self._run = self._home / "runs" / self._job
        self._attempt = open_attempt(self._run, int(order["token"]))
        self._steps_saved = 0
        self._looked = 0.0

    def carry_out(self) -> None:
        """Train, ask, publish, tell."""
        made = self._train()
        self._look_for_snapshots()
        if made is None:
            self._channel.say("ended", how="fenced" if self._channel.is_fenced else "paused")
            return
        self._channel.say("ready")
        if not self._channel.wait_for(PUBLISH):
            self._channel.say("ended", how="fenced")
            return
        self._channel.say("result", result=self._publish(made))

    def _train(self) -> Made | None:
        """What was trained; None if it was interrupted, after a snapshot."""
        from training.events import EVENTS, recorded

        self._limit_threads()
        loop = recorded(self._loop(), self._run / EVENTS)
        try:
            while True:
                try:
                    progress = next(loop)
                except StopIteration as stop:
                    made: Made = stop.value
                    return made
                self._report(progress)
                if self._channel.was_told(PAUSE) or self._channel.is_fenced:
                    return None
        finally:
            loop.close()

    def _loop(self) -> Loop:
        options = self._order["options"]
        return LOOPS[options["method"]](
            options,
            self._attempt,
            self._home,
            lambda: self._channel.was_told(STOP),
            self._channel.say,
        )

    def _limit_threads(self) -> None:
        import torch

        if self._order["threads"]:
            torch.set_num_threads(int(self._order["threads"]))

    def _report(self, progress: "Progress") -> None:
        now = time.monotonic()
        if now - self._looked < REPORT_S and progress.phase != "epoch":
            return
        self._looked = now
        self._channel.say("progress", progress=asdict(progress))
        self._look_for_snapshots()

    def _look_for_snapshots(self) -> None:
        steps = steps_saved(self._attempt)
        if steps > self._steps_saved:
            self._steps_saved = steps
            self._channel.say("snapshot", step=steps)

    def _publish(self, made: Made) -> dict[str, Any]:
        from models.store import PRODUCTION, ModelStore
        from training.publish import publish

        store, name = ModelStore(self._home / "models"), self._order["options"]["name"]
        holder = store.aliases(name).get(PRODUCTION) if name in store.names() else None
        gate = self._order["options"].get(Kind.PROMOTION)
        version = publish(
            made.trained,
            store,
            name,
            run=self._job,
            by=self._order["by"],
            is_gated=gate is not None and gate["proposal"]["alias"] == PRODUCTION,
        )
        if made.out_of_fold is not None:
            made.out_of_fold.save(self._run)
        if made.whole is not None:
            staging = self._run / f"{RESULT}.writing"
            staging.write_text(json.dumps({"version": str(version), **made.whole}, indent=1))
            staging.replace(self._run / RESULT)
        # Where this attempt publishes again, the version itself may hold the alias.
        current = f"{name}:{holder}" if holder not in (None, version.number) else None
        return {"model": name, "version": version.number, "current": current, **made.told}


def is_death(error: Exception) -> bool:
    """Whether a process that shared the job was killed, which is no fault of the job's."""
    from training.ranks import RankLost

    return isinstance(error, RankLost)


def told(error: Exception) -> dict[str, Any]:
    """An exception as the server is told of it: a code, a sentence, and whether it may pass."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        sentence = f"the disk is full ({error.filename or 'while writing'}); free some space"
        return {"code": "disk_full", "message": f"{sentence}, then resume the job", "passes": True}
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError":
        sentence = "the job needs more memory than there is; take smaller batches"
        return {"code": "out_of_memory", "message": sentence, "passes": False}
    module = type(error).__module__.partition(".")[0]
    if module in ("models", "training"):
        return {"code": _code(name), "message": str(error), "passes": False}
    if "No space left" in str(error):  # safetensors says it without a number
        return {
            "code": "disk_full",
            "message": "the disk is full; free some space, then resume the job",
            "passes": True,
        }
    return {
        "code": "internal_error",
        "message": f"the job failed on a fault of the program: {name}; the log has more",
        "passes": False,
    }


def _code(name: str) -> str:
    """`LossNotFinite` -> `loss_not_finite`."""
    return "".join(f"_{one.lower()}" if one.isupper() else one for one in name).lstrip("_")


def _fresh(
    options: Mapping[str, Any], run: Path, _: Path, stop: Callable[[], bool], __: Say
) -> Loop:
    from training.config import TrainConfig
    from training.train import train

    trained = yield from train(TrainConfig.of(**options["config"]), run=run, stop=stop)
    told = {
        "metrics": trained.report.figures(),
        "measured_on": trained.dataset.measured_on,
        "best_epoch": trained.fitted.best.epoch,
        "notes": list(trained.fitted.notes),
    }
    return Made(trained, told)


def _tuned(
    options: Mapping[str, Any], run: Path, home: Path, stop: Callable[[], bool], say: Say
) -> Loop:
    from training.fine_tune import fine_tune
    from training.methods import FineTuneRequest
    from training.outcome import summary

    def tell(choices: "Mapping[str, Choice]") -> None:
        say("resolved", resolved={name: one.to_json() for name, one in choices.items()})

    asked = dict(options["request"])
    for name in ("dataset", "validation_dataset"):
        asked[name] = asked.get(name) and _dataset(home, asked[name])
    asked["compute"] = {"report_every": REPORT_EVERY, **asked.get("compute", {})}
    request = FineTuneRequest.of(**asked)
    done = yield from fine_tune(request, home, run, stop=stop, on_resolved=tell)
    whole = summary(done)
    told = {name: whole[name] for name in TOLD}
    told["best_epoch"] = done.trained.fitted.best.epoch
    return Made(done.trained, told, whole, done.out_of_fold)


def _dataset(home: Path, dataset_id: str) -> str:
    """The folder of a dataset of the store, if something can be learned from it.

    Raises:
        training.dataset_store.DatasetUnknown, DatasetDamaged, DatasetRefused: as they say.
    """
    from training.dataset_store import DatasetStore

    stored = DatasetStore(home / "datasets").get(dataset_id)
    stored.check_usable()
    return str(stored.folder)


TOLD: Final = (
    *("method", "base", "parent", "metrics", "interval", "measured_on", "validation", "resolved"),
    *("hyperparameters", "best", "environment", "notes", "seconds"),
)
"""What the row holds of what `training.outcome.summary` says."""
Maker = Callable[[Mapping[str, Any], Path, Path, Callable[[], bool], Say], Loop]
LOOPS: Final[Mapping[str, Maker]] = {
    "train": _fresh,
    "linear_probe": _tuned,
    "fine_tune": _tuned,
    "from_scratch": _tuned,
}


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of torch and of readers have nothing left to say
