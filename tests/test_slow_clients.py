"""A thousand clients that trickle and a thousand that stay silent, for as long as they like."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_EACH = 1000
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

SERVER = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from app.http.listener import listen
from app.http.server import serve

async def home(request):
    return PlainTextResponse("home")

listener = listen("127.0.0.1", 0)
print(listener.getsockname()[1], flush=True)
serve(Starlette(routes=[Route("/", home)]), sockets=[listener], drain_s=0)
"""

ATTACK = """
import contextlib, os, select, socket, sys, time
from app.http.server import raise_open_files_limit

port, num_each = int(sys.argv[1]), int(sys.argv[2])
raise_open_files_limit()
os.nice(19)  # it stands for other machines
held, held_s = {}, []

def visit(number):
    # Looks whether it was closed, and opens it again; every second one sends a byte.
    connection, begun = held.get(number, (None, 0.0))
    with contextlib.suppress(BlockingIOError):
        if connection is None:
            raise ConnectionError
        if not connection.recv(4096):
            raise ConnectionError
        return
    if number % 2:
        connection.send(b"G")

def keep(number):
    try:
        visit(number)
    except ConnectionError:
        connection, begun = held.pop(number, (None, 0.0))
        if connection is not None:
            held_s.append(time.monotonic() - begun)
            connection.close()
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setblocking(False)
        held[number] = (connection, time.monotonic())

print("begun", flush=True)
number, next_s = 0, time.monotonic()
while not select.select([sys.stdin], [], [], max(0, next_s - time.monotonic()))[0]:
    keep(number)
    number, next_s = (number + 1) % (2 * num_each), next_s + 0.5 / num_each
print(len(held), len(held_s), max(held_s, default=0), flush=True)
"""


@contextlib.contextmanager
def process(program: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", program, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def line_of(child: "subprocess.Popen[str]") -> str:
    assert child.stdout
    return child.stdout.readline()


async def latencies_ms(port: int, seconds: float) -> list[float]:
    """Ask on four connections; any answer but 200 is an error."""
    end = time.monotonic() + seconds
    found: list[float] = []

    async def ask() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            begun = time.perf_counter()
            writer.write(GET)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 200 ")
            await asyncio.wait_for(reader.readexactly(4), 5)
            found.append((time.perf_counter() - begun) * 1000)
            await asyncio.sleep(0.002)
        writer.close()

    await asyncio.gather(*(ask() for _ in range(4)))
    return found


def p99_ms(port: int, seconds: float) -> float:
    found = sorted(asyncio.run(latencies_ms(port, seconds)))
    return found[int(len(found) * 0.99)]


@pytest.mark.slow
@pytest.mark.alone
def test_two_thousand_slow_clients_cost_real_requests_little() -> None:
    with process(SERVER) as server:
        port = int(line_of(server))
        before = [p99_ms(port, 3) for _ in range(3)]
        with process(ATTACK, str(port), str(NUM_EACH)) as attack:
            assert line_of(attack) == "begun\n"
            time.sleep(6)
            under_attack = [p99_ms(port, 3) for _ in range(3)]
            time.sleep(8)
            num_open, num_closed, longest_s = attack.communicate()[0].split()
        assert int(num_open) == 2 * NUM_EACH
        assert int(num_closed) > NUM_EACH
        assert float(longest_s) < 20, "the deadline is 10 s; the machine may be busy"
        assert min(under_attack) <= 1.5 * min(before), (before, under_attack)
