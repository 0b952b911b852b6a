"""An alias that moves a thousand times at 0.8 of capacity: `python -m benchmarks.swap`.

A process of its own publishes a new version, moves `production` to it, and waits until the server
answers with it; every tenth is damaged on disk, must be refused, and leaves the one before in
place. Meanwhile requests of four rows arrive in an open loop; each answer must be 200, and all of
its rows must be those of the version that it names. Latency is compared with the same load without
swaps, memory with what it was after the first swaps.
"""

import argparse
import asyncio
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import orjson
import torch
import uvloop
from torch import nn

from benchmarks.load import closed_loop
from benchmarks.machine import cores, this_machine
from benchmarks.networks import PERCEPTRON_OPTIONS, perceptron
from benchmarks.open_loop import OpenLoop, Plan, Summary
from benchmarks.ours import ROOT, server
from benchmarks.payload import Payload
from benchmarks.record import Record, Table
from benchmarks.system import HOST, System
from models import checkpoint
from models.manifest import WEIGHTS, Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import PRODUCTION, ModelStore

NAME: Final = "swapped"
NUM_ROWS: Final = 4
EVERY_CORRUPT: Final = 10
KEPT_VERSIONS: Final = 3
TOLERANCE: Final = 1e-4
PATIENCE_S: Final = 20.0
FIRST_SWAPS: Final = 20
MEBIBYTE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one run.

    Attributes:
        num_swaps: versions that production was moved to, the damaged ones included.
        num_refused: damaged versions that the server refused.
        num_unseen: versions that were not served, or damaged ones not refused, in time.
        num_wrong: answers in which a row was not that of the version named.
        num_versions: that answered.
        memory_first, memory_last: of the server after the first swaps and after the last, bytes.
    """

    steady: Summary
    swapping: Summary
    num_swaps: int
    num_refused: int
    num_unseen: int
    num_wrong: int
    num_versions: int
    memory_first: int
    memory_last: int

    @property
    def num_failed(self) -> int:
        """Requests without a 2xx."""
        return self.swapping.num_requests - self.swapping.num_2xx

    @property
    def p99_ratio(self) -> float:
        """While swapping to steady."""
        return self.swapping.p99_ms / self.steady.p99_ms

    @property
    def memory_growth(self) -> float:
        """Share by which memory grew after the first swaps."""
        return self.memory_last / self.memory_first - 1


class Checked(OpenLoop):
    """Keeps what each answer said."""

    def __init__(self, plan: Plan, message: bytes) -> None:
        super().__init__(plan, message)
        self.answers: list[tuple[int, tuple[float, ...]]] = []

    def answered(self, connection: Any, status: int, reusable: bool) -> None:
        """Read the version and each row's best probability, then go on as usual."""
        if status == 200:
            body = orjson.loads(connection.body)
            rows = tuple(row["probability"] for row in body["predictions"])
            self.answers.append((body["version"], rows))
        super().answered(connection, status, reusable)


def inputs() -> np.ndarray:
    """The rows that every request sends, float32 `[4, 784]`."""
    return np.random.default_rng(5).random((NUM_ROWS, 784)).round(4).astype(np.float32)


def payload() -> Payload:
    """One request."""
    body = orjson.dumps({"inputs": inputs().tolist(), "top_k": 1})
    path = f"/v1/models/{NAME}/predict"
    return Payload("swap", path, body, {"Content-Type": "application/json"})


def network_of(seed: int) -> nn.Module:
    """Far apart from those of other seeds, so that a wrong answer shows."""
    network = perceptron(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2.0)
    return network


def expected_rows(seed: int) -> list[float]:
    """Each row's best probability by the version that was made from `seed`."""
    with torch.inference_mode():
        probabilities = torch.softmax(network_of(seed)(torch.from_numpy(inputs())), 1)
    return probabilities.max(1).values.tolist()


def publish(store: ModelStore, seed: int) -> int:
    """The next version; its number."""
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=PERCEPTRON_OPTIONS),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [784]}]),
        labels=tuple("0123456789"),
    )
    golden = torch.from_numpy(inputs())
    return store.publish(
        NAME, lambda folder: checkpoint.save(folder, network_of(seed), manifest, golden)
    ).number


def swapper(home: str, port: str, num_swaps: str, pace_s: str) -> None:
    """The process that publishes and moves; prints a line for each version, and for each swap."""
    store = ModelStore(Path(home) / "models")
    torch.set_num_threads(1)
    with httpx.Client(base_url=f"http://{HOST}:{port}/v1/models/{NAME}", timeout=10) as client:
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()  # the load has begun
        for index in range(1, int(num_swaps) + 1):
            began = time.monotonic()
            corrupt = index % EVERY_CORRUPT == 0
            number = publish(store, seed=index)
            if corrupt:
                damage(store.version(NAME, number).folder / WEIGHTS)
            made = {"made": number, "seed": index, "corrupt": corrupt}
            print(json.dumps(made), flush=True)
            store.move_alias(NAME, PRODUCTION, number, why="benchmark")
            seen = wait_for(client, number, corrupt)
            print(json.dumps({"corrupt": corrupt, "seen": seen}), flush=True)
            tidy(store, number)
            time.sleep(max(0.0, began + float(pace_s) - time.monotonic()))


def damage(path: Path) -> None:
    """One byte in the middle of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(data)


def wait_for(client: httpx.Client, number: int, corrupt: bool) -> bool:
    """Whether the server serves version `number`, or says that it cannot, within its time."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        state = client.get(f"/aliases/{PRODUCTION}").json()
        if corrupt and any(f"{NAME}:{number} " in fault for fault in state["faults"]):
            return bool(state["serving"] != number)
        if not corrupt and state["serving"] == number:
            return True
        time.sleep(0.02)
    return False


def tidy(store: ModelStore, newest: int) -> None:
    """Delete what nobody needs any more."""
    held = store.aliases(NAME).values()
    for number in store.versions(NAME):
        if number <= newest - KEPT_VERSIONS and number not in held:
            store.delete(NAME, number)


@contextmanager
def served(home: Path, on: Sequence[int]) -> Iterator[System]:
    """The server over a store with the first version, watching it closely, compilation off."""
    publish(ModelStore(home / "models"), seed=0)
    settings = {"watch_interval_s": "0.05", "compile": "off", "log_requests": "none"}
    launch = server("ours", home, [NAME], settings)
    with System(launch, on, home / "server.log") as system:
        yield system


def measure(
    home: Path, *, num_swaps: int, pace_s: float, steady_s: float, rate_per_s: float = 0.0
) -> Outcome:
    """One run.

    Args:
        pace_s: a swap begins so long after the one before, or when that is done.
        rate_per_s: of requests; 0 takes 0.8 of what the server can do, measured first.
    """
    *on, other = cores() if len(cores()) > 1 else cores() * 2
    with served(home, on) as system:
        if not rate_per_s:
            best = closed_loop(payload(), system.port, connections=16, seconds=5, cores=[other])
            rate_per_s = 0.8 * best.rate_per_s
        message = payload().message(system.port)
        plan = Plan(system.port, rate_per_s, steady_s, warm_up_s=2.0)
        steady, _ = offered(plan, message)
        seconds = num_swaps * pace_s + 5.0
        lines = home / "swaps.jsonl"
        with swapping(home, system.port, num_swaps, pace_s, lines) as process:
            wait_ready(lines)
            watch = _MemoryWatch(system, lines)
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            summary, answers = offered(
                Plan(system.port, rate_per_s, seconds, seed=1), message, watch
            )
        # What a slow machine has not swapped by now was not under load, and does not count.
        done = [json.loads(line) for line in lines.read_text().splitlines()]
        time.sleep(1.0)
        last = system.memory_bytes()
    return _outcome(steady, summary, done, answers, (watch.first or last, last))


def offered(
    plan: Plan, message: bytes, watch: "_MemoryWatch | None" = None
) -> tuple[Summary, list[tuple[int, tuple[float, ...]]]]:
    """Run a plan; what came of it, and what the answers said."""

    async def run() -> tuple[Summary, list[tuple[int, tuple[float, ...]]]]:
        loop = Checked(plan, message)
        looking = asyncio.create_task(watch.look()) if watch is not None else None
        summary = await loop.run()
        if looking is not None:
            looking.cancel()
        return summary, loop.answers

    return uvloop.run(run())


class _MemoryWatch:
    """Notes the server's memory once the first swaps are over."""

    def __init__(self, system: System, lines: Path) -> None:
        self.first = 0
        self._system, self._lines = system, lines

    async def look(self) -> None:
        """Until then."""
        while not self.first:
            await asyncio.sleep(0.5)
            if self._lines.read_bytes().count(b"seen") >= FIRST_SWAPS:
                self.first = self._system.memory_bytes()


@contextmanager
def swapping(
    home: Path, port: int, num_swaps: int, pace_s: float, lines: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """The process that publishes and moves, on the generator's processor."""
    other = cores()[-1]
    command = [sys.executable, "-m", "benchmarks.swap", "--swapper", str(home), str(port)]
    with lines.open("wb") as output:
        process = subprocess.Popen(
            ["taskset", "--cpu-list", str(other), *command, str(num_swaps), str(pace_s)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def wait_ready(lines: Path) -> None:
    """Until the publisher has imported what it needs."""
    until = time.monotonic() + 120
    while b"ready" not in lines.read_bytes():
        if time.monotonic() > until:
            raise TimeoutError("the publisher did not start in two minutes")
        time.sleep(0.1)


def _outcome(
    steady: Summary,
    summary: Summary,
    done: list[dict[str, Any]],
    answers: list[tuple[int, tuple[float, ...]]],
    memory: tuple[int, int],
) -> Outcome:
    made = [line for line in done if "made" in line and not line["corrupt"]]
    made_from = {1: 0, **{line["made"]: line["seed"] for line in made}}
    done = [line for line in done if "seen" in line]
    rows = {version: expected_rows(seed) for version, seed in made_from.items()}
    wrong = sum(not _matches(found, rows.get(version)) for version, found in answers)
    return Outcome(
        steady=steady,
        swapping=summary,
        num_swaps=len(done),
        num_refused=sum(line["corrupt"] and line["seen"] for line in done),
        num_unseen=sum(not line["seen"] for line in done),
        num_wrong=wrong,
        num_versions=len({version for version, _ in answers}),
        memory_first=memory[0],
        memory_last=memory[1],
    )


def _matches(found: tuple[float, ...], wanted: list[float] | None) -> bool:
    if wanted is None or len(found) != len(wanted):
        return False
    return all(math.isclose(a, b, abs_tol=TOLERANCE) for a, b in zip(found, wanted, strict=True))


def _record(outcome: Outcome, command: str) -> Record:
    goals = [
        ("requests that failed", f"{outcome.num_failed}", "0"),
        ("answers that are not of the version they name", f"{outcome.num_wrong}", "0"),
        ("swaps not served, or damage not refused", f"{outcome.num_unseen}", "0"),
        ("p99 while swapping to steady", f"{outcome.p99_ratio:.2f}", "at most 2"),
        ("memory after the last to the first swaps", f"{outcome.memory_growth:+.1%}", "within 2 %"),
    ]
    counts = [
        ("swaps", f"{outcome.num_swaps}, {outcome.num_refused} of them refused as damaged"),
        ("requests", f"{outcome.swapping.num_requests}, by {outcome.num_versions} versions"),
        ("requests a second", f"{outcome.swapping.offered_per_s:.0f}"),
        ("p50, p99 ms steady", f"{outcome.steady.p50_ms:.2f}, {outcome.steady.p99_ms:.2f}"),
        ("p50, p99 ms swapping", f"{outcome.swapping.p50_ms:.2f}, {outcome.swapping.p99_ms:.2f}"),
        (
            "memory MiB",
            f"{outcome.memory_first / MEBIBYTE:.0f}, {outcome.memory_last / MEBIBYTE:.0f}",
        ),
        ("generator late p99 ms", f"{outcome.swapping.late_p99_ms:.2f}"),
    ]
    return Record(
        name="swap",
        command=command,
        machine=this_machine(),
        method=[
            "The server on the other processors than generator and publisher; compilation off."
        ],
        tables=[
            Table("Goals", [("what", "measured", "goal"), *goals]),
            Table("Counts", [("what", "measured"), *counts]),
        ],
        figures=asdict(outcome),
    )


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table and one line of JSON."""
    if arguments[:1] == ["--swapper"]:
        home, port, num_swaps, pace_s = arguments[1:]
        swapper(home, port, num_swaps, pace_s)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--pace", type=float, default=0.25, help="seconds from swap to swap")
    parser.add_argument("--steady", type=float, default=30.0, help="seconds without swaps")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0 finds 0.8")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = measure(
            Path(folder),
            num_swaps=options.swaps,
            pace_s=options.pace,
            steady_s=options.steady,
            rate_per_s=options.rate,
        )
    record = _record(outcome, f"python -m benchmarks.swap {' '.join(arguments)}".strip())
    print(record)
    print(record.line())
    if options.write:
        record.write()


if __name__ == "__main__":
    main(sys.argv[1:])
