"""Requests whose heads repeat, and answers in one write: on the wire as if neither were so."""

import itertools
from collections.abc import Iterator

import pytest
from raw_http import RunningServer, connected, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


async def seen(request: Request) -> Response:
    """Everything that the application sees, and a change that no other request may see."""
    body = await request.body()
    scope = request.scope
    fields = sorted(name.decode() for name, _ in scope["headers"])
    again = "mark" in scope["state"] or b"x-mark" in dict(scope["headers"])
    scope["state"]["mark"] = True
    scope["headers"].append((b"x-mark", b"1"))
    return JSONResponse(
        [scope["method"], scope["path"], scope["query_string"].decode(), fields, len(body), again]
    )


async def length(request: Request) -> Response:
    return JSONResponse([request.headers["content-length"], len(await request.body())])


async def pieces(_: Request) -> Response:
    return StreamingResponse(iter([b"one ", b"two"]), headers={"content-length": "7"})


async def split_head(_: Request) -> Response:
    return PlainTextResponse("x", headers={"x-bad": "a\nb"})


@pytest.fixture
def server() -> Iterator[RunningServer]:
    routes = [
        Route("/length", length, methods=["POST"]),
        Route("/pieces", pieces),
        Route("/split", split_head),
        Route("/{path:path}", seen, methods=["GET", "POST"]),
    ]
    with running(Starlette(routes=routes), parser="httptools") as server:
        yield server


def post(path: str, body: bytes, field: str = "a") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-{field}: 1\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_alternating_heads_never_answer_for_each_other(server: RunningServer) -> None:
    first, second = post("/one?q=1", b"11"), post("/t%20wo", b"22", "b")
    expected = {
        first: ["POST", "/one", "q=1", ["content-length", "host", "x-a"], 2, False],
        second: ["POST", "/t wo", "", ["content-length", "host", "x-b"], 2, False],
    }
    with connected(server.port) as client:
        for order in itertools.product((first, second), repeat=4):
            for request in order:
                assert client.send(request).answer().body == json_bytes(expected[request])


def test_a_head_that_repeats_says_the_length_of_its_own_body(server: RunningServer) -> None:
    with connected(server.port) as client:
        for length in (3, 12345, 0, 1):
            answer = client.send(post("/length", b"x" * length)).answer()
            assert answer.body == json_bytes([str(length), length])


@pytest.mark.parametrize("cut", [20, 80])
def test_a_head_that_came_in_pieces_between_does_not_take_its_place(
    server: RunningServer, cut: int
) -> None:
    first, second = post("/one", b"11"), post("/two", b"2" * 40)
    with connected(server.port) as client:
        for request in (first, first):
            assert b'"/one"' in client.send(request).answer().body
        client.send(second[:cut])
        assert b'"/two"' in client.send(second[cut:]).answer().body
        assert b'"/one"' in client.send(first).answer().body


def test_a_long_body_in_one_piece_arrives_whole_each_time(server: RunningServer) -> None:
    request = post("/one", bytes(30_000))
    with connected(server.port) as client:
        for _ in range(5):
            assert b"30000,false" in client.send(request).answer().body


def test_an_answer_in_pieces_is_the_same_on_the_wire(server: RunningServer) -> None:
    with connected(server.port) as client:
        for _ in range(3):
            answer = client.send(b"GET /pieces HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()
            assert (answer.status, answer.body) == (200, b"one two")


def test_a_header_never_becomes_two(server: RunningServer) -> None:
    with connected(server.port) as client:
        answer = client.send(b"GET /split HTTP/1.1\r\nHost: localhost\r\n\r\n").answer()
        assert answer.status == 500
        assert "x-bad" not in answer.headers


def test_a_client_that_asks_to_close_is_closed(server: RunningServer) -> None:
    request = b"GET /one HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connected(server.port) as client:
        assert client.send(request).answer().headers["connection"] == "close"
        assert client.rest() == b""


def json_bytes(value: list[object]) -> bytes:
    return JSONResponse(value).body
