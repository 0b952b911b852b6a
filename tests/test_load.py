"""The load generators against small servers whose behaviour is known: they must see it.

Times are bounded from below wherever that says enough; upper bounds are wide, because the machine
that runs this may be busy.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import LoadFailed, closed_loop, open_loop, parse_figures
from benchmarks.machine import cores
from benchmarks.open_loop import OpenLoop, Plan, Summary
from benchmarks.payload import Payload

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"
GOODBYE = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
PAYLOAD = Payload("story", "/", b"12345", {"Content-Type": "text/plain"})
Answer = Callable[[int, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers the n-th request as `answer(n, writer)` writes; counts what it saw."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.num_requests = self.num_connections = self.port = 0
        self.talks: set[asyncio.Task[None] | None] = set()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.talks.add(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while not writer.is_closing():
                await reader.readuntil(b"12345")
                self.num_requests += 1
                await self._answer(self.num_requests, writer)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    server = Server(answer)
    listener = await asyncio.start_server(server.talk, "127.0.0.1", 0, limit=16_000_000)
    server.port = listener.sockets[0].getsockname()[1]
    async with listener:
        yield server
    await asyncio.wait_for(asyncio.gather(*server.talks), 5)  # every client has gone


def always(message: bytes, delay_s: float = 0.0) -> Answer:
    async def answer(_: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(delay_s)
        writer.write(message)

    return answer


async def offer(server: Server, payload: Payload = PAYLOAD, **plan: Any) -> Summary:
    options = {"rate_per_s": 100.0, "seconds": 0.5, "arrivals": "constant", **plan}
    full = Plan(port=server.port, **options)
    return await asyncio.to_thread(OpenLoop(full, payload.message(server.port)).run)


async def test_a_known_delay_is_seen() -> None:
    async with serving(always(OK, delay_s=0.05)) as server:
        summary = await offer(server)
    assert summary.num_2xx == summary.num_requests == server.num_requests == 50
    assert 50 <= summary.p50_ms < 500
    assert summary.max_ms >= summary.p99_ms >= summary.p90_ms >= summary.p50_ms


async def test_what_waits_behind_a_slow_server_is_charged_from_its_schedule() -> None:
    """Capacity 50 a second, offered 100: a closed loop would still say 20 ms."""
    turn = asyncio.Lock()

    async def one_at_a_time(_: int, writer: asyncio.StreamWriter) -> None:
        async with turn:
            await asyncio.sleep(0.02)
            writer.write(OK)

    async with serving(one_at_a_time) as server:
        summary = await offer(server, seconds=1.0)
    assert summary.num_2xx == 100
    assert summary.p50_ms >= 400
    assert summary.max_ms >= 900


async def test_a_single_stall_is_felt_by_all_that_were_due_in_it() -> None:
    """The only connection stalls for 300 ms: 30 requests were due then, not one."""

    async def stall_once(number: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3 if number == 10 else 0)
        writer.write(OK)

    async with serving(stall_once) as server:
        summary = await offer(server, max_connections=1, within_ms=100)
    assert summary.num_2xx == 50
    assert summary.max_ms >= 300
    assert summary.goodput_per_s <= 0.65 * summary.offered_per_s


async def test_each_kind_of_answer_is_counted_and_refusals_are_timed() -> None:
    async def every_second(number: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.03)
        writer.write(OK if number % 2 else BUSY)

    async with serving(every_second) as server:
        summary = await offer(server)
    assert (summary.num_2xx, summary.num_429) == (25, 25)
    assert summary.goodput_per_s == 50
    assert summary.refusal_max_ms >= summary.refusal_p50_ms >= 30


@pytest.mark.parametrize("message", [OK, CHUNKED])
async def test_connections_are_used_again(message: bytes) -> None:
    async with serving(always(message)) as server:
        summary = await offer(server, max_connections=4)
    assert summary.num_2xx == 50
    assert server.num_connections == summary.num_connections <= 4


async def test_a_connection_that_the_server_ends_politely_is_replaced() -> None:
    async def goodbye(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(GOODBYE)
        writer.close()

    async with serving(goodbye) as server:
        summary = await offer(server)
    assert (summary.num_2xx, summary.num_resets) == (50, 0)
    assert server.num_connections == 50


async def test_an_answer_in_pieces_is_one_answer() -> None:
    async def in_pieces(_: int, writer: asyncio.StreamWriter) -> None:
        for piece in (OK[:7], OK[7:-3], OK[-3:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)

    async with serving(in_pieces) as server:
        summary = await offer(server)
    assert summary.num_2xx == 50
    assert summary.p50_ms >= 10


async def test_a_request_that_the_kernel_takes_in_pieces_arrives_whole() -> None:
    large = Payload("large", "/", bytes(8_000_000) + b"12345", {})
    async with serving(always(OK)) as server:
        summary = await offer(server, large, rate_per_s=4, seconds=1.0)
    assert summary.num_2xx == summary.num_requests == 4


async def test_a_cut_answer_is_a_reset() -> None:
    async def cut(number: int, writer: asyncio.StreamWriter) -> None:
        writer.write(OK if number % 5 else OK[:-1])
        if number % 5 == 0:
            writer.close()

    async with serving(cut) as server:
        summary = await offer(server)
    assert (summary.num_2xx, summary.num_resets) == (40, 10)


async def test_silence_is_a_timeout_and_the_run_ends() -> None:
    async def silence(_: int, __: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)

    async with serving(silence) as server:
        summary = await offer(server, seconds=0.2, timeout_s=0.2)
    assert summary.num_timeouts == summary.num_requests == 20


async def test_nobody_listening_is_counted() -> None:
    async with serving(always(OK)) as server:
        pass
    summary = await offer(server, seconds=0.2)
    assert summary.num_unconnected == summary.num_requests == 20


async def test_warming_up_is_not_counted() -> None:
    async def slow_at_first(number: int, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2 if number <= 20 else 0)
        writer.write(OK)

    async with serving(slow_at_first) as server:
        summary = await offer(server, warm_up_s=0.25)
    assert (summary.num_requests, server.num_requests) == (50, 75)
    assert summary.num_offered == 75
    assert summary.p50_ms < 200


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    moments = Plan(port=1, rate_per_s=1000, seconds=20, arrivals="poisson", seed=3).moments()
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert moments == sorted(moments)
    assert len(moments) == pytest.approx(20_000, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)


def test_a_plan_without_requests_is_refused() -> None:
    plan = Plan(port=1, rate_per_s=0.001, seconds=0.1, seed=1)
    with pytest.raises(ValueError, match="no request"):
        OpenLoop(plan, b"").run()


@pytest.fixture
def slow_port() -> Iterator[int]:
    """A server in a thread, so that a generator in another process can be waited for here."""
    started, stop, ports = threading.Event(), asyncio.Event(), []

    async def run() -> None:
        async with serving(always(OK, delay_s=0.02)) as server:
            ports.append((server.port, asyncio.get_running_loop()))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(10)
    port, loop = ports[0]
    yield port
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


def test_the_open_loop_runs_in_a_process_of_its_own(slow_port: int) -> None:
    plan = Plan(port=slow_port, rate_per_s=50, seconds=0.5)
    summary = open_loop(PAYLOAD, plan, cores())
    assert summary.num_2xx == summary.num_requests > 5
    assert summary.p50_ms >= 20


def test_wrk_sends_the_body_and_sees_the_delay(slow_port: int) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed: apt-get install wrk")
    figures = closed_loop(PAYLOAD, slow_port, connections=2, seconds=1, cores=cores())
    assert 20 <= figures.p50_ms < 500
    assert 1 < figures.rate_per_s <= 100
    assert (figures.not_2xx, figures.socket_errors) == (0, 0)


async def test_a_generator_that_stood_still_says_so() -> None:
    """The request that was due while it was stopped left late, and no later one with it."""
    async with serving(always(OK)) as server:
        plan = Plan(port=server.port, rate_per_s=100.0, seconds=1.0, arrivals="constant")
        running = asyncio.create_task(asyncio.to_thread(open_loop, PAYLOAD, plan, cores()))
        while server.num_requests < 20:
            await asyncio.sleep(0.001)
        generators = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"benchmarks.open_loop" in path.read_bytes().split(b"\0")
            and f'"port": {server.port}'.encode() in path.read_bytes()
        ]
        for generator in generators:
            os.kill(generator, signal.SIGSTOP)
        await asyncio.sleep(0.2)
        for generator in generators:
            os.kill(generator, signal.SIGCONT)
        summary = await running
    longest = max(summary.stalls_s, key=lambda stall: stall[1] - stall[0])
    assert 0.15 < longest[1] - longest[0] < 0.6
    assert 0.15 < longest[0] < 0.9
    assert summary.max_ms > 150


def test_what_wrk_does_not_say_is_an_error() -> None:
    with pytest.raises(LoadFailed, match="unable to connect"):
        parse_figures("unable to connect to 127.0.0.1:1")
