"""The parts that jobs need, built from the settings, and the role that does nothing but run them.

`pytorchlib serve --no-jobs` and `pytorchlib worker` share one home folder and one database, so that
a new version of the server is rolled out without touching a training run.
"""

import asyncio
import signal
from typing import Final

from app.jobs.courier import Courier
from app.jobs.database import Database
from app.jobs.destination import Destinations
from app.jobs.local_executor import LocalExecutor
from app.jobs.memory_limit import MEBIBYTE, MemoryLimit
from app.jobs.outbox import Outbox
from app.jobs.retention import LEAST_S, Retention
from app.jobs.runner import Runner
from app.jobs.store import JobStore
from app.jobs.webhook import SecretUnfit, secret_bytes
from app.settings import Settings

DAY_S: Final = 86_400.0


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


def open_retention(settings: Settings, store: JobStore) -> Retention:
    """What removes old snapshots, not yet started; it belongs to who runs jobs."""
    keep_s = max(settings.snapshot_days * DAY_S, LEAST_S)
    return Retention(store, settings.home.resolve() / "runs", keep_s)


def open_courier(settings: Settings, store: JobStore) -> Courier | None:
    """What delivers webhooks, not yet started; None where no host may get any.

    Raises:
        SecretUnfit: there is no secret, or one that cannot sign.
        DestinationRefused: the setting names a URL whose host is not listed.
    """
    secret, url, hosts = settings.webhook_secret, settings.webhook_url, settings.webhook_hosts
    if not hosts and url is None:
        return None
    if secret is None:
        raise SecretUnfit("webhooks are signed: set PYTORCHLIB_WEBHOOK_SECRET as well")
    key = secret_bytes(secret.get_secret_value())
    return Courier(Outbox(store.database), Destinations(hosts), key, url)


def work(settings: Settings) -> None:
    """Run jobs until SIGTERM or Ctrl-C; running ones write a snapshot and go back to the queue."""
    asyncio.run(_work(settings))


async def _work(settings: Settings) -> None:
    store = open_store(settings)
    runner = open_runner(settings, store)
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    retention = open_retention(settings, store)
    runner.start()
    retention.start()
    await stopping.wait()
    await retention.stop()
    await runner.stop()
    await asyncio.to_thread(store.database.close)
