"""Load on a server: `wrk` in a closed loop, and a generator of our own in an open one.

A closed loop keeps N connections busy and tells what the server can do. It sends nothing while the
server is slow, so its tail flatters; the open loop (`benchmarks/open_loop.py`) is for tails.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks.open_loop import Plan, Summary
from benchmarks.payload import Payload
from benchmarks.system import HOST

GRACE_S = 30.0
ROOT = Path(__file__).resolve().parent.parent


class LoadFailed(Exception):
    """A load generator is missing, or ended without figures."""


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """What `wrk` counted.

    Attributes:
        rate_per_s: answers a second.
        not_2xx: answers with status 400 or above.
        socket_errors: connections and reads that failed, and answers that came too late.
    """

    rate_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    num_requests: int
    not_2xx: int
    socket_errors: int


def wrk_version() -> str:
    """Name and version of the closed-loop generator.

    Raises:
        LoadFailed: it is not installed.
    """
    if shutil.which("wrk") is None:
        raise LoadFailed("wrk is not installed; on Debian and Ubuntu: apt-get install wrk")
    # it prints its version together with its usage, and ends with 1
    words = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False).stdout
    return " ".join(words.split()[:2])


def closed_loop(
    payload: Payload,
    port: int,
    *,
    connections: int,
    seconds: float,
    cores: Sequence[int],
    timeout_s: float = 30.0,
) -> ClosedLoop:
    """Keep `connections` connections busy with `payload` for `seconds`.

    Args:
        cores: the processors that wrk may use; it runs one thread.
        timeout_s: an answer later than this is counted as a socket error.

    Raises:
        LoadFailed: wrk is missing, or did not end well.
    """
    wrk_version()
    with tempfile.TemporaryDirectory() as folder:
        script = payload.write_lua(Path(folder))
        command = [
            *("wrk", "--threads", "1", "--connections", str(connections)),
            *("--duration", f"{max(1, round(seconds))}s", "--timeout", f"{round(timeout_s)}s"),
            *("--script", str(script), f"http://{HOST}:{port}{payload.path}"),
        ]
        words = _run([*_pinned(cores), *command], seconds + timeout_s + GRACE_S)
    return parse_figures(words)


def open_loop(payload: Payload, plan: Plan, cores: Sequence[int]) -> Summary:
    """Offer `payload` as `plan` says, from a process of its own.

    Raises:
        LoadFailed: the generator did not end well.
    """
    with tempfile.NamedTemporaryFile() as message:
        message.write(payload.message(plan.port))
        message.flush()
        options = json.dumps(asdict(plan))
        command = [sys.executable, "-m", "benchmarks.open_loop", options, message.name]
        patience_s = plan.warm_up_s + plan.seconds + plan.timeout_s + GRACE_S
        words = _run([*_pinned(cores), *command], patience_s)
    return Summary(**json.loads(words))


def parse_figures(words: str) -> ClosedLoop:
    """The line that our script lets wrk print.

    Raises:
        LoadFailed: there is none.
    """
    lines = [line for line in words.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise LoadFailed(f"wrk printed no figures: {words.strip()[-500:]}")
    figures = json.loads(lines[-1].removeprefix("FIGURES "))
    return ClosedLoop(
        rate_per_s=figures["num_requests"] / (figures["duration_us"] / 1e6),
        p50_ms=figures["p50_us"] / 1000,
        p90_ms=figures["p90_us"] / 1000,
        p99_ms=figures["p99_us"] / 1000,
        max_ms=figures["max_us"] / 1000,
        num_requests=figures["num_requests"],
        not_2xx=figures["status"],
        socket_errors=sum(figures[name] for name in ("connect", "read", "write", "timeout")),
    )


def as_sample(figures: ClosedLoop | Summary) -> dict[str, float]:
    """The numbers of either loop by name."""
    values = {field.name: getattr(figures, field.name) for field in fields(figures)}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _pinned(cores: Sequence[int]) -> list[str]:
    return ["taskset", "--cpu-list", ",".join(map(str, cores))]


def _run(command: list[str], deadline_s: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=deadline_s, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"{command[3]} did not end in {deadline_s:.0f} s") from None
    if done.returncode:
        raise LoadFailed(f"{command[3]} ended with {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout
