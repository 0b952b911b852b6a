"""`python -m benchmarks.jobs`: what asking about jobs costs with many of them stored.

Two servers that work on no jobs, one over a home with few jobs and one over a home with many; both
are asked the same over HTTP, one after the other in random order, round by round. A ratio is that
of the medians of one round, reported as the median over rounds with a 95 % interval.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from PIL import Image

from app.jobs.database import Database
from app.jobs.job import EventType, JobError, Kind, NewEvent, NewJob
from app.jobs.store import JobStore
from app.jobs.tables import EVENTS, JOBS
from benchmarks.machine import cores, this_machine
from benchmarks.record import Record, Table, tell
from benchmarks.rounds import Cell, Estimate, Sample, estimate, measure_rounds, ratio, undisturbed
from benchmarks.system import HOST, Launch, System, free_port

GOAL: Final = 1.25
"""The same, as far as a machine that others use can tell."""
NUM_FEW: Final = 10
NUM_EVENTS: Final = 20
"""Of each job that is stored."""
QUEUED_OF: Final = 10
"""One job of so many waits; the others have ended."""
PAGE: Final = 5
"""Jobs of a page, so that the few fill two of them."""
OPERATIONS: Final = ("submit", "read", "list", "list_older", "events", "cancel")


def main() -> None:
    """Measure, and print what was found; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--many", type=int, default=10_000, help="jobs that are stored")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=10, help="of each operation in a round")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ratios, medians = measured(Path(folder), arguments)
    record = recorded(ratios, medians, arguments)
    record.show(write=arguments.write)
    sys.exit(max(one.low for one in ratios.values()) > GOAL)


def measured(
    folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Estimate], dict[str, dict[str, float]]]:
    """Many to few by operation, and the medians in milliseconds."""
    with contextlib.ExitStack() as stack:
        cells = []
        for name, num_jobs in (("few", NUM_FEW), ("many", arguments.many)):
            client = stack.enter_context(asked(folder / name, num_jobs))
            cells.append(Cell(name, asking(client, arguments.repeats)))
        for cell in cells:
            cell.measure()  # whatever is done once
        rounds = undisturbed(measure_rounds(cells, arguments.rounds, tell=tell))
    medians = {
        cell.name: {
            name: statistics.median(one.samples[cell.name][name] for one in rounds)
            for name in OPERATIONS
        }
        for cell in cells
    }
    return {name: estimate(rounds, ratio("many", "few", name)) for name in OPERATIONS}, medians


@contextlib.contextmanager
def asked(home: Path, num_jobs: int) -> Iterator[httpx.Client]:
    """A client of a server over a home with so many jobs and a dataset."""
    fill(home, num_jobs)
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--no-jobs", "--home", str(home)]
    command += ["--port", str(port), "--device", "cpu", "--threads", "1"]
    launch = Launch(home.name, command, port, "/readyz")
    with (
        System(launch, cores(), home / "log"),
        httpx.Client(base_url=f"http://{HOST}:{port}/v1", timeout=60, trust_env=False) as client,
    ):
        yield client


def fill(home: Path, num_jobs: int) -> None:
    """Write so many jobs down, with their events, as years of use would."""
    home.mkdir()
    database = Database(f"sqlite:///{home / 'jobs.db'}")
    store = JobStore(database)
    method = {"type": "linear_probe", "linear_probe": {"hyperparameters": {}}}
    options = {"method": "linear_probe", "name": "parts", "request": {"method": method}}
    first = store.create(NewJob(Kind.FINE_TUNING, options, model="digits:1", dataset="dset-1"))
    held = store.claim((Kind.FINE_TUNING,), "somebody")
    assert held is not None
    metrics = NewEvent("epoch", type=EventType.METRICS, data={"phase": "epoch", "step": 1})
    store.record(held, [metrics] * (NUM_EVENTS - 3))
    store.fail(held, JobError("loss_not_finite", "the loss is not finite"))
    with database.write() as connection:
        row = connection.execute(JOBS.select().where(JOBS.c.id == first.id)).one()._asdict()
        found = connection.execute(EVENTS.select().where(EVENTS.c.job == row["number"]))
        events = [one._asdict() for one in found]
        copies, theirs = [], []
        for number in range(row["number"] + 1, row["number"] + num_jobs):
            state = "queued" if number % QUEUED_OF == 0 else "failed"
            copies.append({**row, "number": number, "id": f"ftjob-{number:024d}", "state": state})
            theirs += [{**one, "job": number} for one in events]
        connection.execute(JOBS.insert(), copies)
        connection.execute(EVENTS.insert(), theirs)
    database.close()


def asking(client: httpx.Client, repeats: int) -> Callable[[], Sample]:
    """What measures every operation a few times, and gives the median of each in milliseconds."""
    sent = client.post("/datasets", content=pictures(), headers={"content-type": "application/zip"})
    wanted = {"model": "cnn", "training_file": sent.raise_for_status().json()["id"]}
    wanted |= {"suffix": "parts", "method": {"type": "from_scratch"}}
    jobs = "/fine_tuning/jobs"
    page = client.get(jobs, params={"limit": PAGE}).raise_for_status().json()["data"]
    oldest = page[-1]["id"]

    def measure() -> Sample:
        taken: dict[str, list[float]] = {name: [] for name in OPERATIONS}

        def timed(name: str, method: str, url: str, **options: Any) -> Any:
            began = time.perf_counter()
            answer = client.request(method, url, **options)
            taken[name].append((time.perf_counter() - began) * 1000)
            return answer.raise_for_status().json()

        for _ in range(repeats):
            job = timed("submit", "POST", jobs, json=wanted)["id"]
            timed("read", "GET", f"{jobs}/{job}")
            timed("list", "GET", jobs, params={"limit": PAGE})
            timed("list_older", "GET", jobs, params={"limit": PAGE, "after": oldest})
            timed("events", "GET", f"{jobs}/{oldest}/events")
            timed("cancel", "POST", f"{jobs}/{job}/cancel")
        return {name: statistics.median(values) for name, values in taken.items()}

    return measure


def pictures() -> bytes:
    """A small dataset of two classes."""
    file, random = io.BytesIO(), np.random.default_rng(0)
    with zipfile.ZipFile(file, "w") as archive:
        for index in range(24):
            png = io.BytesIO()
            pixels = random.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(png, "PNG")
            archive.writestr(f"{'ants' if index % 2 else 'bees'}/{index}.png", png.getvalue())
    return file.getvalue()


def recorded(
    ratios: dict[str, Estimate],
    medians: dict[str, dict[str, float]],
    arguments: argparse.Namespace,
) -> Record:
    """As it is told and kept."""
    rows = [("operation", f"{NUM_FEW} jobs, ms", f"{arguments.many:,} jobs, ms", "ratio (95 %)")]
    for name, found in ratios.items():
        few, many = medians["few"][name], medians["many"][name]
        rows.append((name.replace("_", " "), f"{few:.2f}", f"{many:.2f}", str(found)))
    return Record(
        name="jobs",
        command=f"python -m benchmarks.jobs --many {arguments.many} --rounds {arguments.rounds}",
        machine=this_machine(),
        method=[
            f"{NUM_EVENTS} events a job; one of {QUEUED_OF} jobs waits, the others have ended.",
            f"{arguments.repeats} times a round; a submitted job is cancelled in the same round.",
            f"Goal: the same, a ratio of at most {GOAL:g}.",
        ],
        tables=[Table("One request over HTTP, SQLite", rows)],
        figures={
            "ratios": {
                name: {"median": one.median, "low": one.low, "high": one.high}
                for name, one in ratios.items()
            },
            "medians_ms": medians,
            "reached": max(one.median for one in ratios.values()) <= GOAL,
        },
    )


if __name__ == "__main__":
    main()
