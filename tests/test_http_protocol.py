"""Raw bytes against a real server: what each parser used to accept, and how both now answer."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_http import RunningServer, connected, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from app.http.chunks import ChunkedBody
from app.http.head import CHUNKED, HeadGrammar, UpgradeAsked
from app.http.limits import HttpLimits
from app.http.protocol import connection_class
from app.http.refusal import HttpRefusal

SHORT = HttpLimits(
    first_byte_s=0.2,
    head_s=0.4,
    body_idle_s=0.2,
    body_grace_s=0.4,
    min_body_bytes_per_s=4_000_000,
    keep_alive_s=0.2,
    write_idle_s=0.2,
    linger_s=0.2,
)
HOST = b"Host: localhost\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST + b"\r\n"


def post(fields: bytes, body: bytes = b"", path: bytes = b"/echo") -> bytes:
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + fields + b"\r\n" + body


async def home(_request: Request) -> Response:
    return PlainTextResponse("home")


async def echo(request: Request) -> Response:
    body = await request.body()
    fields = [name for name, _ in request.scope["headers"]]
    return PlainTextResponse(f"{len(body)}", headers={"num-fields": str(len(fields))})


async def early(_request: Request) -> Response:
    return PlainTextResponse("no thanks", status_code=401)


async def slow(_request: Request) -> Response:
    await asyncio.sleep(0.1)
    return PlainTextResponse("slow")


async def sleepy(request: Request) -> Response:
    """Takes its time before it reads, which is not the sender's fault."""
    await asyncio.sleep(0.3)
    return await echo(request)


async def sip(request: Request) -> Response:
    """Reads slower than a sender may send."""
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        await asyncio.sleep(0.1)
    return PlainTextResponse(str(num_bytes))


async def drip(_request: Request) -> Response:
    """Answers without end."""

    async def drops() -> AsyncIterator[bytes]:
        while True:
            yield b"drop"
            await asyncio.sleep(0.02)

    return StreamingResponse(drops())


async def huge(_request: Request) -> Response:
    return Response(b"x" * 20_000_000)


def tiny_app() -> Starlette:
    routes = [Route("/", home)]
    routes += [Route(f"/{f.__name__}", f, methods=["GET", "POST"]) for f in (slow, huge, drip)]
    routes += [Route(f"/{f.__name__}", f, methods=["POST"]) for f in (echo, early, sleepy, sip)]
    return Starlette(routes=routes)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def parser(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(parser: str) -> Iterator[RunningServer]:
    with running(tiny_app(), parser=parser) as server:
        yield server


@pytest.fixture(scope="module")
def strict_server(parser: str) -> Iterator[RunningServer]:
    """With deadlines short enough to wait for."""
    with running(tiny_app(), parser=parser, limits=SHORT) as server:
        yield server


MALFORMED = {
    "two hosts": b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "two different hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHOST: b\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n",
    "no host in HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "empty host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "host with a path": b"GET / HTTP/1.1\r\nHost: localhost/x?\r\n\r\n",
    "host with a user": b"GET / HTTP/1.1\r\nHost: a@localhost\r\n\r\n",
    "list of hosts": b"GET / HTTP/1.1\r\nHost: localhost, evil\r\n\r\n",
    "host with a bad port": b"GET / HTTP/1.1\r\nHost: localhost:80x\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: 1\r\n folded\r\n\r\n",
    "folded with a tab": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: 1\r\n\tfolded\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n X-A: 1\r\n" + HOST + b"\r\n",
    "bare line feeds": b"GET / HTTP/1.1\nHost: localhost\n\n",
    "one bare line feed": b"GET / HTTP/1.1\r\nHost: localhost\nX-A: 1\r\n\r\n",
    "bare line feed in the end": b"GET / HTTP/1.1\r\nHost: localhost\r\n\n",
    "bare carriage return": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: 1\rX-B: 2\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: \x00\r\n\r\n",
    "control in a value": b"GET / HTTP/1.1\r\n" + HOST + b"X-A: \x01\r\n\r\n",
    "length and coding": post(b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "coding and length": post(b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", b"0\r\n\r\n"),
    "two lengths": post(b"Content-Length: 2\r\nContent-Length: 3\r\n", b"abc"),
    "one length twice": post(b"Content-Length: 2\r\nContent-Length: 2\r\n", b"ab"),
    "list of lengths": post(b"Content-Length: 2, 2\r\n", b"ab"),
    "length with a plus": post(b"Content-Length: +2\r\n", b"ab"),
    "negative length": post(b"Content-Length: -1\r\n", b"ab"),
    "hexadecimal length": post(b"Content-Length: 0x2\r\n", b"ab"),
    "empty length": post(b"Content-Length:\r\n"),
    "endless length": post(b"Content-Length: " + b"9" * 30 + b"\r\n"),
    "unknown coding": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n"),
    "coding of two": post(b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n"),
    "coding twice": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", b"0"),
    "coding in HTTP/1.0": b"POST /echo HTTP/1.0\r\n"
    + HOST
    + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\n" + HOST + b"X-A : 1\r\n\r\n",
    "space before the host's colon": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "space before length's colon": post(b"Content-Length : 2\r\n", b"ab"),
    "header without a colon": b"GET / HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n",
    "header without a name": b"GET / HTTP/1.1\r\n" + HOST + b": 1\r\n\r\n",
    "name with a bracket": b"GET / HTTP/1.1\r\n" + HOST + b"X(A): 1\r\n\r\n",
    "bad chunk terminator": post(b"Transfer-Encoding: chunked\r\n", b"3\r\nabcXX0\r\n\r\n"),
    "bad chunk size": post(b"Transfer-Encoding: chunked\r\n", b"+3\r\nabc\r\n0\r\n\r\n"),
    "hexadecimal prefix": post(b"Transfer-Encoding: chunked\r\n", b"0x3\r\nabc\r\n0\r\n\r\n"),
    "empty chunk size": post(b"Transfer-Encoding: chunked\r\n", b"\r\nabc\r\n0\r\n\r\n"),
    "space behind chunk size": post(b"Transfer-Encoding: chunked\r\n", b"3 \r\nabc\r\n0\r\n\r\n"),
    "chunk with bare line feed": post(b"Transfer-Encoding: chunked\r\n", b"3\nabc\r\n0\r\n\r\n"),
    "endless chunk size": post(b"Transfer-Encoding: chunked\r\n", b"1" * 20 + b"\r\n"),
    "endless chunk extension": post(b"Transfer-Encoding: chunked\r\n", b"1;" + b"x" * 9000),
    "bad trailer": post(b"Transfer-Encoding: chunked\r\n", b"0\r\nnonsense\r\n\r\n"),
    "empty line first": b"\r\n" + GET,
    "two spaces": GET.replace(b"GET /", b"GET  /"),
    "no version": b"GET /\r\n" + HOST + b"\r\n",
    "whole address as target": GET.replace(b"GET /", b"GET http://localhost/"),
    "target without a slash": GET.replace(b"GET /", b"GET x"),
    "target with a fragment": GET.replace(b"GET /", b"GET /#x"),
    "target beyond ASCII": GET.replace(b"GET /", b"GET /\xc3\xa9"),
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    "noise": bytes(range(256)),
}
OTHER_REFUSALS = {
    "unknown method": (501, GET.replace(b"GET", b"BREW")),
    "lower-case method": (501, GET.replace(b"GET", b"get")),
    "tunnel": (501, b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1.2": (505, GET.replace(b"1.1", b"1.2")),
    "101 fields": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 100 + b"\r\n"),
    "200,000 fields": (431, b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 200_000 + b"\r\n"),
    "a header one byte too large": (
        431,
        GET[:-2] + b"X: " + b"x" * (32769 - len(GET) - 5) + b"\r\n\r\n",
    ),
    "a header of 64 MiB": (431, GET[:-2] + b"X: " + b"x" * 2**26 + b"\r\n\r\n"),
    "101 trailer fields": (
        431,
        post(b"Transfer-Encoding: chunked\r\n", b"0\r\n" + b"X: 1\r\n" * 101 + b"\r\n"),
    ),
    "an endless trailer": (
        431,
        post(b"Transfer-Encoding: chunked\r\n", b"0\r\nX: " + b"x" * 40_000),
    ),
}
ACCEPTED = {
    "plain": (200, GET),
    "HTTP/1.0": (200, GET.replace(b"1.1", b"1.0")),
    "with a port": (200, GET.replace(b"localhost", b"localhost:8000")),
    "IPv6": (200, GET.replace(b"localhost", b"[::1]:8000")),
    "query with odd characters": (200, GET.replace(b"GET /", b'GET /?"<>\\^`{|}%zz??')),
    "two slashes": (404, GET.replace(b"GET /", b"GET //evil")),
    "value beyond ASCII": (200, GET[:-2] + b"X-A: \xc3\xa9\t\xff\r\n\r\n"),
    "no space behind colon": (200, b"GET / HTTP/1.1\r\nhost:localhost\r\n\r\n"),
    "100 fields": (200, b"GET / HTTP/1.1\r\n" + HOST + b"X: 1\r\n" * 99 + b"\r\n"),
    "a header of 32 KiB": (200, GET[:-2] + b"X: " + b"x" * (32768 - len(GET) - 5) + b"\r\n\r\n"),
    "unallowed method": (405, GET.replace(b"GET", b"TRACE")),
    "length": (200, post(b"Content-Length: 5\r\n", b"hello")),
    "length with zeros": (200, post(b"Content-Length: 005\r\n", b"hello")),
    "chunked": (200, post(b"Transfer-Encoding: Chunked\r\n", b"5\r\nhello\r\n0\r\n\r\n")),
    "chunk with extension": (
        200,
        post(b"Transfer-Encoding: chunked\r\n", b'5;a="b;c" ;; d\r\nhello\r\n0;x\r\n\r\n'),
    ),
    "upgrade to HTTP/2": (
        200,
        post(
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
            b"Content-Length: 5\r\n",
            b"hello",
        ),
    ),
    "upgrade to a web socket": (
        200,
        GET[:-2] + b"Connection: upgrade\r\nUPGRADE: websocket\r\nUpgrade: x\r\n\r\n",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_request_is_400_in_both_parsers(server: RunningServer, case: str) -> None:
    with connected(server.port) as client:
        answer = client.send(MALFORMED[case]).answer()
        assert (answer.status, answer.error["code"]) == (400, "malformed_request")
        assert answer.error["message"].endswith(".")
        assert client.rest() == b"", "never two responses, and the connection ends"


@pytest.mark.parametrize("case", OTHER_REFUSALS)
def test_too_much_or_unknown_is_refused_in_both_parsers(server: RunningServer, case: str) -> None:
    status, data = OTHER_REFUSALS[case]
    with connected(server.port) as client:
        assert client.send(data).answer().status == status
        assert client.rest() == b""


@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.parametrize("split", ["whole", "by byte", "head first"])
def test_good_request_is_answered_in_both_parsers(
    server: RunningServer, case: str, split: str
) -> None:
    status, data = ACCEPTED[case]
    with connected(server.port) as client:
        for part in parts_of(data, split):
            client.send(part)
        answer = client.answer()
        assert answer.status == status
        if data.startswith(b"POST"):
            assert answer.body == b"5"


def parts_of(data: bytes, split: str) -> list[bytes]:
    if split == "by byte" and len(data) < 1000:
        return [data[i : i + 1] for i in range(len(data))]
    end = data.index(b"\r\n\r\n") + 4
    return [data] if split == "whole" else [data[:end], data[end:]]


def test_refusal_carries_the_safe_headers_and_a_request_id(server: RunningServer) -> None:
    first, second = server.ask(MALFORMED["no host"]), server.ask(MALFORMED["no host"])
    assert first.headers["x-content-type-options"] == "nosniff"
    assert first.headers["cache-control"] == "no-store"
    assert first.headers["connection"] == "close"
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert "server" not in first.headers
    assert server.refused[-1] == "malformed_request"


def test_refusal_has_the_form_of_its_interface(server: RunningServer) -> None:
    head = b"POST /v2/models/m/infer?x=1 HTTP/1.1\r\n"
    v2 = json.loads(server.ask(head + b"\r\n").body)
    assert list(v2) == ["error"]
    assert "Host" in v2["error"]
    late = server.ask(head + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert isinstance(json.loads(late.body)["error"], str)
    v1 = json.loads(server.ask(head.replace(b"v2", b"v1") + b"\r\n").body)
    assert set(v1["error"]) == {"type", "message", "param", "code"}


def test_refusal_of_head_has_no_body(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(b"HEAD / HTTP/1.1\r\n\r\n")
        assert client.answer(has_body=False).status == 400
        assert client.rest() == b""


def test_trailers_do_not_become_headers(server: RunningServer) -> None:
    body = b"5\r\nhello\r\n0\r\nX-Admin: 1\r\nX-B: 2\r\n\r\n"
    with connected(server.port) as client:
        client.send(post(b"Transfer-Encoding: chunked\r\n", body) + GET)
        assert client.answer().headers["num-fields"] == "2"
        assert client.answer().body == b"home"


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    slow = GET.replace(b"GET /", b"GET /slow")
    chunks = post(b"Transfer-Encoding: chunked\r\n", b"2\r\nab\r\n0\r\n\r\n")
    with connected(server.port) as client:
        client.send(slow + post(b"Content-Length: 3\r\n", b"abc") + chunks + GET)
        assert [client.answer().body for _ in range(4)] == [b"slow", b"3", b"2", b"home"]


def test_bad_request_behind_a_good_one_waits_for_its_turn(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(GET.replace(b"GET /", b"GET /slow") + b"nonsense\r\n\r\n")
        assert client.answer().body == b"slow"
        assert client.answer().status == 400
        assert client.rest() == b""


def test_smuggled_request_in_a_refused_body_is_never_answered(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(MALFORMED["length and coding"] + GET)
        assert client.answer().status == 400
        assert client.rest() == b""


def test_fault_in_a_body_after_the_answer_adds_no_second_answer(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(post(b"Transfer-Encoding: chunked\r\n", b"", b"/early"))
        assert client.answer().status == 401
        assert client.send(b"zz\r\n").rest() == b""


def test_application_that_answers_a_refused_request_adds_no_second_answer(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server.port) as client:
        client.send(post(b"Transfer-Encoding: chunked\r\n", b"", b"/slow"))
        time.sleep(0.02)
        assert client.send(b"zz\r\n").answer().status == 400
        time.sleep(0.15)
        assert client.rest() == b""
    assert [each for each in caplog.records if each.levelname == "ERROR"] == []


def test_fault_behind_the_start_of_an_answer_cuts_it_off(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(post(b"Transfer-Encoding: chunked\r\n", b"", b"/drip"))
        time.sleep(0.05)
        assert client.send(b"zz\r\n").rest().count(b"HTTP/1.1 ") == 1


def test_repeated_head_does_not_vouch_for_what_comes_behind_it(server: RunningServer) -> None:
    request = post(b"Content-Length: 5\r\n", b"hello")
    with connected(server.port) as client:
        assert client.send(request).answer().body == b"5"
        client.send(request[:-2])
        time.sleep(0.02)
        assert client.send(request[-2:]).answer().body == b"5"
        client.send(request + GET)
        assert [client.answer().body for _ in range(2)] == [b"5", b"home"]
        client.send(request[:-2] + b"\r\n" + GET + b"X-Y: z\n\n")
        assert [client.answer().status for _ in range(3)] == [200, 200, 400]


def test_small_body_behind_an_early_answer_is_discarded(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(post(b"Content-Length: 5\r\n", b"he", b"/early"))
        assert client.answer().status == 401
        assert client.send(b"llo" + GET).answer().body == b"home"


def test_large_body_behind_an_early_answer_does_not_destroy_it(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(post(b"Content-Length: 9000000\r\n", b"x" * 600_000, b"/early"))
        assert client.answer().status == 401
        for _ in range(5):  # a reset would fail these, and on some systems take the answer away
            client.connection.sendall(b"x" * 1000)
            time.sleep(0.01)
        assert client.rest() == b""


def test_client_that_waits_for_100_gets_it(server: RunningServer) -> None:
    with connected(server.port) as client:
        client.send(post(b"Content-Length: 5\r\nExpect: 100-continue\r\n"))
        assert client.answer().status == 100
        assert client.send(b"hello").answer().body == b"5"
        refused = post(b"Content-Length: 5\r\nExpect: 100-continue\r\n", b"", b"/early")
        assert client.send(refused).answer().status == 401
        assert client.rest() == b""


@pytest.mark.parametrize("num_chunks", [10_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_one_byte_chunks_are_read(server: RunningServer, num_chunks: int) -> None:
    chunks = b"1\r\nx\r\n" * num_chunks + b"0\r\n\r\n"
    with connected(server.port) as client:
        client.connection.settimeout(60)
        answer = client.send(post(b"Transfer-Encoding: chunked\r\n", chunks)).answer()
        assert (answer.status, int(answer.body)) == (200, num_chunks)


# Deadlines.


def test_silent_connection_is_closed(strict_server: RunningServer) -> None:
    begun = time.monotonic()
    with connected(strict_server.port) as client:
        assert 0.1 < client.closed_after_s(begun) < 2


def test_header_deadline_is_absolute(strict_server: RunningServer) -> None:
    begun = time.monotonic()
    with connected(strict_server.port) as client:
        client.connection.settimeout(0.05)
        for byte in GET * 10:
            client.send(bytes([byte]))
            if is_readable(client.connection):
                break
        client.connection.settimeout(5)
        assert (client.answer().status, time.monotonic() - begun < 2) == (408, True)
        assert client.rest() == b""


def is_readable(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except TimeoutError:
        return False


def test_idle_body_is_408(strict_server: RunningServer) -> None:
    with connected(strict_server.port) as client:
        client.send(post(b"Content-Length: 5\r\n", b"he"))
        answer = client.answer()
        assert (answer.status, answer.error["code"]) == (408, "body_too_slow")
        assert client.rest() == b""


def test_trickling_body_is_408_after_its_grace(strict_server: RunningServer) -> None:
    begun = time.monotonic()
    with connected(strict_server.port) as client:
        client.connection.settimeout(0.05)
        client.send(post(b"Content-Length: 5000\r\n"))
        while not is_readable(client.connection):
            client.send(b"x")
        assert client.answer().status == 408
        assert 0.3 < time.monotonic() - begun < 3  # a grace of 0.4 s on a coarse clock


def test_sender_does_not_pay_for_an_application_that_reads_late(
    strict_server: RunningServer,
) -> None:
    head = post(b"Content-Length: 400000\r\n", b"", b"/sleepy")
    assert strict_server.ask(head + b"x" * 400_000).body == b"400000"
    with connected(strict_server.port) as client:
        client.send(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert client.answer().status == 100
        assert client.send(b"x" * 400_000).answer().body == b"400000"


def test_sender_does_not_pay_for_an_application_that_reads_slowly(
    strict_server: RunningServer,
) -> None:
    head = post(b"Content-Length: 1500000\r\n", b"", b"/sip")
    assert strict_server.ask(head + b"x" * 1_500_000).body == b"1500000"


def test_idle_keep_alive_connection_is_closed(strict_server: RunningServer) -> None:
    with connected(strict_server.port) as client:
        assert client.send(GET).answer().status == 200
        assert 0.1 < client.closed_after_s(time.monotonic()) < 2


def test_slow_answer_has_no_deadline_here(strict_server: RunningServer) -> None:
    late = post(b"Content-Length: 0\r\n", b"", b"/sleepy")
    assert strict_server.ask(late).status == 200


def test_client_that_does_not_read_its_answer_is_cut_off(strict_server: RunningServer) -> None:
    connections = strict_server.server.server_state.connections
    with connected(strict_server.port) as client:
        client.send(GET.replace(b"GET /", b"GET /huge"))
        wait_until(lambda: len(connections) == 1)
        wait_until(lambda: not connections)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# The grammar by itself, against what the parsers say.

GRAMMAR = HeadGrammar(32 * 1024, 100)
FRAGMENTS = st.sampled_from(
    [b"GET ", b"POST ", b"/", b"*", b"/a?b", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: a\r\n"]
    + [b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"X: y\r\n", b"\r\n", b"\r"]
    + [b"\n", b" ", b"\t", b":", b"#", b"%", b"\x00", b"\x80", b"\x7f", b",", b"Connection: close"]
)


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """A good head in which a few fragments or bytes are put in, left out or changed."""
    head = b"POST /a?b=%20 HTTP/1.1\r\nHost: a:80\r\nContent-Length: 3\r\nX-Y: z, \xe9\r\n"
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(head)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 19]))
        put = draw(FRAGMENTS | st.binary(min_size=0, max_size=2))
        head = head[:start] + put + head[end:]
    return head + b"\r\n"


class Seen:
    """What llhttp tells of one head."""

    def __init__(self) -> None:
        self.url = b""
        self.fields: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value.strip(b" \t")))


@settings(max_examples=250, deadline=None)
@given(heads())
def test_what_passes_the_grammar_both_parsers_read_alike(head: bytes) -> None:
    head = head[: head.index(b"\r\n\r\n") + 4] if b"\r\n\r\n" in head else head
    try:
        length = GRAMMAR.body_bytes(head, len(head))
    except (HttpRefusal, UpgradeAsked):
        return
    seen = Seen()
    llhttp = httptools.HttpRequestParser(seen)
    llhttp.feed_data(head)
    other = h11.Connection(h11.SERVER)
    other.receive_data(head)
    event = other.next_event()
    assert isinstance(event, h11.Request)
    assert (llhttp.get_method(), seen.url) == (event.method, event.target)
    assert seen.fields == list(event.headers)
    path, _, query = event.target.partition(b"?")
    parsed = httptools.parse_url(seen.url)
    assert (parsed.path, parsed.query or b"") == (path, query)
    fields = dict(event.headers)
    if length != CHUNKED:
        assert length == int(fields.get(b"content-length", 0))
    assert (length == CHUNKED) == (b"transfer-encoding" in fields)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_chunked_body_ends_where_it_ends(chunks: list[bytes], data: st.DataObject) -> None:
    """However it is cut, the same bytes pass and the same rest remains."""
    framed = b"".join(b"%x;e=1\r\n%s\r\n" % (len(c), c) for c in chunks)
    framed += b"0\r\nX: y\r\n\r\n"
    plain = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
    sent = framed + b"GET "
    body, passed, rest, position = ChunkedBody(1000, 10), b"", None, 0
    while rest is None:
        step = data.draw(st.integers(1, 30))
        more, rest = body.follow(sent[position : position + step])
        passed, position = passed + more, position + step
    assert passed == plain
    assert b"GET ".startswith(rest)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_noise_as_chunks_is_refused_or_waits(noise: bytes) -> None:
    with contextlib.suppress(HttpRefusal):
        passed, rest = ChunkedBody(1000, 10).follow(noise)
        assert len(passed) + len(rest or b"") <= len(noise)


def test_unknown_parser_falls_back_to_h11() -> None:
    assert connection_class("h11").__name__ == "H11Connection"
    assert connection_class(None).__name__ == "HttpToolsConnection"
