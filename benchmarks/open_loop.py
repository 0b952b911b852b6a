"""Load that does not wait for the server: requests leave at moments that were drawn beforehand.

Latency counts from the scheduled moment, so a server that stalls is charged for every request that
should have been sent meanwhile, and nothing is left out (no coordinated omission). Run by
`benchmarks.load.open_loop` in a process of its own; alone: `python -m benchmarks.open_loop PLAN
MESSAGE`, a JSON object with the fields of `Plan` and a file with one HTTP request.
"""

import asyncio
import gc
import json
import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import uvloop

from benchmarks.alarm import Alarm

HOST: Final = "127.0.0.1"
SWEEP_S: Final = 0.05
CLOSE_DEADLINE_S: Final = 2.0
# Outcomes that are no HTTP status.
RESET: Final = 0
TIMED_OUT: Final = 1
UNCONNECTED: Final = 2
UNREADABLE: Final = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What to offer.

    Attributes:
        seconds: length of the measured window; what is scheduled in it is counted.
        warm_up_s: offered before it and not counted.
        arrivals: `poisson`, or `constant` distances.
        timeout_s: from the scheduled moment; a request without its whole answer is given up then.
        max_connections: beyond them requests wait here, on their own clock.
        within_ms: an answer counts as goodput up to this latency; 0 for any.
    """

    port: int
    rate_per_s: float
    seconds: float
    warm_up_s: float = 0.0
    arrivals: Literal["poisson", "constant"] = "poisson"
    seed: int = 0
    timeout_s: float = 10.0
    max_connections: int = 1000
    within_ms: float = 0.0

    def moments(self) -> list[float]:
        """When requests are due, in seconds from the beginning."""
        length = self.warm_up_s + self.seconds
        if self.arrivals == "constant":
            return (np.arange(math.ceil(length * self.rate_per_s)) / self.rate_per_s).tolist()
        random = np.random.default_rng(self.seed)
        # a Poisson process, given how many there are, is that many uniform moments
        count = random.poisson(length * self.rate_per_s)
        return np.sort(random.uniform(0, length, count)).tolist()


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of the measured window.

    Attributes:
        num_offered: requests of the whole run, those before the window included.
        offered_per_s: requests due a second, whether or not they could be sent.
        goodput_per_s: 2xx a second (within `Plan.within_ms`, where that is set).
        p50_ms, p90_ms, p99_ms, max_ms: latency of 2xx from the scheduled moment.
        refusal_p50_ms, refusal_p99_ms, refusal_max_ms: the same of 429 and 503.
        num_resets: connections that ended before the whole answer.
        num_timeouts: given up after `Plan.timeout_s`.
        late_p99_ms: how late this program itself was; not much more than a millisecond, or the
            generator is the bottleneck.
        generator_share: of one processor that this program used.
    """

    num_requests: int
    num_offered: int
    offered_per_s: float
    goodput_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    refusal_p50_ms: float
    refusal_p99_ms: float
    refusal_max_ms: float
    num_2xx: int
    num_429: int
    num_503: int
    num_504: int
    num_other_4xx: int
    num_other_5xx: int
    num_resets: int
    num_timeouts: int
    num_unconnected: int
    num_unreadable: int
    num_connections: int
    late_p99_ms: float
    generator_share: float


class OpenLoop:
    """One run of a plan.

    Args:
        plan: what to offer.
        message: a whole HTTP/1.1 request; every request is this one.
    """

    def __init__(self, plan: Plan, message: bytes) -> None:
        self._plan = plan
        self._message = message
        self._offsets = plan.moments()
        count = len(self._offsets)
        self._dispatched = [math.nan] * count
        self._done = [math.nan] * count
        self._outcome = [UNCONNECTED] * count
        self._next = self._recorded = self._num_connections = self._num_opening = 0
        self._num_open = 0
        self._began = self._share = math.nan
        self._waiting: deque[int] = deque()
        self._idle: list[_Connection] = []
        self._busy: dict[_Connection, int] = {}
        self._openings: set[asyncio.Task[None]] = set()
        self._finished = asyncio.Event()

    async def run(self) -> Summary:
        """Offer everything, wait for the answers, and sum up."""
        if not self._offsets:
            raise ValueError("the plan holds no request: its rate or its time is too small")
        loop, alarm = asyncio.get_running_loop(), Alarm()
        gc.collect()
        gc.disable()  # a collection would be a pause that the server is blamed for
        self._began = time.monotonic() + 0.01
        cpu_s, wall_s = _cpu_s(), time.monotonic()
        loop.add_reader(alarm.descriptor, self._ring, alarm)
        alarm.set(self._began + self._offsets[0])
        sweeper = loop.create_task(self._sweep())
        try:
            longest_s = self._offsets[-1] + self._plan.timeout_s + 5.0
            async with asyncio.timeout(longest_s):
                await self._finished.wait()
        finally:
            gc.enable()
            sweeper.cancel()
            loop.remove_reader(alarm.descriptor)
            alarm.close()
            await self._close()
        self._share = (_cpu_s() - cpu_s) / (time.monotonic() - wall_s)
        return self._summary(np.array(self._offsets) >= self._plan.warm_up_s, self._plan.seconds)

    def answered(self, connection: "_Connection", status: int, reusable: bool) -> None:
        """A connection has its whole answer."""
        self._record(self._busy.pop(connection), status)
        if not reusable:
            connection.close()
        elif self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def lost(self, connection: "_Connection", outcome: int) -> None:
        """A connection has ended; its request, if it had one, will not be answered."""
        self._num_open -= 1
        index = self._busy.pop(connection, None)
        if index is not None:
            self._record(index, outcome)
        elif connection in self._idle:
            self._idle.remove(connection)
        self._open_if_wanted()

    def _ring(self, alarm: Alarm) -> None:
        """Dispatch what is due, and set the alarm for the next."""
        alarm.clear()
        now = time.monotonic()
        while self._next < len(self._offsets):
            due = self._began + self._offsets[self._next]
            if due > now:
                alarm.set(due)
                return
            self._dispatched[self._next] = now
            self._dispatch(self._next)
            self._next += 1

    def _dispatch(self, index: int) -> None:
        if self._idle:
            self._send(self._idle.pop(), index)
        else:
            self._waiting.append(index)
            self._open_if_wanted()

    def _send(self, connection: "_Connection", index: int) -> None:
        self._busy[connection] = index
        connection.send(self._message)

    def _open_if_wanted(self) -> None:
        """Open a connection, unless as many are being opened as requests wait."""
        if self._num_opening >= len(self._waiting) or self._finished.is_set():
            return
        if self._num_open + self._num_opening >= self._plan.max_connections:
            return
        self._num_opening += 1
        task = asyncio.get_running_loop().create_task(self._open())
        self._openings.add(task)
        task.add_done_callback(self._openings.discard)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self), HOST, self._plan.port
            )
        except OSError:
            self._num_opening -= 1
            if self._waiting:
                self._record(self._waiting.popleft(), UNCONNECTED)
            return
        self._num_opening -= 1
        self._num_open += 1
        self._num_connections += 1
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    async def _sweep(self) -> None:
        """Give up what is too old."""
        while True:
            await asyncio.sleep(SWEEP_S)
            oldest = time.monotonic() - self._began - self._plan.timeout_s
            while self._waiting and self._offsets[self._waiting[0]] < oldest:
                self._record(self._waiting.popleft(), TIMED_OUT)
            for connection, index in list(self._busy.items()):
                if self._offsets[index] < oldest:
                    self._record(self._busy.pop(connection), TIMED_OUT)
                    connection.close()

    def _record(self, index: int, outcome: int) -> None:
        self._done[index] = time.monotonic()
        self._outcome[index] = outcome
        self._recorded += 1
        if self._recorded == len(self._offsets):
            self._finished.set()

    async def _close(self) -> None:
        for task in self._openings:
            task.cancel()
        for connection in [*self._idle, *self._busy]:
            connection.close()
        deadline = time.monotonic() + CLOSE_DEADLINE_S
        while (self._num_open or self._openings) and time.monotonic() < deadline:
            await asyncio.sleep(0.001)

    def within(self, spans: Iterable[tuple[float, float]]) -> Summary:
        """The same of what was due in these spans of `time.monotonic()`, once all is over."""
        offsets, counted, seconds = np.array(self._offsets), np.zeros(len(self._offsets), bool), 0.0
        for begin, end in spans:
            due = (self._began + offsets >= begin) & (self._began + offsets < end)
            seconds += float(np.ptp(offsets[due])) if due.any() else 0.0
            counted |= due
        return self._summary(counted, seconds)

    def _summary(self, counted: "np.ndarray[Any, Any]", seconds: float) -> Summary:
        offsets = np.array(self._offsets)
        latency_ms = (np.array(self._done) - self._began - offsets)[counted] * 1000
        outcome = np.array(self._outcome)[counted]
        late_ms = (np.array(self._dispatched) - self._began - offsets)[counted] * 1000
        admitted = latency_ms[(outcome >= 200) & (outcome < 300)]
        refused = latency_ms[(outcome == 429) | (outcome == 503)]
        good = (admitted <= self._plan.within_ms).sum() if self._plan.within_ms else len(admitted)
        return Summary(
            num_requests=len(outcome),
            num_offered=len(self._offsets),
            offered_per_s=len(outcome) / max(seconds, 1e-9),
            goodput_per_s=float(good) / max(seconds, 1e-9),
            p50_ms=_percentile(admitted, 50),
            p90_ms=_percentile(admitted, 90),
            p99_ms=_percentile(admitted, 99),
            max_ms=_percentile(admitted, 100),
            refusal_p50_ms=_percentile(refused, 50),
            refusal_p99_ms=_percentile(refused, 99),
            refusal_max_ms=_percentile(refused, 100),
            **_counts(outcome.tolist()),
            num_connections=self._num_connections,
            late_p99_ms=_percentile(late_ms, 99),
            generator_share=self._share,
        )


class _Connection(asyncio.Protocol):
    """One kept-alive connection with at most one request on its way."""

    def __init__(self, owner: OpenLoop) -> None:
        self._owner = owner
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._expecting = False
        self._body_end = 0  # 0 until the header is complete
        self._chunked = self._reusable = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's by type, only by what they do
        self._transport = cast(asyncio.Transport, transport)

    @property
    def body(self) -> bytes:
        """Of the answer that is complete, where it says its length."""
        return bytes(self._received[self._received.find(b"\r\n\r\n") + 4 :])

    def send(self, message: bytes) -> None:
        """Send a request; `OpenLoop.answered` or `OpenLoop.lost` will be called once for it."""
        self._received.clear()
        self._expecting, self._body_end = True, 0
        self._transport.write(message)

    def close(self) -> None:
        """End it; a request on its way must have been recorded already."""
        self._expecting = False
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if not self._expecting:
            self._transport.abort()  # nothing was asked
            return
        self._received += data
        if not self._body_end:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(end)
        if self._complete():
            self._expecting = False
            status = int(self._received[9:12])
            self._owner.answered(self, status, self._reusable)

    def connection_lost(self, error: Exception | None) -> None:
        unreadable = self._expecting and self._body_end == sys.maxsize and error is None
        self._owner.lost(self, UNREADABLE if unreadable else RESET)

    def _read_head(self, end: int) -> None:
        head = bytes(self._received[:end]).lower()
        self._reusable = b"\r\nconnection: close" not in head
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        _, found, rest = head.partition(b"\r\ncontent-length:")
        if found:
            self._body_end = end + 4 + int(rest.partition(b"\r\n")[0])
        else:  # up to the last chunk, or up to the connection's end, which is not read here
            self._body_end = sys.maxsize

    def _complete(self) -> bool:
        if self._chunked:
            return self._received.endswith(b"\r\n0\r\n\r\n")
        return len(self._received) >= self._body_end


def _counts(outcomes: list[int]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for outcome, count in Counter(outcomes).items():
        counts[_kind(outcome)] += count
    kinds = ("2xx", "429", "503", "504", "other_4xx", "other_5xx", "resets", "timeouts")
    return {f"num_{kind}": counts[kind] for kind in (*kinds, "unconnected", "unreadable")}


def _kind(outcome: int) -> str:
    named = {RESET: "resets", TIMED_OUT: "timeouts", UNCONNECTED: "unconnected"}
    if outcome in named:
        return named[outcome]
    if outcome in (429, 503, 504):
        return str(outcome)
    hundreds = {2: "2xx", 4: "other_4xx", 5: "other_5xx"}
    return hundreds.get(outcome // 100, "unreadable")


def _percentile(values: np.ndarray, percent: float) -> float:
    """NaN where there are none."""
    return float(np.percentile(values, percent)) if len(values) else math.nan


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main(plan: str, message: str) -> None:
    """Run the plan and print its summary as JSON."""

    async def run() -> Summary:
        return await OpenLoop(Plan(**json.loads(plan)), Path(message).read_bytes()).run()

    print(json.dumps(asdict(uvloop.run(run()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
