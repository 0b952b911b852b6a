"""Load that does not wait for the server: requests leave at moments that were drawn beforehand.

Latency counts from the scheduled moment, so a server that stalls is charged for every request that
should have been sent meanwhile, and nothing is left out (no coordinated omission). Run by
`benchmarks.load.open_loop` in a process of its own; alone: `python -m benchmarks.open_loop PLAN
MESSAGE`, a JSON object with the fields of `Plan` and a file with one HTTP request.
"""

import contextlib
import gc
import json
import math
import resource
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from benchmarks.alarm import Alarm

HOST: Final = "127.0.0.1"
SWEEP_S: Final = 0.05
STALL_S: Final = 0.0005
READ_BYTES: Final = 1 << 16
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
        stalls_s: from when until when it sent nothing that was due, in seconds from the beginning,
            for `STALL_S` and longer: the machine let it stand still.
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
    stalls_s: Sequence[Sequence[float]]


class OpenLoop:
    """One run of a plan, on the thread that calls it.

    A callback and a task a request would cost as much as a small network takes to answer, and be
    told as the server's. So this waits for the kernel itself (epoll), and an answer has come when
    the kernel said that it is there, not when the program got round to read it.

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
        self._began = self._now = self._share = math.nan
        self._waiting: deque[int] = deque()
        self._idle: list[_Connection] = []
        self._busy: dict[_Connection, int] = {}
        self._connections: dict[int, _Connection] = {}
        self._poll: select.epoll

    def run(self) -> Summary:
        """Offer everything, wait for the answers, and sum up.

        Raises:
            ValueError: the plan holds no request.
        """
        if not self._offsets:
            raise ValueError("the plan holds no request: its rate or its time is too small")
        gc.collect()
        gc.disable()  # a collection would be a pause that the server is blamed for
        self._began = time.monotonic() + 0.01
        cpu_s, wall_s = _cpu_s(), time.monotonic()
        try:
            with select.epoll() as self._poll, contextlib.closing(Alarm()) as alarm:
                self._offer(alarm)
        finally:
            gc.enable()
            for connection in self._connections.values():
                connection.close()
        self._share = (_cpu_s() - cpu_s) / (time.monotonic() - wall_s)
        return self._summary(np.array(self._offsets) >= self._plan.warm_up_s, self._plan.seconds)

    def answered(self, connection: "_Connection", status: int, reusable: bool) -> None:
        """A connection has its whole answer."""
        self._record(self._busy.pop(connection), status)
        if not reusable:
            self._drop(connection)
        elif self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _offer(self, alarm: Alarm) -> None:
        self._poll.register(alarm.descriptor, select.EPOLLIN)
        alarm.set(self._began + self._offsets[0])
        sweep_at = self._began + SWEEP_S
        while self._recorded < len(self._offsets):
            ready = self._poll.poll(SWEEP_S)
            self._now = time.monotonic()
            for descriptor, _ in ready:
                if descriptor == alarm.descriptor:
                    alarm.clear()
                elif descriptor in self._connections:
                    self._attend(self._connections[descriptor])
            due = self._dispatch_due()
            if due is not None:
                alarm.set(due)
            if self._now > sweep_at:
                self._sweep()
                sweep_at = self._now + SWEEP_S

    def _attend(self, connection: "_Connection") -> None:
        """Go on with a connection that is open now, can be read, or takes more of its request."""
        if not connection.is_open:
            self._opened(connection)
            return
        try:
            answer = connection.go_on()
        except OSError:
            self._lost(connection, RESET)
        except EOFError:
            self._lost(connection, UNREADABLE if connection.has_no_end else RESET)
        else:
            if answer is not None:
                self.answered(connection, *answer)

    def _dispatch_due(self) -> float | None:
        """Send what is due; when the next will be, None where that was the last."""
        while self._next < len(self._offsets):
            now, due = time.monotonic(), self._began + self._offsets[self._next]
            if due > now:
                return due
            self._dispatched[self._next] = now
            if self._idle:
                self._send(self._idle.pop(), self._next)
            else:
                self._waiting.append(self._next)
                self._open_if_wanted()
            self._next += 1
        return None

    def _send(self, connection: "_Connection", index: int) -> None:
        self._busy[connection] = index
        try:
            connection.send(self._message)
        except OSError:
            self._lost(connection, RESET)

    def _open_if_wanted(self) -> None:
        """Open a connection, unless as many are being opened as requests wait."""
        wanted = self._num_opening < len(self._waiting)
        if wanted and len(self._connections) < self._plan.max_connections:
            connection = _Connection(self._plan.port, self._poll)
            self._connections[connection.descriptor] = connection
            self._num_opening += 1

    def _opened(self, connection: "_Connection") -> None:
        self._num_opening -= 1
        if not connection.opened():
            if self._waiting:
                self._record(self._waiting.popleft(), UNCONNECTED)
            self._drop(connection)
            return
        self._num_connections += 1
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _lost(self, connection: "_Connection", outcome: int) -> None:
        """A connection has ended; its request, if it had one, will not be answered."""
        index = self._busy.pop(connection, None)
        if index is not None:
            self._record(index, outcome)
        elif connection in self._idle:
            self._idle.remove(connection)
        self._drop(connection)

    def _drop(self, connection: "_Connection") -> None:
        """Let go of a connection that has no request any more; others may wait for its place."""
        del self._connections[connection.descriptor]
        connection.close()
        self._open_if_wanted()

    def _sweep(self) -> None:
        """Give up what is too old."""
        oldest = self._now - self._began - self._plan.timeout_s
        while self._waiting and self._offsets[self._waiting[0]] < oldest:
            self._record(self._waiting.popleft(), TIMED_OUT)
        for connection, index in list(self._busy.items()):
            if self._offsets[index] < oldest:
                self._lost(connection, TIMED_OUT)

    def _record(self, index: int, outcome: int) -> None:
        self._done[index] = self._now
        self._outcome[index] = outcome
        self._recorded += 1

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
            stalls_s=self._stalls_s(),
        )

    def _stalls_s(self) -> list[list[float]]:
        """What was due in a stall was sent together at its end, so it is of one."""
        stalls: list[list[float]] = []
        for due, dispatched in zip(self._offsets, self._dispatched, strict=True):
            sent = dispatched - self._began
            if sent - due >= STALL_S and not (stalls and due <= stalls[-1][1]):
                stalls.append([due, sent])
        return stalls


class _Connection:
    """One kept-alive connection with at most one request on its way.

    Raises (`send` and `go_on`):
        OSError: it is broken.
        EOFError: the server has ended it.
    """

    def __init__(self, port: int, poll: select.epoll) -> None:
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.connect_ex((HOST, port))
        self.descriptor = self._socket.fileno()
        self._poll = poll
        poll.register(self.descriptor, select.EPOLLOUT)
        self.is_open = False
        self._unsent: memoryview | None = None
        self._received = b""
        self._expecting = False
        self._body_end = 0  # 0 until the header is complete
        self._chunked = self._reusable = False

    @property
    def has_no_end(self) -> bool:
        """Whether its answer said no length, so that only the connection's end ends it."""
        return self._expecting and self._body_end == sys.maxsize and not self._chunked

    @property
    def body(self) -> bytes:
        """Of the answer that is complete, where it says its length."""
        return self._received[self._received.find(b"\r\n\r\n") + 4 :]

    def opened(self) -> bool:
        """Whether it could be opened, once the kernel knows."""
        self.is_open = not self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if self.is_open:
            self._poll.modify(self.descriptor, select.EPOLLIN)
        return self.is_open

    def send(self, message: bytes) -> None:
        """Send a request; `go_on` will give its answer once."""
        self._received, self._expecting, self._body_end = b"", True, 0
        num_sent = self._sent(message)
        if num_sent < len(message):
            self._unsent = memoryview(message)[num_sent:]
            self._poll.modify(self.descriptor, select.EPOLLIN | select.EPOLLOUT)

    def go_on(self) -> tuple[int, bool] | None:
        """Send and read what can be; status and whether it can be used again of a whole answer."""
        if self._unsent is not None:
            self._send_on(self._unsent)
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        if not self._expecting:
            raise ConnectionError("nothing was asked")
        self._received = self._received + data if self._received else data
        if not self._body_end:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return None
            self._read_head(end)
        if not self._is_complete():
            return None
        self._expecting = False
        return int(self._received[9:12]), self._reusable

    def close(self) -> None:
        """End it, whatever is on its way."""
        self._socket.close()

    def _send_on(self, unsent: memoryview) -> None:
        self._unsent = unsent[self._sent(unsent) :] or None
        if self._unsent is None:
            self._poll.modify(self.descriptor, select.EPOLLIN)

    def _sent(self, message: bytes | memoryview) -> int:
        try:
            return self._socket.send(message)
        except BlockingIOError:
            return 0

    def _read_head(self, end: int) -> None:
        head = self._received[:end].lower()
        self._reusable = b"\r\nconnection: close" not in head
        self._chunked = b"\r\ntransfer-encoding: chunked" in head
        _, found, rest = head.partition(b"\r\ncontent-length:")
        if found:
            self._body_end = end + 4 + int(rest.partition(b"\r\n")[0])
        else:  # up to the last chunk, or up to the connection's end, which is not read here
            self._body_end = sys.maxsize

    def _is_complete(self) -> bool:
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
    summary = OpenLoop(Plan(**json.loads(plan)), Path(message).read_bytes()).run()
    print(json.dumps(asdict(summary)))


if __name__ == "__main__":
    main(*sys.argv[1:])
