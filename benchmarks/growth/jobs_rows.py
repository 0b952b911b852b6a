"""What jobs cost as more of them are stored."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.jobs.database import Database
from app.jobs.job import Kind, NewJob, State
from app.jobs.store import JobStore
from app.jobs.tables import JOBS
from benchmarks.growth.row import Curve, Measure, Row
from benchmarks.rounds import Sample

NUM_ASKED: Final = 20
NEW: Final = NewJob(Kind.FINE_TUNING, {"method": "train", "config": {"dataset": "digits"}})
AT_ONCE: Final = 10_000


def rows() -> list[Row]:
    """All of this file."""
    names = {"submit": "submit", "read": "read", "list": "list a page", "cancel": "cancel"}
    curves = [Curve(f"{name}_us", f"CPU us to {words}", 0.0) for name, words in names.items()]
    return [Row("jobs", "jobs stored", [10, 100, 1000, 10_000, 30_000, 100_000], curves, _jobs)]


@contextmanager
def _jobs(folder: Path) -> Iterator[Measure]:
    """A database for each size; what is submitted is deleted again."""
    stores: dict[int, JobStore] = {}

    def measure(size: int) -> Sample:
        if size not in stores:
            stores[size] = _filled(folder / f"{size}.db", size)
        store = stores[size]
        made: list[str] = []
        sample = {
            "submit_us": _each(lambda _: made.append(store.create(NEW).id)),
            "read_us": _each(lambda index: store.get(made[index])),
            "list_us": _each(lambda _: store.list(Kind.FINE_TUNING)),
            "cancel_us": _each(lambda index: store.cancel(made[index])),
        }
        for one in made:
            store.delete(one)
        return sample

    yield measure
    for store in stores.values():
        store.database.close()


def _each(act: Callable[[int], object]) -> float:
    """Microseconds of CPU that one call takes."""
    began = time.process_time()
    for index in range(NUM_ASKED):
        act(index)
    return (time.process_time() - began) * 1e6 / NUM_ASKED


def _filled(path: Path, count: int) -> JobStore:
    """Jobs that are over, the oldest first."""
    store = JobStore(Database(f"sqlite:///{path}"))
    row = {
        "kind": Kind.FINE_TUNING,
        "state": State.SUCCEEDED,
        "options": dict(NEW.options),
        "by": NEW.by,
        "fingerprint": "0" * 64,
        "created": 1.0,
    }
    for start in range(0, count, AT_ONCE):
        rows = [{**row, "id": f"ftjob-{n}"} for n in range(start, min(count, start + AT_ONCE))]
        with store.database.write() as connection:
            connection.execute(JOBS.insert(), rows)
    return store
