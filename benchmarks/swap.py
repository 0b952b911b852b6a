"""An alias that moves a thousand times at 0.8 of capacity: `python -m benchmarks.swap`.

A process of its own publishes a new version, moves `production` to it, and waits until the server
answers with it; every tenth is damaged on disk, must be refused, and leaves the one before in
place. Meanwhile requests of four rows arrive in an open loop; each answer must be 200, and all of
its rows must be those of the version that it names. It goes in rounds: the capacity is measured
before and after each; ten swaps and as long a rest alternate under one load, and the latency of
what was due in either is compared; memory with what it was before the first swap, after as many
connections as there ever are. A round in which the machine itself became slower is told and done
again: 0.8 of what it had may be more than it has. Rounds that are done are kept (`--keep FILE`),
and a run that is started again goes on behind them.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import orjson
import torch
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
NICENESS: Final = 10
MEBIBYTE: Final = 1024 * 1024
LOAD: Final = 0.8
CAPACITY_S: Final = 4.0
WHILE_IDLE: Final = 0.6
CONNECTIONS: Final = 64
WARM_UP_S: Final = 2.0
BURST: Final = 10
"""Swaps, before a rest that is as long as they were to take."""
SETTLED_S: Final = 0.5
"""What a burst left behind is done after this."""
SLOWER: Final = 0.9
"""A machine that has less than this share of its capacity after a round was disturbed in it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one round.

    Attributes:
        num_swaps: versions that production was moved to, the damaged ones included.
        num_refused: damaged versions that the server refused.
        num_unseen: versions that were not served, or damaged ones not refused, in time.
        num_wrong: answers in which a row was not that of the version named.
        num_versions: that answered.
        memory_first, memory_last: of the server before the first swap and after this round, bytes.
        capacities_per_s: of the server before the round and after it; none where not measured.
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
    capacities_per_s: Sequence[float] = ()

    @property
    def is_disturbed(self) -> bool:
        """Whether the machine became slower meanwhile."""
        return bool(self.capacities_per_s) and (
            self.capacities_per_s[1] < SLOWER * self.capacities_per_s[0]
        )

    @property
    def num_failed(self) -> int:
        """Requests without a 2xx, also of those that came in a rest."""
        return sum(one.num_requests - one.num_2xx for one in (self.swapping, self.steady))

    @property
    def p99_ratio(self) -> float:
        """While swapping to steady."""
        return self.swapping.p99_ms / self.steady.p99_ms

    @property
    def memory_growth(self) -> float:
        """Share by which memory grew since before the first swap."""
        return self.memory_last / self.memory_first - 1

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Outcome":
        """As `asdict` wrote it down."""
        loads = {name: Summary(**document[name]) for name in ("steady", "swapping")}
        return cls(**{**document, **loads})


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


def swapper(home: str, port: str, first: str, num_swaps: str, pace_s: str) -> None:
    """The process that publishes and moves; prints a line for each version, and for each swap."""
    store = ModelStore(Path(home) / "models")
    torch.set_num_threads(1)
    os.nice(NICENESS)  # it shares a processor with the generator, whose moments are what counts
    with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=10) as client:
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        time.sleep(WARM_UP_S)  # of the load, which begins now
        for place, index in enumerate(range(int(first), int(first) + int(num_swaps))):
            began = time.monotonic()
            if place % BURST == 0:
                print(json.dumps({"from": began}), flush=True)
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
            if (place + 1) % BURST == 0:
                print(json.dumps({"to": time.monotonic() + SETTLED_S}), flush=True)
                time.sleep(BURST * float(pace_s) + SETTLED_S)


def damage(path: Path) -> None:
    """One byte in the middle of the weights."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(data)


def wait_for(client: httpx.Client, number: int, corrupt: bool) -> bool:
    """Whether the server serves version `number`, or says that it cannot, within its time.

    A good one is looked for by predicting, which costs the server a tenth of a look at the alias.
    """
    until = time.monotonic() + PATIENCE_S
    sent = payload()
    while time.monotonic() < until:
        time.sleep(0.05)
        if not corrupt:
            answer = client.post(sent.path, content=sent.body, headers=dict(sent.headers))
            if answer.json().get("version") == number:
                return True
            continue
        state = client.get(f"/v1/models/{NAME}/aliases/{PRODUCTION}").json()
        if any(f"{NAME}:{number} " in fault for fault in state["faults"]):
            return bool(state["serving"] != number)
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


def rounds(
    home: Path,
    *,
    num_swaps: int,
    pace_s: float,
    rate_per_s: float = 0.0,
    tell: Callable[[int], None] = lambda _: None,
) -> Iterator[Outcome]:
    """One round after the other on one server, for as long as they are asked for.

    Args:
        num_swaps: of a round.
        pace_s: a swap begins so long after the one before, or when that is done.
        rate_per_s: of requests; 0 takes 0.8 of what the server can do, measured in each round.
        tell: called with the number of swaps that this round has done.
    """
    *on, other = cores() if len(cores()) > 1 else cores() * 2
    made_from, memory_first = {1: 0}, 0
    with served(home, on) as system:
        message = payload().message(system.port)
        for number in count():
            before = [] if rate_per_s else [len(on) * answered_per_cpu_s(system, other, message)]
            rate = rate_per_s or LOAD * before[0]
            if not memory_first:
                offered(_plan(system.port, rate, WARM_UP_S), message)
                memory_first = system.memory_bytes()
            lines = home / f"swaps-{number}.jsonl"
            length_s = WARM_UP_S + 2 * (num_swaps * pace_s + num_swaps / BURST * SETTLED_S)
            plan = _plan(system.port, rate, length_s, seed=number + 1)
            with swapping(
                home, system.port, number * num_swaps + 1, num_swaps, pace_s, lines
            ) as go:
                wait_ready(lines)
                go()
                with watching(lines, tell):
                    load = offered(plan, message)
            # What a slow machine has not swapped by now was not under load, and does not count.
            done = [json.loads(line) for line in lines.read_text().splitlines()]
            made_from |= {
                line["made"]: line["seed"]
                for line in done
                if "made" in line and not line["corrupt"]
            }
            time.sleep(1.0)
            memory_last = system.memory_bytes()
            after = [len(on) * answered_per_cpu_s(system, other, message)] if before else []
            memory, capacities_per_s = (memory_first, memory_last), [*before, *after]
            yield _outcome(load, done, made_from, memory, capacities_per_s)


def answered_per_cpu_s(system: System, core: int, message: bytes) -> float:
    """Requests at random moments that a second of one processor answers, a part of it being idle.

    A closed loop says more: its connections fall into step, and share large batches.
    """
    at_most = closed_loop(payload(), system.port, connections=CONNECTIONS, seconds=2, cores=[core])
    busy_us, rate = system.cpu_us(), WHILE_IDLE * at_most.rate_per_s
    found = offered(_plan(system.port, rate, CAPACITY_S), message)
    return len(found.answers) / (system.cpu_us() - busy_us) * 1e6


def _plan(port: int, rate_per_s: float, seconds: float, seed: int = 0) -> Plan:
    return Plan(port, rate_per_s, seconds, seed=seed, max_connections=CONNECTIONS)


def offered(plan: Plan, message: bytes) -> Checked:
    """Run a plan; what knows each request's moments and answer."""
    loop = Checked(plan, message)
    loop.run()
    return loop


@contextmanager
def watching(lines: Path, tell: Callable[[int], None]) -> Iterator[None]:
    """Tell how many swaps are done, from a thread of its own."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            tell(lines.read_bytes().count(b"seen"))

    watch = threading.Thread(target=look, name="watch")
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


@contextmanager
def swapping(
    home: Path, port: int, first: int, num_swaps: int, pace_s: float, lines: Path
) -> Iterator[Callable[[], None]]:
    """The process that publishes and moves, on the generator's processor; and what starts it."""
    other = cores()[-1]
    command = [sys.executable, "-m", "benchmarks.swap", "--swapper", str(home), str(port)]
    with lines.open("wb") as output:
        process = subprocess.Popen(
            [
                "taskset",
                "--cpu-list",
                str(other),
                *command,
                str(first),
                str(num_swaps),
                str(pace_s),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
        )

        def go() -> None:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()

        try:
            yield go
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
    load: Checked,
    done: list[dict[str, Any]],
    made_from: dict[int, int],
    memory: tuple[int, int],
    capacities_per_s: Sequence[float],
) -> Outcome:
    begins = [line["from"] for line in done if "from" in line]
    ends = [line["to"] for line in done if "to" in line]
    bursts = list(zip_longest(begins, ends, fillvalue=math.inf))
    rests = list(zip_longest(ends, begins[1:], fillvalue=math.inf))
    swaps = [line for line in done if "seen" in line]
    found = {version for version, _ in load.answers}
    rows = {version: expected_rows(seed) for version, seed in made_from.items() if version in found}
    wrong = sum(not _matches(answer, rows.get(version)) for version, answer in load.answers)
    return Outcome(
        steady=load.within(rests),
        swapping=load.within(bursts),
        num_swaps=len(swaps),
        num_refused=sum(line["corrupt"] and line["seen"] for line in swaps),
        num_unseen=sum(not line["seen"] for line in swaps),
        num_wrong=wrong,
        num_versions=len(found),
        memory_first=memory[0],
        memory_last=memory[1],
        capacities_per_s=capacities_per_s,
    )


def _matches(found: tuple[float, ...], wanted: list[float] | None) -> bool:
    if wanted is None or len(found) != len(wanted):
        return False
    return all(math.isclose(a, b, abs_tol=TOLERANCE) for a, b in zip(found, wanted, strict=True))


def _record(outcomes: Sequence[Outcome], command: str) -> Record:
    counted = [one for one in outcomes if not one.is_disturbed]
    disturbed = [one for one in outcomes if one.is_disturbed]

    def total(name: str, which: Sequence[Outcome]) -> int:
        return sum(getattr(one, name) for one in which)

    ratios = sorted(one.p99_ratio for one in counted)
    growth = max((one.memory_growth for one in counted), key=abs)
    ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    goals = [
        ("requests that failed", f"{total('num_failed', counted)}", "0"),
        ("answers that are not of the version they name", f"{total('num_wrong', outcomes)}", "0"),
        ("swaps not served, or damage not refused", f"{total('num_unseen', outcomes)}", "0"),
        ("p99 while swapping to that in the rests, median of the rounds", ratio, "at most 2"),
        ("memory after a round to before the first swap", f"{growth:+.1%}", "within 2 %"),
    ]
    num_swaps, num_refused = total("num_swaps", counted), total("num_refused", counted)
    num_requests = sum(one.swapping.num_requests for one in counted)
    counts = [
        ("swaps", f"{num_swaps}, {num_refused} of them refused as damaged"),
        ("requests", f"{num_requests}, by {total('num_versions', counted)} versions"),
        (
            "rounds not counted above: the machine lost more than a tenth of its speed",
            f"{len(disturbed)}, with {total('num_swaps', disturbed)} swaps and "
            f"{total('num_failed', disturbed)} requests that failed",
        ),
    ]
    by_round = [
        (
            f"{number}{' (disturbed)' if one.is_disturbed else ''}",
            f"{one.num_swaps}",
            ", ".join(f"{capacity:.0f}" for capacity in one.capacities_per_s),
            f"{one.swapping.offered_per_s:.0f}",
            f"{one.steady.p50_ms:.2f}, {one.steady.p99_ms:.2f}",
            f"{one.swapping.p50_ms:.2f}, {one.swapping.p99_ms:.2f}",
            f"{one.num_failed}",
            f"{one.swapping.late_p99_ms:.2f}",
            f"{one.memory_last / MEBIBYTE:.0f}",
        )
        for number, one in enumerate(outcomes, start=1)
    ]
    heads = (
        *("round", "swaps", "capacity before, after", "requests/s", "in rests p50, p99 ms"),
        *("swapping", "failed", "late p99", "MiB"),
    )
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
            Table("Rounds", [heads, *by_round]),
        ],
        figures={"rounds": [asdict(one) for one in outcomes]},
    )


def kept_in(path: Path | None) -> list[Outcome]:
    """The rounds that an earlier run has kept."""
    if path is None or not path.is_file():
        return []
    return [Outcome.of(json.loads(line)) for line in path.read_text().splitlines()]


def run(options: argparse.Namespace) -> list[Outcome]:
    """Rounds until there are as many swaps as are wanted, or the time is up."""
    outcomes = kept_in(options.keep)
    began, longest_s = time.monotonic(), 0.0

    def num_done() -> int:
        return sum(one.num_swaps for one in outcomes if not one.is_disturbed)

    with tempfile.TemporaryDirectory() as folder:

        def tell(num_swaps: int) -> None:
            done = num_done() + num_swaps
            minutes = (time.monotonic() - began) / 60
            bar = "#" * (30 * done // options.swaps)
            line = f"\r[{bar:<30.30}] {done} of {options.swaps} swaps, {minutes:.1f} min"
            print(line, end="", file=sys.stderr, flush=True)

        loop = rounds(
            Path(folder),
            num_swaps=min(options.round, options.swaps),
            pace_s=options.pace,
            rate_per_s=options.rate,
            tell=tell,
        )
        with contextlib.closing(loop):
            while num_done() < options.swaps:
                started = time.monotonic()
                if started - began + longest_s > 60 * options.minutes:
                    break
                outcomes.append(next(loop))
                longest_s = max(longest_s, time.monotonic() - started)
                if options.keep is not None:
                    with options.keep.open("a") as file:
                        file.write(json.dumps(asdict(outcomes[-1])) + "\n")
    print(file=sys.stderr)
    return outcomes


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table and one line of JSON."""
    if arguments[:1] == ["--swapper"]:
        swapper(*arguments[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=1000)
    parser.add_argument("--round", type=int, default=100, help="swaps of one round")
    parser.add_argument("--pace", type=float, default=0.5, help="seconds from swap to swap")
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0 finds 0.8")
    parser.add_argument("--minutes", type=float, default=25.0, help="no round ends later")
    parser.add_argument("--keep", type=Path, help="file of the rounds that are done")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args(arguments)
    outcomes = run(options)
    if all(one.is_disturbed for one in outcomes):
        sys.exit("there was no time for a single quiet round; give it more --minutes")
    typed = " ".join(arguments).replace(f"--keep {options.keep}", "--keep FILE")
    record = _record(outcomes, f"python -m benchmarks.swap {typed}".strip())
    record.show(write=options.write)


if __name__ == "__main__":
    main(sys.argv[1:])
