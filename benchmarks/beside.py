"""`python -m benchmarks.beside`: predictions and a training job that share the processors.

A real server answers an open loop at 0.3 of its capacity (`benchmarks.stage.Capacity`) and trains a
small network on handwritten digits, a job like any other. Each round measures the requests without
the job, both together, and the job without requests, in random order; in between the job is paused
and resumed over HTTP, so that it is gone, and not only still, where it is not measured. Its speed
counts steps between two reports, from just before to just after the load; the second in which the
generator starts is in it.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np

from benchmarks import ours
from benchmarks.resnet_scenario import EAGER
from benchmarks.rounds import Cell, Round, Sample, ratio, undisturbed
from benchmarks.session import Session, compute_layout, parser
from benchmarks.stage import Stage, running
from benchmarks.system import HOST, System
from benchmarks.tensor_scenario import SCENARIOS, TensorScenario
from benchmarks.verdict import Verdict, at_least, at_most, none_of
from models.store import ModelStore

LOAD: Final = 0.3
LEASE_S: Final = "6"
"""The job reports three times in it."""
NUM_PICTURES: Final = 20_000
PATIENCE_S: Final = 180.0
POLL_S: Final = 0.05
ENDLESS: Final = {"epochs": 100_000, "batch_size": 128}
ALONE, BESIDE, JOB = "requests alone", "requests beside the job", "job alone"


class Job:
    """One training job that goes on and on.

    Args:
        system: whose job it is; it must run while this is asked anything.
        data: the folder of real data.
    """

    def __init__(self, system: System, data: Path) -> None:
        self._http = httpx.Client(base_url=f"http://{HOST}:{system.port}/v1", timeout=PATIENCE_S)
        dataset = self._post("/datasets", files={"file": ("digits.npz", digits(data))})
        wish = {
            "model": "cnn",
            "training_file": dataset["id"],
            "suffix": "beside",
            "method": {"type": "from_scratch", "from_scratch": {"hyperparameters": ENDLESS}},
        }
        self._url = f"/fine_tuning/jobs/{self._post('/fine_tuning/jobs', json=wish)['id']}"

    def train(self) -> None:
        """Let it run, and wait until it takes steps."""
        if self._state()["status"] == "paused":
            self._post(f"{self._url}/resume")
        self.report()

    def hold(self) -> None:
        """Pause it, and wait until its process is gone."""
        if self._state()["status"] != "paused":
            self._post(f"{self._url}/pause")
            self._until(lambda state: state["status"] == "paused")

    def report(self) -> tuple[float, int]:
        """The moment at which its next report arrives, and the step that it tells."""
        before = self._state()["progress"].get("step", 0)
        state = self._until(
            lambda state: (
                state["progress"].get("phase") in ("train", "epoch")
                and state["progress"]["step"] != before
            )
        )
        return time.monotonic(), int(state["progress"]["step"])

    def _until(self, holds: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        until = time.monotonic() + PATIENCE_S
        while not holds(state := self._state()):
            if state["status"] in ("failed", "cancelled", "succeeded"):
                raise RuntimeError(f"the job has ended: {state}")
            if time.monotonic() > until:
                raise TimeoutError(f"the job stands still: {state}")
            time.sleep(POLL_S)
        return state

    def _state(self) -> dict[str, Any]:
        return self._read(self._http.get(self._url))

    def _post(self, path: str, **sent: Any) -> dict[str, Any]:
        return self._read(self._http.post(path, **sent))

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.is_error:
            raise RuntimeError(f"{answer.request.url.path}: {answer.status_code}, {answer.text}")
        document: dict[str, Any] = answer.json()
        return document


def digits(data: Path) -> bytes:
    """Pictures of handwritten digits as NPZ: of MNIST where it is there, else scikit-learn's."""
    root = data / "mnist"
    if (root / "MNIST").is_dir():
        from torchvision.datasets import MNIST

        mnist = MNIST(str(root), train=True)
        x, y = mnist.data[:NUM_PICTURES].numpy(), mnist.targets[:NUM_PICTURES].numpy()
    else:
        from sklearn.datasets import load_digits

        loaded = load_digits()
        x = (loaded.images * 15).astype(np.uint8).repeat(3, 1).repeat(3, 2)
        y = loaded.target
    file = io.BytesIO()
    np.savez(file, x_train=x[500:], y_train=y[500:], x_val=x[:500], y_val=y[:500])
    return file.getvalue()


def main(arguments: Sequence[str]) -> None:
    """Measure, print the tables and one line of JSON, and keep them where that is asked."""
    session = Session("beside", arguments, parser(__doc__ or "").parse_args(arguments))
    data = Path(os.environ.get("PYTORCHLIB_TEST_DATA", "../shared/data"))
    for name in session.options.scenario:
        layout = compute_layout()
        with session.stage(layout) as stage:
            cells = prepare(stage, SCENARIOS[name], session.settings, data)
            rounds = session.measure(cells)
        verdicts = verdicts_of(undisturbed(rounds))
        sentence = f"{layout.sentence()}; requests at {LOAD:g} of what one server answers alone"
        session.add(name, sentence, cells, rounds, verdicts)
    session.finish()


def prepare(
    stage: Stage, scenario: TensorScenario, settings: Mapping[str, str], data: Path
) -> list[Cell]:
    """Start the server and its job, and make the cells."""
    home = stage.folder / f"home-{scenario.model}"
    scenario.publish(ModelStore(home / "models"))
    wanted = {**EAGER, "lease_s": LEASE_S, **settings}
    server = stage.start(ours.server("ours", home, [scenario.model], wanted))
    sent = scenario.sent()
    stage.ask(server, sent)
    with running(server):
        job = Job(server, data)
        job.train()

    def held(cell: Cell) -> Cell:
        def measure() -> Sample:
            with running(server):
                job.hold()
            return cell.measure()

        return Cell(cell.name, measure)

    def trained(name: str, act: Callable[[], Sample]) -> Cell:
        def measure() -> Sample:
            with running(server):
                job.train()
                began, first = job.report()
            sample = act()
            with running(server):
                ended, last = job.report()
            return {**sample, "steps_per_s": (last - first) / (ended - began)}

        return Cell(name, measure)

    def idle() -> Sample:
        with running(server):
            time.sleep(stage.timing.warm_up_s + stage.timing.open_s)
        return {"faults": 0.0}

    capacity = stage.capacity(server, sent, scenario.busy, held)
    alone = stage.open(ALONE, server, sent, capacity.share(LOAD))
    beside = stage.open(BESIDE, server, sent, capacity.share(LOAD))
    return [*capacity.cells, held(alone), trained(BESIDE, beside.measure), trained(JOB, idle)]


def verdicts_of(rounds: Sequence[Round]) -> list[Verdict]:
    """The goals of the issue."""
    return [
        at_most("p99 beside the job over p99 alone", rounds, ratio(BESIDE, ALONE, "p99_ms"), 1.5),
        at_least(
            "the job's steps/s beside requests over those alone",
            rounds,
            ratio(BESIDE, JOB, "steps_per_s"),
            0.5,
        ),
        *(none_of(f"faults of {name}", rounds, name, ["faults"]) for name in (ALONE, BESIDE)),
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
