"""The graceful stop, with real signals: nothing that was received stays without an answer."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from raw_http import Answer, RawClient, connected
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from app.http.listener import ListenError, listen
from app.http.server import HttpServer, serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
SLOW = GET.replace(b"GET /", b"GET /slow")


@dataclass
class Service:
    """A server on the loop of the test, stopped by real signals to this process."""

    server: HttpServer
    listener: socket.socket
    port: int
    done: "asyncio.Task[None]"
    drained: list[float] = field(default_factory=list)

    async def ask(self, data: bytes) -> Answer:
        return await asyncio.to_thread(self._ask, data)

    def _ask(self, data: bytes) -> Answer:
        with connected(self.port) as client:
            return client.send(data).answer()

    async def client(self) -> RawClient:
        return await asyncio.to_thread(RawClient, self.port)


async def home(_request: Request) -> Response:
    return PlainTextResponse("home")


async def slow(request: Request) -> Response:
    await asyncio.sleep(float(request.query_params.get("s", "0.4")))
    return PlainTextResponse("slow")


def tiny_app() -> Starlette:
    return Starlette(routes=[Route("/", home), Route("/slow", slow)])


@contextlib.asynccontextmanager
async def serving(drain_s: float = 0.3, **options: object) -> AsyncIterator[Service]:
    listener = listen("127.0.0.1", 0)
    drained: list[float] = []
    server = HttpServer(
        tiny_app(),
        drain_s=drain_s,
        on_drain=lambda: drained.append(time.monotonic()),
        **options,  # type: ignore[arg-type]
    )
    done = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield Service(server, listener, listener.getsockname()[1], done, drained)
    server.should_exit = True
    await asyncio.wait_for(done, 5)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(params=["httptools", "h11"])
def parser(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.anyio
async def test_sigterm_drains(parser: str) -> None:
    async with serving(parser=parser) as service:
        received = asyncio.create_task(service.ask(SLOW))
        await asyncio.sleep(0.1)
        killed = time.monotonic()
        kill(signal.SIGTERM)
        await asyncio.sleep(0.05)
        new = await service.ask(GET)
        assert (new.status, new.headers["connection"]) == (200, "close")
        kill(signal.SIGTERM)
        assert (await received).body == b"slow"
        await asyncio.wait_for(service.done, 2)
        assert len(service.drained) == 1
        assert service.drained[0] - killed < 0.1
        assert time.monotonic() - killed > 0.3
        with pytest.raises(ConnectionRefusedError):
            await service.client()


@pytest.mark.anyio
async def test_sigint_stops_at_once_and_answers_what_was_received(parser: str) -> None:
    async with serving(drain_s=60, parser=parser) as service:
        received = asyncio.create_task(service.ask(SLOW))
        await asyncio.sleep(0.1)
        kill(signal.SIGINT)
        assert (await received).body == b"slow"
        await asyncio.wait_for(service.done, 2)
        assert len(service.drained) == 1


@pytest.mark.anyio
async def test_sigint_ends_a_drain(parser: str) -> None:
    async with serving(drain_s=60, parser=parser) as service:
        kill(signal.SIGTERM)
        await asyncio.sleep(0.05)
        kill(signal.SIGINT)
        await asyncio.wait_for(service.done, 2)
        assert (len(service.drained), service.server.force_exit) == (1, False)


@pytest.mark.anyio
async def test_second_sigint_waits_for_nobody() -> None:
    async with serving() as service:
        abandoned = asyncio.create_task(service.ask(SLOW.replace(b"/slow", b"/slow?s=60")))
        await asyncio.sleep(0.1)
        for _ in range(2):
            kill(signal.SIGINT)
            await asyncio.sleep(0.05)
        await asyncio.wait_for(service.done, 2)
        assert service.server.force_exit
        with pytest.raises(EOFError):
            await abandoned


@pytest.mark.anyio
async def test_idle_connections_do_not_hold_the_stop_up(parser: str) -> None:
    async with serving(parser=parser) as service:
        silent, idle = await service.client(), await service.client()
        assert (await asyncio.to_thread(idle.send(GET).answer)).status == 200
        kill(signal.SIGINT)
        await asyncio.wait_for(service.done, 2)
        assert [idle.rest(), silent.rest()] == [b"", b""]
        for client in (idle, silent):
            client.connection.close()


@pytest.mark.anyio
async def test_request_that_lies_in_the_socket_at_the_stop_is_answered(parser: str) -> None:
    async with serving(parser=parser) as service:
        client = await service.client()
        while not service.server.server_state.connections:
            await asyncio.sleep(0)
        service.server.stop()
        while service.listener.fileno() != -1:
            await asyncio.sleep(0)
        client.send(GET)  # the socket has closed, and the loop had no turn to read this
        assert (await asyncio.to_thread(client.answer)).status == 200
        await asyncio.wait_for(service.done, 2)
        client.connection.close()


@pytest.mark.anyio
async def test_connection_that_waits_to_be_accepted_at_the_stop_is_answered() -> None:
    async with serving() as service:
        stop = asyncio.create_task(service.server.shutdown([service.listener]))
        client = RawClient(service.port).send(GET)  # no turn of the loop since
        assert (await asyncio.to_thread(client.answer)).status == 200
        await stop
        client.connection.close()


@pytest.mark.anyio
async def test_connections_are_asked_to_close_while_draining(parser: str) -> None:
    async with serving(drain_s=60, parser=parser) as service:
        client = await service.client()
        first = await asyncio.to_thread(client.send(GET).answer)
        service.server.drain()
        await service.server.on_tick(0)  # sets the headers of every answer anew
        second = await asyncio.to_thread(client.send(GET).answer)
        assert (first.headers.get("connection"), second.headers["connection"]) == (None, "close")
        assert await asyncio.to_thread(client.rest) == b""
        client.connection.close()


@pytest.mark.anyio
async def test_request_beyond_the_grace_gets_an_answer_too() -> None:
    async with serving(drain_s=0, grace_s=0.2) as service:
        endless = asyncio.create_task(service.ask(SLOW.replace(b"/slow", b"/slow?s=60")))
        await asyncio.sleep(0.1)
        kill(signal.SIGTERM)
        assert (await endless).status == 500
        await asyncio.wait_for(service.done, 2)


@pytest.mark.anyio
async def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with serving():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_taken_port_is_told_in_one_sentence() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ListenError, match=f"Cannot listen on 127.0.0.1:{port}: Address"):
            listen("127.0.0.1", port)


def test_unknown_host_is_told_in_one_sentence() -> None:
    with pytest.raises(ListenError, match="Cannot listen on"):
        listen("no such host", 0)


def test_failed_start_up_is_exit_code_3() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        raise OSError("no store")
        yield

    listener = listen("127.0.0.1", 0)
    assert serve(Starlette(lifespan=lifespan), sockets=[listener]) == 3
    assert listener.fileno() == -1


def test_serve_returns_0_after_a_signal_and_uses_the_socket_it_is_given() -> None:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    answers: list[int] = []

    def ask_and_kill() -> None:
        with connected(port) as client:  # before the server runs: the socket already listens
            answers.append(client.send(GET).answer().status)
        kill(signal.SIGTERM)

    thread = threading.Thread(target=ask_and_kill)
    thread.start()
    assert serve(tiny_app(), sockets=[listener], drain_s=0) == 0
    thread.join()
    assert answers == [200]


# As processes of their own.

PROGRAM = """
import asyncio, sys
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from app.http.listener import listen
from app.http.server import serve

draining = []

async def ready(request):
    return PlainTextResponse("", 503 if draining else 200)

async def slow(request):
    await asyncio.sleep(float(request.query_params["s"]))
    return PlainTextResponse("slow")

app = Starlette(routes=[Route("/readyz", ready), Route("/slow", slow)])
listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
drain_s, parser = float(sys.argv[1]), sys.argv[2]
on_drain = lambda: draining.append(True)
sys.exit(serve(app, sockets=[listener], drain_s=drain_s, parser=parser, on_drain=on_drain))
"""


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        try:
            yield child, int(child.stdout.readline())
        finally:
            child.kill()


def ask(port: int, path: str) -> Answer:
    with connected(port) as client:
        client.connection.settimeout(10)
        return client.send(GET.replace(b"GET /", b"GET " + path.encode())).answer()


@pytest.mark.slow
@pytest.mark.parametrize("_round", range(3))
def test_sigterm_with_64_in_flight_loses_none(parser: str, _round: int) -> None:
    with process("5", parser) as (child, port), ThreadPoolExecutor(80) as pool:
        assert ask(port, "/readyz").status == 200
        times_s = [0.3 + 2.7 * i / 63 for i in range(64)]
        received = [pool.submit(ask, port, f"/slow?s={time_s}") for time_s in times_s]
        time.sleep(0.25)
        killed = time.monotonic()
        child.terminate()
        while ask(port, "/readyz").status == 200:
            assert time.monotonic() - killed < 0.1
        while time.monotonic() - killed < 4.5:
            assert ask(port, "/slow?s=0.05").status == 200
            child.terminate()
        assert [each.result().status for each in received] == [200] * 64
        assert child.wait(5) == 0
        assert 5 < time.monotonic() - killed < 7


@pytest.mark.slow
def test_ctrl_c_of_a_process_answers_what_was_received(parser: str) -> None:
    with process("60", parser) as (child, port), ThreadPoolExecutor(80) as pool:
        assert ask(port, "/readyz").status == 200
        received = [pool.submit(ask, port, "/slow?s=1") for _ in range(64)]
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        assert [each.result().status for each in received] == [200] * 64
        assert child.wait(5) == 0
