"""`python -m benchmarks.cuda`: scenarios G0 to G7 on a GPU, in under ten minutes.

G0 forwards alone, G1 requests of 32 pictures as bytes, G2 of one, G3 a JPEG, G4 Poisson load, G5
other servers, G6 MNIST to 99 %, G7 a training job beside the server. One table, one line of JSON.
On a machine without a GPU it says so; `--device cpu --smoke` runs the same code on small sizes.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import cuda_networks, ours, payload
from benchmarks.cuda_loops import Curve, curves, decoded_on_device_per_s, decoded_per_s
from benchmarks.cuda_networks import STUB, publish
from benchmarks.machine import cores, this_machine
from benchmarks.record import Record, Table, command_of, tell
from benchmarks.rounds import Sample
from benchmarks.stage import Layout, Stage, Timing
from benchmarks.system import System

BUDGET_S = 600.0
JOB_DEADLINE_S = 120.0
ROOT = Path(__file__).resolve().parent.parent
LATENCY_MS = 15.0
DECODED_ROWS = (16, 64)
LOADS = (0.5, 0.8, 0.85, 0.95)
Row = tuple[str, str, str, str, str]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes:
        networks: for G0; the first is served.
        rows: batch sizes of G0.
        side: of the pictures, in pixels.
        request_rows: pictures in a request of G1.
        connections: of the closed loops.
        seeds: of G6.
    """

    networks: Sequence[str] = ("resnet18", "resnet50")
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    side: int = 224
    request_rows: int = 32
    connections: int = 32
    timing: Timing = Timing(warm_up_s=1.0, closed_s=5.0, open_s=8.0)
    job_s: float = 8.0
    seeds: int = 5


SMOKE = Sizes(
    networks=("resnet18",),
    rows=(1, 2),
    side=32,
    request_rows=2,
    connections=2,
    timing=Timing(warm_up_s=0.5, closed_s=1.0, open_s=1.0),
    job_s=1.0,
    seeds=1,
)


@dataclass
class Run:
    """What the scenarios share: where, how much, and what was found so far."""

    device: torch.device
    sizes: Sizes
    stage: Stage
    data: Path
    compile_too: bool
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    _server: System | None = None

    def found(
        self,
        scenario: str,
        what: str,
        value: float,
        unit: str,
        goal: float | None = None,
        *,
        at_most: bool = False,
    ) -> None:
        """One row of the table."""
        words, state = "", ""
        if goal is not None:
            words = f"{'at most' if at_most else 'at least'} {goal:g}"
            state = "met" if (value <= goal if at_most else value >= goal) else "missed"
        self.rows.append((scenario, what, f"{value:.4g} {unit}".strip(), words, state))
        self.figures.setdefault(scenario, {})[what] = value

    def lacks(self, scenario: str, why: str) -> None:
        """A row that says why there is no figure."""
        self.rows.append((scenario, why, "", "", "not measured"))
        self.figures.setdefault(scenario, {})["not measured"] = why

    def server(self) -> System:
        """Ours, with the network and the stub, in whatever `auto` chooses here."""
        if self._server is None:
            home = self.stage.folder / "home-cuda"
            names = [self.sizes.networks[0], STUB]
            for name in names:
                publish(home, name, self.sizes.side)
            settings = {
                "device": str(self.device),
                "max_batch_items": str(max(self.sizes.rows[-1], self.sizes.request_rows)),
                "max_queue_items": "8192",
                "max_inputs": str(self.sizes.request_rows),
                "jobs": "false",
            }
            self._server = self.stage.start(ours.server("ours G", home, names, settings))
        return self._server

    def closed(self, name: str, sent: payload.Payload) -> Sample:
        """A closed loop on our server."""
        return self.stage.closed(name, self.server(), sent, self.sizes.connections).measure()


def forwards(run: Run) -> None:
    """G0: forwards alone."""
    found: list[Curve] = []
    for name in run.sizes.networks:
        found += curves(
            name, run.device, run.sizes.rows, run.sizes.side, compile_too=run.compile_too
        )
    for curve in found:
        title = f"{curve.network}, {curve.form}"
        if not curve.seconds:
            run.lacks("G0", f"{title}: {curve.fault}")
            continue
        start_s, row_s = curve.line
        run.found("G0", f"{title}: best", curve.best_per_s, "images/s", _goal(curve))
        run.found("G0", f"{title}: a batch", start_s * 1000, "ms")
        run.found("G0", f"{title}: a row more", row_s * 1000, "ms")
        run.rates[curve.network] = max(run.rates.get(curve.network, 0.0), curve.best_per_s)
    _ones(run, found)
    run.figures["G0"]["curves"] = [
        {"network": one.network, "form": one.form, "seconds": dict(one.seconds)} for one in found
    ]


def _goal(curve: Curve) -> float | None:
    return 20_000.0 if (curve.network, curve.form[:4]) == ("resnet50", "bf16") else None


def _ones(run: Run, found: Sequence[Curve]) -> None:
    """A recorded forward of one row against the same, eager."""
    by_form = {(one.network, one.form): one.seconds for one in found}
    for (network, form), seconds in by_form.items():
        eager = by_form.get((network, form.removesuffix(", recorded")))
        if form.endswith(", recorded") and eager and 1 in seconds and 1 in eager:
            ratio = seconds[1] / eager[1]
            run.found(
                "G0", f"{network}: one row, recorded over eager", ratio, "", 0.6, at_most=True
            )


def many(run: Run) -> None:
    """G1: requests of many pictures as bytes."""
    model, count = run.sizes.networks[0], run.sizes.request_rows
    sample = run.closed("G1", payload.v2_pixels(model, _pixels(run, count)))
    rate = sample["rate_per_s"] * count
    run.rates["G1"] = sample["rate_per_s"]
    run.found("G1", f"{model}, {count} pictures a request", rate, "images/s")
    run.found("G1", "p99", sample["p99_ms"], "ms")
    run.found("G1", "faults", sample["faults"], "", 0.0, at_most=True)
    if model in run.rates:
        run.found("G1", "over the best of G0", rate / run.rates[model], "", 0.85)


def one(run: Run) -> None:
    """G2: requests of one picture as bytes, and the same to a network that computes nothing."""
    pixels = _pixels(run, 1)
    rates = {}
    for name in (run.sizes.networks[0], STUB):
        sample = run.closed(f"G2 {name}", payload.v2_pixels(name, pixels))
        rates[name] = sample["rate_per_s"]
        run.found("G2", f"{name}, one picture a request", sample["rate_per_s"], "requests/s")
        run.found("G2", f"{name}, CPU time a request", sample["cpu_us"], "us")
    model = run.sizes.networks[0]
    run.rates["G2"] = rates[model]
    run.found("G2", "over the stub", rates[model] / rates[STUB], "", 0.8)
    run.lacks("G2", "scaling to four fronts: one process serves, see docs/decisions/0002")


def pictures(run: Run) -> None:
    """G3: a JPEG a request, against what decoding alone allows."""
    model, jpeg = run.sizes.networks[0], payload.photograph()
    threads = len(run.stage.layout.server)
    limit = decoded_per_s(jpeg, run.sizes.side, threads, run.sizes.timing.closed_s)
    sent = payload.multipart(f"/v1/models/{model}/predict", jpeg)
    sample = run.closed("G3", sent)
    run.found("G3", f"{model}, a JPEG a request", sample["rate_per_s"], "images/s")
    run.found("G3", f"decoding alone, {threads} threads", limit, "images/s")
    for rows in DECODED_ROWS:
        _device_decodes(run, jpeg, rows)
    lower = min(limit, run.rates.get(model, limit))
    run.found("G3", "over the lower limit", sample["rate_per_s"] / lower, "", 0.8)


def _device_decodes(run: Run, jpeg: bytes, rows: int) -> None:
    if run.device.type != "cuda":
        run.lacks("G3", f"decoding on the device, {rows} at once: {run.device} does not")
        return
    seconds = run.sizes.timing.closed_s
    rate = decoded_on_device_per_s(jpeg, run.sizes.side, run.device, rows, seconds)
    run.found("G3", f"decoding on the device, {rows} at once", rate, "images/s")


def poisson(run: Run) -> None:
    """G4: requests of many pictures at random moments, at shares of G1's capacity."""
    model, count = run.sizes.networks[0], run.sizes.request_rows
    sent = payload.v2_pixels(model, _pixels(run, count))
    if "G1" not in run.rates:
        run.rates["G1"] = run.closed("G1", sent)["rate_per_s"]
    kept = 0.0
    for load in LOADS:
        rate = max(2.0, load * run.rates["G1"])
        sample = run.stage.open(f"G4 {load}", run.server(), sent, lambda rate=rate: rate).measure()
        run.found("G4", f"p50 at {load:.0%}", sample["p50_ms"], "ms")
        run.found("G4", f"p99 at {load:.0%}", sample["p99_ms"], "ms")
        if sample["p99_ms"] <= LATENCY_MS and not sample["faults"]:
            kept = load
    run.found("G4", f"largest share with p99 within {LATENCY_MS:g} ms", kept, "", 0.85)


def peers(run: Run) -> None:
    """G5: other servers."""
    run.lacks("G5", "other servers need environments of their own: python -m benchmarks.peers")


def mnist(run: Run) -> None:
    """G6: MNIST to 99 %, and an epoch of the tutorial's loop on the same device."""
    from benchmarks.cuda_mnist import recipe_run, tutorial_epoch_s

    if not (run.data / "mnist").is_dir():
        run.lacks("G6", "there is no MNIST below --data")
        return
    smoke = run.sizes is SMOKE
    seeds = range(run.sizes.seeds)
    outcomes = [recipe_run(run.device, seed, run.data, smoke=smoke) for seed in seeds]
    seconds = sum(one.seconds for one in outcomes) / len(outcomes)
    accuracy = sum(one.accuracy for one in outcomes) / len(outcomes)
    tutorial = tutorial_epoch_s(run.device, run.data, smoke=smoke)
    per_epoch = seconds / outcomes[0].num_epochs
    run.found("G6", "training, mean over seeds", seconds, "s", 1.0, at_most=True)
    run.found("G6", "test accuracy, mean over seeds", accuracy, "", 0.99)
    run.found("G6", "an epoch of the tutorial's loop", tutorial, "s")
    run.found("G6", "times as fast an epoch", tutorial / per_epoch, "", 50.0)


def shared(run: Run) -> None:
    """G7: a training job beside the server, on the same device."""
    model, seconds = run.sizes.networks[0], run.sizes.job_s
    sent = payload.v2_pixels(model, _pixels(run, 1))
    if "G2" not in run.rates:
        run.rates["G2"] = run.closed("G2", sent)["rate_per_s"]
    rate = max(2.0, 0.3 * run.rates["G2"])
    cell = run.stage.open("G7", run.server(), sent, lambda: rate)
    with _job(run, seconds) as job:
        alone = _steps_per_s(job)
    before = cell.measure()
    with _job(run, seconds + run.sizes.timing.open_s) as job:
        during = cell.measure()
        beside = _steps_per_s(job)
    run.found("G7", "p99 beside a job", during["p99_ms"], "ms")
    run.found(
        "G7", "p99 over that without", during["p99_ms"] / before["p99_ms"], "", 2, at_most=True
    )
    run.found("G7", "the job's speed over that alone", beside / alone, "", 0.6)


@contextlib.contextmanager
def _job(run: Run, seconds: float) -> Iterator["subprocess.Popen[str]"]:
    """A training job that has begun, and ends with the block."""
    command = [sys.executable, "-m", "benchmarks.cuda_loops"]
    command += [str(run.device), str(run.sizes.side), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert job.stdout is not None
            if job.stdout.readline().strip() != "ready":
                raise RuntimeError("the training job ended before it began")
            yield job
        finally:
            job.kill()


def _steps_per_s(job: "subprocess.Popen[str]") -> float:
    words, _ = job.communicate(timeout=JOB_DEADLINE_S)
    return float(words)


def _pixels(run: Run, count: int) -> np.ndarray:
    return cuda_networks.pixels(count, run.sizes.side).numpy()


SCENARIOS: Mapping[str, Callable[[Run], None]] = {
    "G0": forwards,
    "G1": many,
    "G2": one,
    "G3": pictures,
    "G4": poisson,
    "G5": peers,
    "G6": mnist,
    "G7": shared,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, print one table and one line of JSON, and keep them where that is asked."""
    options = _options().parse_args(arguments)
    if options.dry_run:
        for name, scenario in SCENARIOS.items():
            print(f"{name}  {(scenario.__doc__ or '').removeprefix(f'{name}: ')}")
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch sees no CUDA device on this machine, so nothing was measured.")
        return 0
    began, clock = datetime.now(UTC), time.monotonic()
    sizes = SMOKE if options.smoke else Sizes()
    device = torch.device(options.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        Stage(_layout(), sizes.timing, Path(folder), tell) as stage,
    ):
        run = Run(device, sizes, stage, options.data, options.compile)
        for name in options.only:
            _measure(run, name, clock)
    run.found(
        "all", "minutes that this took", (time.monotonic() - clock) / 60, "", 10, at_most=True
    )
    record = Record(
        "cuda",
        command_of("cuda", arguments),
        this_machine(),
        [f"Device: {_device_name(device)}", run.stage.layout.sentence()],
        [Table("G0 to G7", [("", "what", "measured", "goal", "state"), *run.rows])],
        {"device": _device_name(device), "smoke": options.smoke, **run.figures},
        began,
    )
    record.show(write=options.write)
    return 0


def _measure(run: Run, name: str, clock: float) -> None:
    """One scenario; one that fails says so in the table, and the others go on."""
    if time.monotonic() - clock > BUDGET_S:
        run.lacks(name, "the ten minutes were over")
        return
    tell(f"{name} begins after {time.monotonic() - clock:.0f} s")
    try:
        SCENARIOS[name](run)
    except Exception as error:  # the edge of a scenario
        run.lacks(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    data = os.environ.get("PYTORCHLIB_TEST_DATA", "../shared/data")
    add = options.add_argument
    add("--device", default="cuda:0", help="where; cuda:0")
    add("--smoke", action="store_true", help="small sizes: its figures mean nothing")
    add("--dry-run", action="store_true", help="list the scenarios and measure nothing")
    add("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), help="which; all")
    add("--compile", action="store_true", help="G0 compiled too, which takes minutes")
    add("--data", type=Path, default=Path(data), help="the folder that holds mnist")
    add("--write", action="store_true", help="keep the outcome in benchmarks/results")
    return options


def _layout() -> Layout:
    """Six of sixteen for the load; of two, one each."""
    mine = cores()
    num_client = max(1, len(mine) * 6 // 16)
    return Layout(mine[num_client:] or mine, mine[:num_client])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
