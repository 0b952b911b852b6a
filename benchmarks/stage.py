"""Systems that are started once and take turns: one runs, the others are frozen.

A stage makes the cells of a benchmark. Measuring a cell thaws its system, warms it up, puts load
on it, reads what its processes used, and freezes it again.
"""

import contextlib
import http.client
import json
import math
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load import as_sample, closed_loop, open_loop
from benchmarks.open_loop import Plan
from benchmarks.payload import Payload
from benchmarks.rounds import Cell, Sample, numbered, rows_of
from benchmarks.system import HOST, Launch, System, SystemFailed

ASK_DEADLINE_S = 120.0
NOT_QUITE_BUSY = 0.6
"""Of the rate of a closed loop."""
STALL = ("from_s", "until_s")
SERVER_FAULTS = ("num_503", "num_504", "num_other_5xx")
LOST = ("num_resets", "num_timeouts", "num_unconnected", "num_unreadable", "num_other_4xx")


@dataclass(frozen=True, slots=True)
class Layout:
    """Which processors the systems may use, and which the load generator."""

    server: Sequence[int]
    client: Sequence[int]

    def sentence(self) -> str:
        """For the method."""
        return f"systems on cores {list(self.server)}, load generator on {list(self.client)}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one measurement: warming up, a closed loop, an open loop."""

    warm_up_s: float
    closed_s: float
    open_s: float


class Remembered:
    """A cell that is measured once now and again in each round; others go by what it has found."""

    def __init__(self, cell: Cell) -> None:
        self._measure: Callable[[], Sample] = cell.measure
        self._samples: list[Sample] = []
        self._remember()
        self.cell = Cell(cell.name, self._remember)

    def median(self, figure: str) -> float:
        """Of what was found so far."""
        return statistics.median(sample[figure] for sample in self._samples)

    def _remember(self) -> Sample:
        self._samples.append(self._measure())
        return self._samples[-1]


@dataclass(frozen=True, slots=True)
class Capacity:
    """Requests a second that a server manages when they come at random moments.

    Connections of a closed loop fall into step, and their requests share batches and warm caches.
    At random moments a request costs more, so the processors that the closed loop kept busy manage
    fewer.

    Attributes:
        closed: a closed loop that keeps the server busy.
        scattered: an open loop of which the server is not quite busy.
    """

    closed: Remembered
    scattered: Remembered

    def share(self, load: float) -> Callable[[], float]:
        """What is asked for that share of it at each visit; at least one a second."""
        return lambda: max(1.0, load * self.rate_per_s())

    def rate_per_s(self) -> float:
        """Now."""
        dearer = self.scattered.median("cpu_us") / self.closed.median("cpu_us")
        return self.closed.median("rate_per_s") / max(1.0, dearer)

    @property
    def cells(self) -> list[Cell]:
        """Both, to be measured in each round."""
        return [self.closed.cell, self.scattered.cell]


class Stage:
    """Use it as a context: at its end every system is stopped.

    Args:
        layout: for all systems on it.
        timing: of all cells.
        folder: for logs and bodies.
        tell: called with one line when a system is up.
    """

    def __init__(
        self, layout: Layout, timing: Timing, folder: Path, tell: Callable[[str], None]
    ) -> None:
        self.layout, self.timing, self.folder = layout, timing, folder
        self._tell = tell
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, launch: Launch) -> System:
        """Start a system, wait until it is ready, and freeze it.

        Raises:
            SystemFailed: it ended, or was not ready in time.
        """
        log = self.folder / f"{launch.name.replace(' ', '-')}.log"
        system = self._stack.enter_context(System(launch, self.layout.server, log))
        system.freeze()
        self._tell(f"{launch.name} is up")
        return system

    def ask(self, system: System, payload: Payload) -> bytes:
        """The body of one answer.

        Raises:
            SystemFailed: the answer is not 200.
        """
        with running(system):
            return post(system, payload)

    def closed(self, name: str, system: System, payload: Payload, connections: int) -> Cell:
        """A closed loop of so many connections."""

        def load(seconds: float) -> Sample:
            cores = self.layout.client
            figures = closed_loop(
                payload, system.port, connections=connections, seconds=seconds, cores=cores
            )
            sample = as_sample(figures)
            silent = float(not sample["num_requests"])
            return {**sample, "faults": sample["not_2xx"] + sample["socket_errors"] + silent}

        def measure() -> Sample:
            with running(system):
                if self.timing.warm_up_s:
                    load(self.timing.warm_up_s)
                    system.settle()
                return with_costs(system, lambda: load(self.timing.closed_s))

        return Cell(name, measure)

    def open(
        self, name: str, system: System, payload: Payload, rate_per_s: Callable[[], float]
    ) -> Cell:
        """An open loop whose rate is asked for at each visit."""
        visits = iter(range(1_000_000))

        def measure() -> Sample:
            asked = Plan(
                port=system.port,
                rate_per_s=rate_per_s(),
                seconds=self.timing.open_s,
                warm_up_s=self.timing.warm_up_s,
                seed=next(visits),
            )
            with running(system):
                sample = with_costs(system, lambda: self._offered(payload, asked))
            faults = sum(sample[kind] for kind in (*SERVER_FAULTS, *LOST))
            # With these and its stalls, whoever needs the same arrivals again can draw them again.
            plan = {"asked_per_s": asked.rate_per_s, "seed": float(asked.seed)}
            return {**sample, **plan, "faults": faults}

        return Cell(name, measure)

    def _offered(self, payload: Payload, plan: Plan) -> Sample:
        summary = open_loop(payload, plan, self.layout.client)
        return {**as_sample(summary), **stalls_named(summary.stalls_s)}

    def capacity(
        self,
        system: System,
        payload: Payload,
        connections: int,
        when: Callable[[Cell], Cell] = lambda cell: cell,
    ) -> Capacity:
        """Measured now, and in each round.

        Args:
            connections: enough to keep it busy.
            when: wraps what has to be arranged first around a cell.
        """
        closed = Remembered(
            when(self.closed(connections_named(connections), system, payload, connections))
        )
        scattered = self.open(
            "at random moments",
            system,
            payload,
            lambda: max(1.0, NOT_QUITE_BUSY * closed.median("rate_per_s")),
        )
        return Capacity(closed, Remembered(when(scattered)))

    def in_process(self, name: str, system: System, batch: int) -> Cell:
        """The bare loop of `benchmarks.in_process`, on batches of so many rows."""

        def run(seconds: float) -> Sample:
            wish = json.dumps({"seconds": seconds, "batch": batch}).encode()
            with socket.create_connection((HOST, system.port), ASK_DEADLINE_S) as connection:
                connection.sendall(wish + b"\n")
                figures: Sample = json.loads(connection.makefile().readline())
            return {**figures, "faults": 0.0}

        def measure() -> Sample:
            with running(system):
                if self.timing.warm_up_s:
                    run(self.timing.warm_up_s)
                return run(self.timing.closed_s)

        return Cell(name, measure)


def connections_named(count: int) -> str:
    """The cell of a closed loop of so many."""
    return f"{count} connection{'s' * (count > 1)}"


def stalls_named(stalls_s: Sequence[Sequence[float]]) -> Sample:
    """Where a generator was late, as figures of a sample; `stalls_of` reads them."""
    return numbered("stall", STALL, stalls_s)


def stalls_of(sample: Sample) -> list[tuple[float, ...]]:
    """From when until when a generator sent nothing that was due, from the start of its load."""
    return list(rows_of(sample, "stall", STALL))


@contextlib.contextmanager
def running(system: System) -> Iterator[None]:
    """Thawed inside, frozen after."""
    system.thaw()
    try:
        yield
    finally:
        system.freeze()


def with_costs(system: System, load: Callable[[], Sample]) -> Sample:
    """What `load` gives, with the system's processor time a request and its memory."""
    before = system.cpu_us()
    sample = load()
    used = system.cpu_us() - before
    # An open loop warms up by itself, and that costs as well.
    count = sample.get("num_offered", sample["num_requests"])
    return {
        **sample,
        "cpu_us": used / count if count else math.nan,
        "memory_bytes": float(system.memory_bytes()),
    }


def post(system: System, payload: Payload) -> bytes:
    """One request to a system that runs.

    Raises:
        SystemFailed: the answer is not 200, or does not come.
    """
    connection = http.client.HTTPConnection(HOST, system.port, timeout=ASK_DEADLINE_S)
    try:
        connection.request("POST", payload.path, payload.body, dict(payload.headers))
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise SystemFailed(f"{system.name} does not answer {payload.name}: {error}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise SystemFailed(
            f"{system.name} answers {payload.name} with {answer.status}: {body[:500]!r}\n"
            f"{system.words()}"
        )
    return body
