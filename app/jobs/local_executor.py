"""Processes of this machine that do the work of jobs: spawned, never forked."""

import asyncio
import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from app.jobs.job import Job

MAX_LINE_BYTES: Final = 1024 * 1024
NUM_LAST_WORDS: Final = 20
ENDING_S: Final = 10.0
"""How long a killed process may take to be gone."""
SPINS: Final = "GOMP_SPINCOUNT"
MOST_SPINS: Final = 2000
"""Before a thread of OpenMP that waits for others sleeps. With more, a job that has to give way
keeps both processors busy with waiting; with fewer it loses speed where it is alone."""


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """Starts children.

    Attributes:
        home: the folder of models, datasets and runs.
        threads: that a child may compute with; 0 leaves it to torch.
        lease_s: after so much silence a child believes that its job is another's.
        command: what Python is told to run; replaced by those who study how it dies.
    """

    home: Path
    threads: int
    lease_s: float
    command: tuple[str, ...] = ("-m", "app.jobs.work")

    async def start(self, job: Job) -> "Child":
        """Start the process of a claimed job."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=MAX_LINE_BYTES,
            env=environ_of_child(os.environ),
        )
        child = Child(process)
        order = {
            "job": job.id,
            "token": job.token,
            "options": dict(job.options),
            "by": job.by,
            "home": str(self.home.resolve()),
            "threads": self.threads,
            "lease_s": self.lease_s,
        }
        child.tell(json.dumps(order))
        return child


def environ_of_child(environ: Mapping[str, str]) -> dict[str, str]:
    """The same, with `MOST_SPINS` at most; who set a way to wait, and no spins, keeps it."""
    spins = environ.get(SPINS, "")
    if (not spins and "OMP_WAIT_POLICY" in environ) or (spins and not spins.isdigit()):
        return dict(environ)
    return {**environ, SPINS: str(min(int(spins or MOST_SPINS), MOST_SPINS))}


class Child:
    """One process that works on one attempt of one job."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.last_words: deque[str] = deque(maxlen=NUM_LAST_WORDS)
        self._errors = asyncio.create_task(self._read_errors(), name="a child's last words")

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, word: str) -> None:
        """Say one line to it; where it is gone, its end is noticed elsewhere."""
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            with contextlib.suppress(OSError):
                self._process.stdin.write(word.encode() + b"\n")

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        """What it says, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            yield json.loads(line)

    async def ended(self) -> int:
        """Wait for its end; the exit status, negative for a signal."""
        status = await self._process.wait()
        # A child of the child may hold the pipe open; its words are not waited for.
        await asyncio.wait({self._errors}, timeout=1)
        return status

    async def kill(self) -> None:
        """End it and whatever it started, and wait until it is gone."""
        with contextlib.suppress(psutil.Error):
            for descendant in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    descendant.kill()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                await self._process.wait()

    def memory_bytes(self) -> int:
        """Memory that it and its own children hold; 0 once it is gone."""
        total = 0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            for one in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += one.memory_info().rss
        return total

    async def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while chunk := await self._process.stderr.read(4096):
            self.last_words.extend(chunk.decode(errors="replace").splitlines())
