"""The parts that jobs need, built from the settings, and the role that does nothing but run them.

`pytorchlib serve --no-jobs` and `pytorchlib worker` share one home folder and one database, so that
a new version of the server is rolled out without touching a training run.
"""

import asyncio
import signal

from app.jobs.database import Database
from app.jobs.local_executor import LocalExecutor
from app.jobs.memory_limit import MEBIBYTE, MemoryLimit
from app.jobs.runner import Runner
from app.jobs.store import JobStore
from app.settings import Settings


def open_store(settings: Settings) -> JobStore:
    """The job store of this installation; its database is first touched when it is first used."""
    url = settings.database_url
    default = f"sqlite:///{(settings.home / 'jobs.db').resolve()}"
    database = Database(url.get_secret_value() if url else default)
    if url is None:
        settings.home.mkdir(parents=True, exist_ok=True)
    return JobStore(database, lease_s=settings.lease_s)


def open_runner(settings: Settings, store: JobStore) -> Runner:
    """What runs the jobs of this process, not yet started."""
    executor = LocalExecutor(
        settings.home.resolve(), threads=settings.job_threads, lease_s=settings.lease_s
    )
    return Runner(
        store,
        executor,
        slots=settings.job_slots,
        memory=MemoryLimit(settings.job_memory_mb * MEBIBYTE),
        grace_s=settings.job_grace_s,
    )


def work(settings: Settings) -> None:
    """Run jobs until SIGTERM or Ctrl-C; running ones write a snapshot and go back to the queue."""
    asyncio.run(_work(settings))


async def _work(settings: Settings) -> None:
    store = open_store(settings)
    runner = open_runner(settings, store)
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    runner.start()
    await stopping.wait()
    await runner.stop()
    await asyncio.to_thread(store.database.close)
