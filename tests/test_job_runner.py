"""The runner with real processes: what is asked of jobs, what goes wrong, what people are told."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.jobs.job import Job, Kind, NewJob, State
from app.jobs.local_executor import MOST_SPINS, SPINS
from app.jobs.memory_limit import MEBIBYTE, MemoryLimit
from app.jobs.runner import Runner
from benchmarks.kill import Home, begun, settled, undisturbed
from tests.databases import postgres_cluster

pytestmark = [pytest.mark.slow, pytest.mark.anyio]
PLENTY = 2000
"""Epochs that nobody waits for."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", epochs=2)


async def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def ended(home: Home, act: Callable[[Runner, Job], Awaitable[Any]], **changes: Any) -> Job:
    """Submit a job, do something to it once it has a snapshot, and wait for its end."""
    runner = home.runner()
    runner.start()
    try:
        job = home.submit("m", **changes)
        await begun(home, job)
        await act(runner, job)
        return await settled(home, job)
    finally:
        await runner.stop()


def processes_of_jobs() -> list[psutil.Process]:
    """None yet where a job's process is forked and has not become what it will be."""
    found = []
    for one in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # gone, or a zombie
            if "app.jobs.work" in " ".join(one.cmdline()):
                found.append(one)
    return found


def process_of_job() -> psutil.Process:
    return processes_of_jobs()[0]


async def test_a_job_is_trained_published_and_told_of(home: Home) -> None:
    runner = home.runner()
    runner.start()
    job = await settled(home, home.submit("m"))
    await runner.stop()
    assert (job.state, job.error) == (State.SUCCEEDED, None)
    assert job.result is not None
    assert (job.result["model"], job.result["version"]) == ("m", 1)
    lineage = home.models.version("m", 1).manifest().lineage
    assert lineage.run == job.id
    events = home.store.events(job.id)[0]
    assert [one.data["epoch"] for one in events if one.data.get("phase") == "epoch"] == [1, 2]
    assert list((home.folder / "runs" / job.id / "events").iterdir())


async def test_a_child_steps_back_and_goes_with_its_server(home: Home) -> None:
    async def look(runner: Runner, _: Job) -> None:
        child = process_of_job()
        threads = [int(one.name) for one in Path(f"/proc/{child.pid}/task").iterdir()]
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
        assert os.getsid(child.pid) == os.getsid(0), "another session has a share of its own"
        assert os.getpgid(child.pid) == child.pid, "or Ctrl-C would end it too"
        assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) == 700
        assert child.environ()[SPINS] == str(MOST_SPINS), "its threads wait asleep for each other"
        runner._attempts[_.id]._nudged.set()
        home.store.cancel(_.id)
        await until(lambda: not child.is_running())

    job = await ended(home, look, epochs=PLENTY)
    assert job.state is State.CANCELLED
    assert home.models.names() == []


async def test_stop_keeps_the_best_and_pause_survives(home: Home) -> None:
    async def pause_then_stop(runner: Runner, job: Job) -> None:
        home.store.pause(job.id)
        runner.nudge()
        await until(lambda: home.store.get(job.id).state is State.PAUSED)
        await until(lambda: not runner._attempts)
        home.store.resume(job.id)
        await until(lambda: home.store.get(job.id).state is State.RUNNING)
        home.store.stop(job.id)
        runner.nudge()

    job = await ended(home, pause_then_stop, epochs=PLENTY)
    assert job.state is State.SUCCEEDED, job.error
    assert job.attempt == 2
    assert home.models.versions("m") == [1]


async def test_a_server_that_stops_puts_its_jobs_back_and_the_bits_stay(home: Home) -> None:
    home.epochs = 12
    expected, _ = await undisturbed(home)
    runner = home.runner()
    runner.start()
    job = home.submit("m")
    await begun(home, job)
    await runner.stop()
    waiting = home.store.get(job.id)
    assert (waiting.state, waiting.num_fruitless) == (State.QUEUED, 0)
    assert waiting.reason is not None
    assert "server was stopped" in waiting.reason
    runner = home.runner()
    runner.start()
    job = await settled(home, job)
    await runner.stop()
    assert home.faults(job, expected) == []


async def test_a_process_that_always_dies_is_given_up_with_its_reason(home: Home) -> None:
    runner = home.runner(("-c", "import sys; sys.exit('no such luck')"))
    runner.start()
    job = await settled(home, home.submit("m"))
    await runner.stop()
    assert job.error is not None
    assert (job.state, job.error.code, job.attempt) == (State.FAILED, "attempts_exhausted", 5)
    assert "ended with status 1: no such luck" in job.error.message


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"optimizer": "sgd", "learning_rate": 1e30}, "loss_not_finite", "lower --lr"),
        ({"dataset": "/nowhere/deleted"}, "dataset_", "/nowhere/deleted"),
        ({"epochs": 0}, "config_error", "--epochs"),
    ],
)
async def test_what_cannot_work_fails_at_once_with_a_sentence(
    home: Home, changes: dict[str, Any], code: str, sentence: str
) -> None:
    runner = home.runner()
    runner.start()
    job = await settled(home, home.submit("m", **changes))
    await runner.stop()
    assert job.error is not None
    assert (job.state, job.attempt) == (State.FAILED, 1)
    assert job.error.code.startswith(code)
    assert sentence in job.error.message


async def test_a_full_disk_pauses_a_job_until_there_is_room(home: Home) -> None:
    async def fill(_: Runner, job: Job) -> None:
        process_of_job().rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))
        await until(lambda: home.store.get(job.id).state is not State.RUNNING)
        waiting = home.store.get(job.id)
        assert waiting.state is State.PAUSED
        assert waiting.reason is not None
        assert "the disk is full" in waiting.reason
        home.store.resume(job.id)
        await until(lambda: home.store.get(job.id).state is State.RUNNING)
        home.store.stop(job.id)

    assert (await ended(home, fill, epochs=PLENTY)).state is State.SUCCEEDED


async def test_a_job_that_takes_too_much_memory_ends_with_a_reason(home: Home) -> None:
    runner = Runner(
        home.store, home.runner()._executor, memory=MemoryLimit(100 * MEBIBYTE), grace_s=5
    )
    runner.start()
    job = await settled(home, home.submit("m", epochs=PLENTY))
    await runner.stop()
    assert job.error is not None
    assert job.error.code == "out_of_memory"
    assert "100 MiB is its limit" in job.error.message


async def test_a_stopped_child_holds_nothing_up(home: Home) -> None:
    async def freeze(_: Runner, job: Job) -> None:
        child = process_of_job()
        child.send_signal(signal.SIGSTOP)
        home.store.cancel(job.id)
        await until(lambda: not child.is_running(), 20)

    assert (await ended(home, freeze, epochs=PLENTY)).state is State.CANCELLED


async def test_a_database_that_goes_and_comes_back_loses_nothing(tmp_path: Path) -> None:
    with postgres_cluster() as cluster:
        home = Home(tmp_path / "home", epochs=12, url=cluster.new_database())
        expected, _ = await undisturbed(home)

        async def outage(_: Runner, __: Job) -> None:
            await asyncio.to_thread(cluster.stop)
            await asyncio.sleep(1)
            await asyncio.to_thread(cluster.start)

        job = await ended(home, outage)
        assert home.faults(job, expected) == []
        home.store.database.close()


async def test_slots_bound_what_runs_at_once(home: Home) -> None:
    first, second = home.submit("a", epochs=PLENTY), home.submit("b")
    runner = home.runner()
    runner.start()
    await begun(home, first)
    assert home.store.get(second.id).state is State.QUEUED
    assert home.store.place(home.store.get(second.id)) == 0
    home.store.cancel(first.id)
    runner.nudge()
    assert (await settled(home, second)).state is State.SUCCEEDED
    await runner.stop()


def test_a_kind_without_a_process_is_left_alone(home: Home) -> None:
    job = home.store.create(NewJob(Kind.EVALUATION, {}))

    async def wait() -> None:
        runner = home.runner()
        runner.start()
        await asyncio.sleep(1.5)
        await runner.stop()

    asyncio.run(wait())
    assert home.store.get(job.id).state is State.QUEUED


async def test_a_killed_helper_begins_the_job_again_and_changes_no_bit(home: Home) -> None:
    shared = {"num_processes": 2, "batch_size": 256, "epochs": 30}
    runner = home.runner()
    runner.start()
    try:
        whole = await settled(home, home.submit("whole", **shared))
        job = home.submit("killed", **shared)
        await begun(home, job)
        (helper,) = process_of_job().children()
        helper.kill()
        job = await settled(home, job)
    finally:
        await runner.stop()
    assert (whole.state, job.state, job.attempt) == (State.SUCCEEDED, State.SUCCEEDED, 2)
    events = home.store.events(job.id)[0]
    assert any("rank 1 was killed by SIGKILL" in one.message for one in events)
    assert home.weights("killed") == home.weights("whole")
    assert home.models.versions("killed") == [1]
    assert home.models.version("killed", 1).manifest().lineage.environment["processes"] == "2"


async def test_pausing_and_cancelling_leave_no_helper(home: Home) -> None:
    async def pause_then_cancel(runner: Runner, job: Job) -> None:
        (helper,) = process_of_job().children()
        home.store.pause(job.id)
        runner.nudge()
        await until(lambda: home.store.get(job.id).state is State.PAUSED)
        await until(lambda: not helper.is_running())
        home.store.resume(job.id)
        await until(lambda: home.store.get(job.id).state is State.RUNNING)
        await until(lambda: any(one.children() for one in processes_of_jobs()))
        (helper,) = process_of_job().children()
        home.store.cancel(job.id)
        runner.nudge()
        await until(lambda: not helper.is_running(), 10)

    job = await ended(home, pause_then_cancel, epochs=PLENTY, num_processes=2)
    assert job.state is State.CANCELLED
