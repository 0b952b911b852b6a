"""A runner that is told to stop stops, also in the very moment in which it is told of something."""

import asyncio
from pathlib import Path

import pytest

from app.jobs.database import Database
from app.jobs.local_executor import MOST_SPINS, SPINS, LocalExecutor, environ_of_child
from app.jobs.runner import Runner
from app.jobs.store import JobStore


@pytest.mark.anyio
async def test_a_stop_together_with_a_nudge_is_not_forgotten(tmp_path: Path) -> None:
    store = JobStore(Database(f"sqlite:///{tmp_path}/jobs.db"), lease_s=3.0)
    for _ in range(5):
        runner = Runner(store, LocalExecutor(tmp_path, 1, 3.0))
        runner.start()
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().call_soon(runner._nudged.set)
        await asyncio.sleep(0)  # the waiter is awake, and has not run yet
        async with asyncio.timeout(10):
            await runner.stop()
    store.database.close()


@pytest.mark.parametrize(
    ("said", "spins"),
    [
        ({}, str(MOST_SPINS)),
        ({SPINS: "10000"}, str(MOST_SPINS)),
        ({SPINS: "7"}, "7"),
        ({SPINS: "INFINITY"}, "INFINITY"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
        ({"OMP_WAIT_POLICY": "passive", SPINS: "3000"}, str(MOST_SPINS)),
    ],
)
def test_threads_of_a_job_spin_little_unless_somebody_said_less(
    said: dict[str, str], spins: str | None
) -> None:
    environ = environ_of_child({"HOME": "/", **said})
    assert environ.get(SPINS) == spins
    assert environ["HOME"] == "/"
