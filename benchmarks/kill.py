"""Kills what trains, at random and at every file operation, and looks at what comes out.

    python -m benchmarks.kill [--worker 50] [--server 20] [--stopped 3] [--operations]

Each trial trains the same tiny network on scikit-learn's digits and compares its weights with those
of a run that nobody disturbed. One JSON line a trial; the exit status is 1 if any has a fault.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from app.jobs.database import Database
from app.jobs.job import EventType, Job, Kind, NewJob, State
from app.jobs.local_executor import LocalExecutor
from app.jobs.runner import Runner
from app.jobs.store import JobStore
from models import checkpoint
from models.store import ModelStore

LEASE_S: Final = 3.0
PATIENCE_S: Final = 120.0
CONFIG: Final = {
    **{"dataset": "digits", "network": "mlp", "network_options": {"hidden": [16]}},
    **{"device": "cpu", "threads": 1, "num_workers": 0, "batch_size": 8, "report_every": 10},
    "snapshot_seconds": 0.1,
}


class Home:
    """A home folder with its store of jobs."""

    def __init__(self, folder: Path, *, epochs: int, url: str | None = None) -> None:
        self.folder, self.epochs, self.url = folder, epochs, url
        folder.mkdir(parents=True, exist_ok=True)
        self.store = JobStore(Database(url or f"sqlite:///{folder}/jobs.db"), lease_s=LEASE_S)
        self.models = ModelStore(folder / "models")

    def is_locked(self) -> bool:
        """Whether a process is in the middle of a read or a write of SQLite's file."""
        if self.url:
            return False
        database = sqlite3.connect(self.folder / "jobs.db", timeout=0.5, isolation_level=None)
        with contextlib.closing(database):
            try:
                database.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                return True
            database.execute("ROLLBACK")
            return False

    def submit(self, name: str, **changes: Any) -> Job:
        config = {**CONFIG, "epochs": self.epochs, **changes}
        options = {"method": "train", "name": name, "config": config}
        return self.store.create(NewJob(Kind.FINE_TUNING, options, idempotency_key=name))

    def runner(self, command: tuple[str, ...] = ("-m", "app.jobs.work")) -> Runner:
        return Runner(self.store, LocalExecutor(self.folder, 1, LEASE_S, command), grace_s=5)

    def process(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`pytorchlib worker` or `serve` over this home."""
        command = [sys.executable, "-m", "app", *arguments, "--home", str(self.folder)]
        command += ["--lease-s", str(LEASE_S), "--job-threads", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.url:
            environment["PYTORCHLIB_DATABASE_URL"] = self.url
        log = (self.folder / "log").open("ab")
        with contextlib.closing(log):
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def children(self, parent: int) -> list[psutil.Process]:
        """The processes that train for `parent`."""
        with contextlib.suppress(psutil.Error):
            return [
                child
                for child in psutil.Process(parent).children()
                if any("app.jobs.work" in one or "kill_child" in one for one in child.cmdline())
            ]
        return []

    def weights(self, name: str) -> str:
        """The sha256 of the only version's weights."""
        file = self.models.version(name, 1).folder / "weights.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def faults(self, job: Job, expected: str) -> list[str]:
        """What must not be after a job has ended."""
        name = str(job.options["name"])
        if job.state is not State.SUCCEEDED:
            return [f"the job is {job.state}: {job.error or job.reason}"]
        faults = []
        versions = self.models.versions(name)
        if versions != [1]:
            faults.append(f"versions {versions}")
        checkpoint.load(self.models.version(name, 1).folder)
        if self.weights(name) != expected:
            faults.append("other weights")
        if list((self.folder / "models" / name).glob(".staging-*")):
            faults.append("something half-written is left")
        events, _ = self.store.events(job.id, limit=10_000)
        if [event.sequence for event in events] != list(range(1, len(events) + 1)):
            faults.append("events are missing or doubled")
        if sum(event.data.get("state") == "succeeded" for event in events) != 1:
            faults.append("it did not succeed once")
        return faults

    def claimed_after(self, job_id: str, moment: float) -> float | None:
        """Seconds from `moment` until a worker took the job again; a server's start is in it."""
        for event in self.store.events(job_id, limit=10_000)[0]:
            if event.time > moment and event.data.get("state") == "running":
                return round(event.time - moment, 2)
        return None

    def goes_on_after(self, job_id: str, moment: float) -> float | None:
        """Seconds from `moment` until training was seen to go on; None if it never did."""
        is_again = False
        for event in self.store.events(job_id, limit=10_000)[0]:
            # What a dead process had said may be written down a little later.
            is_again = is_again or (event.time > moment and event.data.get("state") == "running")
            sign = event.type is EventType.METRICS or event.data.get("state") == "succeeded"
            if sign and is_again:
                return round(event.time - moment, 2)
        return None


async def settled(home: Home, job: Job) -> Job:
    """Wait until the job has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = await asyncio.to_thread(home.store.get, job.id)
        if found.is_final:
            return found
        await asyncio.sleep(0.05)
    return await asyncio.to_thread(home.store.get, job.id)


async def begun(home: Home, job: Job) -> None:
    """Wait until a snapshot of the job is on disk."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not home.store.get(job.id).snapshot_step:
        await asyncio.sleep(0.02)


async def undisturbed(home: Home) -> tuple[str, float]:
    """The weights of a run that nobody disturbs, and how many seconds it takes."""
    runner, began = home.runner(), time.monotonic()
    runner.start()
    job = await settled(home, home.submit("undisturbed"))
    await runner.stop()
    if job.state is not State.SUCCEEDED:
        raise RuntimeError(f"the undisturbed run is {job.state}: {job.error or job.reason}")
    return home.weights("undisturbed"), time.monotonic() - began


async def kill_worker(home: Home, name: str, expected: str, after_s: float) -> dict[str, Any]:
    """SIGKILL the process of a job `after_s` seconds after it began."""
    runner = home.runner()
    runner.start()
    job = home.submit(name)
    while not (children := home.children(os.getpid())):
        await asyncio.sleep(0.01)
    await asyncio.sleep(after_s)
    moment = time.time()
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    job = await settled(home, job)
    await runner.stop()
    return {
        "trial": "worker",
        "after_s": round(after_s, 2),
        "attempts": job.attempt,
        "goes_on_s": home.goes_on_after(job.id, moment),
        "faults": home.faults(job, expected),
    }


async def kill_at_operation(home: Home, name: str, expected: str, number: int) -> dict[str, Any]:
    """SIGKILL the process of a job at its file operation `number`, once."""
    runner = home.runner(("-m", "benchmarks.kill_child", str(number)))
    runner.start()
    job = home.submit(name)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = home.store.get(job.id)
        if found.attempt > 1 or found.is_final:
            break
        await asyncio.sleep(0.02)
        if found.reason and "signal 9" in found.reason:
            break
    await runner.stop()
    was_killed = not home.store.get(job.id).is_final
    if was_killed:
        runner = home.runner()
        runner.start()
        await settled(home, job)
        await runner.stop()
    job = home.store.get(job.id)
    faults = home.faults(job, expected)
    return {"trial": "operation", "number": number, "killed": was_killed, "faults": faults}


async def kill_server(home: Home, name: str, expected: str, after_s: float) -> dict[str, Any]:
    """SIGKILL a server with one job running and one queued, and start it again."""
    server = home.process("serve", "--port", "0", "--device", "cpu", "--threads", "1")
    jobs = [home.submit(f"{name}-{number}") for number in range(2)]
    try:
        await begun(home, jobs[0])
        await asyncio.sleep(after_s)
        server.kill()
        server.wait(10)
        moment = time.time()
        server = home.process("serve", "--port", "0", "--device", "cpu", "--threads", "1")
        ended = [await settled(home, job) for job in jobs]
    finally:
        server.kill()
        server.wait(10)
    first = next((job for job in ended if (job.finished or moment) > moment), ended[0])
    return {
        "trial": "server",
        "after_s": round(after_s, 2),
        "attempts": [job.attempt for job in ended],
        "claimed_s": home.claimed_after(first.id, moment),
        "goes_on_s": home.goes_on_after(first.id, moment),
        "faults": [fault for job in ended for fault in home.faults(job, expected)],
    }


async def stop_worker(home: Home, name: str, expected: str) -> dict[str, Any]:
    """SIGSTOP a worker for more than three leases while another takes its job; then SIGCONT.

    Not within a write: SQLite has one lock for the whole database, and who is stopped while holding
    it stops everybody until it goes on or dies.
    """
    first = home.process("worker")
    job = home.submit(name)
    second = None
    try:
        await begun(home, job)
        first.send_signal(signal.SIGSTOP)
        while home.is_locked():
            first.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.02)
            first.send_signal(signal.SIGSTOP)
        second = home.process("worker")
        await asyncio.sleep(3.2 * LEASE_S)
        deadline = time.monotonic() + PATIENCE_S
        while (taken := home.store.get(job.id)).attempt < 2 and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        first.send_signal(signal.SIGCONT)
        job = await settled(home, job)
        await asyncio.sleep(LEASE_S)
        faults = home.faults(home.store.get(job.id), expected)
        if taken.attempt < 2:
            faults.append("nobody took the job of the stopped worker")
        if home.store.get(job.id) != job:
            faults.append("the stale worker changed the job")
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.wait(10)
    return {"trial": "stopped", "attempts": job.attempt, "faults": faults}


async def trials(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every trial that was asked for."""
    home = Home(folder, epochs=options.epochs)
    expected, took_s = await undisturbed(home)
    draw = random.Random(options.seed)
    say({"trial": "undisturbed", "seconds": round(took_s, 2), "sha256": expected, "faults": []})
    done = []
    for number in range(options.worker):
        done.append(await kill_worker(home, f"w{number}", expected, draw.uniform(0.0, took_s)))
        say(done[-1])
    for number in range(options.stopped):
        done.append(await stop_worker(home, f"t{number}", expected))
        say(done[-1])
    for number in range(options.server):
        done.append(await kill_server(home, f"s{number}", expected, draw.uniform(0.0, 2.0)))
        say(done[-1])
    for number in range(1, options.operations + 1):
        done.append(await kill_at_operation(home, f"o{number}", expected, number))
        say(done[-1])
        if not done[-1]["killed"]:
            break
    return iter(done)


def say(trial: dict[str, Any]) -> None:
    """One line, at once."""
    print(json.dumps(trial), flush=True)


def main() -> int:
    """Run the trials and count the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", type=int, default=50, help="kills of the process that trains")
    parser.add_argument("--server", type=int, default=20, help="kills of the server")
    parser.add_argument("--stopped", type=int, default=3, help="workers stopped for three leases")
    parser.add_argument("--operations", type=int, default=1000, help="file operations at most")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        done = list(asyncio.run(trials(options, Path(folder))))
    slowest: dict[str, float] = {}
    for trial in done:
        if trial.get("goes_on_s"):
            kind = trial["trial"]
            slowest[kind] = max(slowest.get(kind, 0.0), trial["goes_on_s"])
    faults = [trial for trial in done if trial["faults"]]
    say({"trials": len(done), "with_faults": len(faults), "slowest_to_go_on_s": slowest})
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
