"""What runs leave behind: snapshots go some time after a job's end, and nothing else ever does."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.jobs.database import Database
from app.jobs.job import Job, JobError, Kind, NewJob
from app.jobs.retention import Retention
from app.jobs.store import JobStore
from app.jobs.worker import open_retention
from app.settings import Settings

KINDS = (Kind.FINE_TUNING,)
KEPT = {"events", "result.json", "answers.safetensors"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    database = Database(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield JobStore(database)
    database.close()


def leave_behind(runs: Path, job_id: str) -> Path:
    """What a run of two attempts has on disk."""
    run = runs / job_id
    for folder in ("000001/all/step-0000000010", "000002/all/step-0000000020", ".writing-000003"):
        (run / folder).mkdir(parents=True)
        (run / folder / "weights.safetensors").write_bytes(b"x" * 100)
    (run / "events").mkdir()
    for name in ("events/events.out.tfevents.1", "result.json", "answers.safetensors"):
        (run / name).write_bytes(b"y")
    return run


def claimed(store: JobStore) -> Job:
    job = store.create(NewJob(Kind.FINE_TUNING, {}))
    found = store.claim(KINDS, "somebody")
    assert found is not None
    assert found.id == job.id
    return found


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


def look(store: JobStore, runs: Path, keep_s: float) -> int:
    return asyncio.run(Retention(store, runs, keep_s).look())


def test_snapshots_of_every_ending_go_and_the_curves_stay(store: JobStore, tmp_path: Path) -> None:
    done, failed, cancelled = claimed(store), claimed(store), claimed(store)
    store.succeed(done, {})
    store.fail(failed, JobError("disk", "it failed"))
    store.cancel(cancelled.id)
    folders = [leave_behind(tmp_path, job.id) for job in (done, failed, cancelled)]
    assert look(store, tmp_path, 3600.0) == 0
    assert all("000002" in names(run) for run in folders)
    assert look(store, tmp_path, -1.0) == 3
    assert all(names(run) == KEPT for run in folders)
    assert look(store, tmp_path, -1.0) == 0


def test_what_can_go_on_and_what_is_not_ours_is_left_alone(store: JobStore, tmp_path: Path) -> None:
    paused, released, running = claimed(store), claimed(store), claimed(store)
    store.set_aside(paused, "the disk is full")
    store.release(released, "its worker died")
    folders = [leave_behind(tmp_path, job.id) for job in (paused, released, running)]
    folders.append(leave_behind(tmp_path, "a-run-of-the-command-line"))
    assert look(store, tmp_path, -1.0) == 0
    assert all(names(run) > KEPT for run in folders)
    assert look(store, tmp_path / "nowhere", -1.0) == 0


def test_a_new_day_begins_an_hour_after_the_end_at_the_earliest(
    store: JobStore, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, snapshot_days=0)
    job = claimed(store)
    store.cancel(job.id)
    run = leave_behind(tmp_path / "runs", job.id)
    assert asyncio.run(open_retention(settings, store).look()) == 0
    assert "000002" in names(run)
