"""A server under test: started once, pinned to its processors, frozen while others are measured."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.process_tree import VARIABLE, ProcessTree

HOST = "127.0.0.1"
STOP_DEADLINE_S = 20.0
POLL_S = 0.1
SETTLE_DEADLINE_S = 2.0
SETTLE_S = 0.05
SETTLED_SHARE = 0.2
"""Of one processor; a server that only polls uses less."""


class SystemFailed(Exception):
    """A server did not start, or ended by itself; the sentence holds its last words."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a server is started.

    Attributes:
        name: for the tables.
        command: without `taskset`.
        port: where it will listen.
        ready_path: answers 200 to GET once it is ready; empty where listening is all there is.
        environ: its whole environment.
        folder: its working folder.
        ready_within_s: how long it may take.
    """

    name: str
    command: Sequence[str]
    port: int
    ready_path: str
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    folder: Path = Path()
    ready_within_s: float = 180.0


class System:
    """One started server. Use it as a context: it is stopped at the end, whatever happens.

    Args:
        launch: how it is started.
        cores: the processors it may use.
        log: file for what it prints.

    Raises:
        SystemFailed: it ended, or was not ready in time.
    """

    def __init__(self, launch: Launch, cores: Sequence[int], log: Path) -> None:
        self.name, self.port = launch.name, launch.port
        self._log = log
        self.tree = ProcessTree(uuid.uuid4().hex)
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *launch.command]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=launch.folder,
                env={**launch.environ, VARIABLE: self.tree.token},
                # Not a session of its own: Linux may share processors out among sessions, and then
                # who generates the load waits for a job in the idle class beside the server.
                process_group=0,
            )
        try:
            self._wait_ready(launch)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "System":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def freeze(self) -> None:
        """Stop every process of it until it is thawed."""
        self.tree.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it run.

        Raises:
            SystemFailed: it has ended.
        """
        self._check_alive()
        self.tree.send(signal.SIGCONT)

    def settle(self) -> None:
        """Wait until it has ended what it began for callers who are gone, 2 s at most.

        Else those who are measured next wait for it, and one batch of many is a tenth of a short
        measurement.
        """
        deadline = time.monotonic() + SETTLE_DEADLINE_S
        is_busy = True
        while is_busy and time.monotonic() < deadline:
            before_us = self.cpu_us()
            time.sleep(SETTLE_S)
            is_busy = self.cpu_us() - before_us > SETTLED_SHARE * SETTLE_S * 1e6

    def cpu_us(self) -> int:
        """Microseconds of processor time that all its processes have used."""
        return self.tree.cpu_us()

    def memory_bytes(self) -> int:
        """Memory of all its processes (proportional set size)."""
        return self.tree.memory_bytes()

    def stop(self) -> None:
        """End it: SIGTERM to its first process, and SIGKILL to what is left."""
        self.tree.send(signal.SIGCONT)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_DEADLINE_S)
        self.tree.send(signal.SIGKILL)
        self._process.wait(STOP_DEADLINE_S)

    def _wait_ready(self, launch: Launch) -> None:
        deadline = time.monotonic() + launch.ready_within_s
        while not is_ready(launch.port, launch.ready_path):
            self._check_alive()
            if time.monotonic() > deadline:
                raise SystemFailed(
                    f"{self.name} was not ready in {launch.ready_within_s:.0f} s: {self.words()}"
                )
            time.sleep(POLL_S)

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise SystemFailed(f"{self.name} ended with {self._process.returncode}: {self.words()}")

    def words(self) -> str:
        """The last that it printed."""
        return self._log.read_text(errors="replace").strip()[-2000:]


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def is_ready(port: int, path: str) -> bool:
    """Whether GET `path` answers 200; with an empty path, whether anyone listens."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2.0)
    try:
        connection.connect()
        if not path:
            return True
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
