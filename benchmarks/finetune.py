"""`python -m benchmarks.finetune`: from pictures to a promoted version, over HTTP.

A server of its own for every run, OpenAI's client, photographs of ants and bees, mobilenet_v2. The
clock runs from the upload to the moved alias. Beside it, in the same round, one bare pass of the
backbone over the same pictures, read and decoded as a job does it, with the same threads: what a
linear probe costs at least. Needs the photographs and weights under `PYTORCHLIB_TEST_DATA`.
"""

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, Final

import openai

from benchmarks.machine import cores, this_machine
from benchmarks.record import Record, Table, command_of, tell
from benchmarks.rounds import Cell, Round, Sample, estimate, measure_rounds, undisturbed
from benchmarks.system import HOST, Launch, System, free_port
from benchmarks.verdict import Verdict, at_least, at_most, goals_table

ROOT: Final = Path(__file__).resolve().parent.parent
NETWORK: Final = "torchvision/mobilenet_v2"
PASS, ONE, MANY, TUNED = "one bare pass", "probe, 1 epoch", "probe, 100 epochs", "fine-tune, 5"
PARTS: Final = {
    "probe": (PASS, MANY),
    "epochs": (ONE, MANY),
    "tune": (TUNED,),
}
METHODS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    ONE: ("linear_probe", {"epochs": 1}),
    MANY: ("linear_probe", {"epochs": 100}),
    TUNED: ("fine_tune", {"epochs": 5, "learning_rate": 1e-5}),
}
LEAST_ACCURACY: Final = {ONE: 0.6, MANY: 0.9, TUNED: 0.9}
"""What the alias moves for; eight steps of a head do not bring it far."""
PATIENCE_S: Final = 3600.0
LOOK_S: Final = 0.2
ENDED: Final = {"succeeded", "failed", "cancelled"}


class RunFailed(Exception):
    """A job or its promotion did not come to a good end."""


def main(arguments: Sequence[str]) -> None:
    """Measure, print the tables and one line of JSON, and keep them where that is asked."""
    options = _options().parse_args(arguments)
    began, archive = datetime.now(UTC), _zipped(options.data / "hymenoptera", options.few)
    names = dict.fromkeys(name for part in options.parts for name in PARTS[part])
    cells = [_cell(name, archive, options) for name in names]
    rounds = measure_rounds(cells, options.rounds, tell=tell)
    verdicts = [one for part in options.parts for one in VERDICTS[part](rounds)]
    tables = [_table(list(names), rounds), goals_table("Goals", verdicts)]
    figures = {
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "rounds": [asdict(one) for one in rounds],
    }
    method = [
        f"{options.threads} threads for jobs; every run has a server and a home folder of its own",
        "each round has another seed",
        "accuracy is that of the validation part, which chose nothing in the run (the recipes were "
        "found with it in view)",
        "wall time is from the upload to the moved alias, seconds of CPU are those of the server "
        "and its job",
    ]
    command = command_of("finetune", arguments)
    record = Record("finetune", command, this_machine(), method, tables, figures, began)
    record.show(write=options.write)


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    data = os.environ.get("PYTORCHLIB_TEST_DATA", "../shared/data")
    add = options.add_argument
    add("--data", type=Path, default=Path(data), help="holds hymenoptera/ and weights/")
    add("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="which; all")
    add("--rounds", type=int, default=3, help="runs of each")
    add("--threads", type=int, default=2, help="processor threads of a job")
    add("--few", type=int, default=0, help="so many pictures a class and part only; 0 is all")
    add("--write", action="store_true", help="keep the outcome in benchmarks/results")
    return options


# What is measured


def _cell(name: str, archive: bytes, options: argparse.Namespace) -> Cell:
    seeds = count()
    return Cell(name, lambda: _measured(name, next(seeds), archive, options))


def _measured(name: str, seed: int, archive: bytes, options: argparse.Namespace) -> Sample:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        (home / "weights").mkdir(parents=True)
        (home / "weights" / "mobilenet_v2.pth").symlink_to(
            (options.data / "weights" / "mobilenet_v2.pth").resolve()
        )
        if name == PASS:
            return _bare_pass(archive, home, options.threads)
        return _job(name, seed, archive, home, options.threads)


def _job(name: str, seed: int, archive: bytes, home: Path, threads: int) -> Sample:
    """Upload, tune, wait for the alias to move."""
    method, hyperparameters = METHODS[name]
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--home", str(home), "--port", str(port)]
    command += ["--device", "cpu", "--threads", str(threads), "--job-threads", str(threads)]
    launch = Launch(name, command, port, "/readyz", folder=ROOT)
    with System(launch, cores(), home / "log") as server, _client(port) as client:
        began, cpu_us = time.perf_counter(), server.cpu_us()
        file = client.files.create(
            file=("insects.zip", archive, "application/zip"), purpose="fine-tune"
        )
        job = client.fine_tuning.jobs.create(
            model=NETWORK,
            training_file=file.id,
            suffix="insects",
            seed=seed,
            method={"type": method, method: {"hyperparameters": hyperparameters}},
            extra_body={
                "promote": {"alias": "production", "rule": {"threshold": LEAST_ACCURACY[name]}}
            },
        )
        job = _promoted(client, job)
        seconds = time.perf_counter() - began
        tell(f"{name}: {job.evaluation['sentence']}")
        return {
            "seconds": seconds,
            "cpu_seconds": (server.cpu_us() - cpu_us) / 1e6,
            "accuracy": job.evaluation["figures"]["accuracy"],
        }


def _client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", timeout=600)


def _promoted(client: openai.OpenAI, job: Any) -> Any:
    """The job, once the alias has moved to what it made.

    Raises:
        RunFailed: it failed, or its version was refused; the sentence says why.
    """
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status in ENDED and job.status != "succeeded":
            raise RunFailed(f"{job.id} {job.status}: {job.error}")
        if job.promotion["status"] == "promoted":
            return job
        if job.promotion["status"] != "pending":
            raise RunFailed(f"{job.id}: {job.promotion['sentence']}")
        time.sleep(LOOK_S)
    raise RunFailed(f"{job.id} took more than {PATIENCE_S:.0f} s")


def _bare_pass(archive: bytes, home: Path, threads: int) -> Sample:
    """Features of every picture, in a process of its own, without what starts it."""
    pictures = home / "pictures"
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        opened.extractall(pictures)
    command = [sys.executable, "-m", "benchmarks.backbone_pass", str(home), str(pictures)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, str(threads)], cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE_S
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": float(done.stdout), "cpu_seconds": cpu}


def _zipped(folder: Path, few: int) -> bytes:
    """Class folders below `train` and `val`, as a person would send them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for classes in sorted(folder.glob("*/*/")):
            paths = sorted(classes.glob("*.jpg"))
            for path in paths[: few or None]:
                archive.write(path, path.relative_to(folder))
    return file.getvalue()


# What it means


def _of_probe(rounds: Sequence[Round]) -> list[Verdict]:
    def overhead_s(samples: Any) -> float:
        return float(samples[MANY]["seconds"] - 1.2 * samples[PASS]["seconds"])

    kept = undisturbed(rounds)
    return [
        at_least("accuracy of a linear probe", rounds, _accuracy(MANY), 0.95),
        at_most("seconds beyond 1.2 passes", kept, overhead_s, 25.0),
    ]


def _of_epochs(rounds: Sequence[Round]) -> list[Verdict]:
    def growth(figure: str) -> Any:
        return lambda samples: 100 * (samples[MANY][figure] / samples[ONE][figure] - 1)

    return [
        at_most("1 to 100 epochs: % more CPU", rounds, growth("cpu_seconds"), 10.0),
        at_most("1 to 100 epochs: % more time", undisturbed(rounds), growth("seconds"), 10.0),
    ]


def _of_tuning(rounds: Sequence[Round]) -> list[Verdict]:
    return [at_least("accuracy of fine-tuning", rounds, _accuracy(TUNED), 0.95)]


VERDICTS: Final = {"probe": _of_probe, "epochs": _of_epochs, "tune": _of_tuning}


def _accuracy(name: str) -> Any:
    return lambda samples: samples[name]["accuracy"]


def _table(names: Sequence[str], rounds: Sequence[Round]) -> Table:
    rows = [("run", "accuracy", "seconds", "seconds of CPU")]
    for name in names:
        figures = []
        for figure, form in (("accuracy", ".2%"), ("seconds", ".1f"), ("cpu_seconds", ".1f")):
            has = figure in rounds[0].samples[name]
            median = estimate(rounds, lambda s, n=name, f=figure: s[n][f]).median if has else None
            figures.append("" if median is None else format(median, form))
        rows.append((name, *figures))
    return Table("Ants and bees, medians", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
