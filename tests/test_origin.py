"""Who may ask, over a real server: hosts, origins, sizes, and what every answer carries."""

from collections.abc import Iterator

import pytest
from raw_http import Answer, RunningServer, connected, running
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from app.http.origin import HostList, OriginGuard, OriginPolicy
from app.http.refusal import HttpRefusal

UNSAFE = ["POST", "PUT", "PATCH", "DELETE"]
PAGE_POLICY = "default-src 'self'"


async def echo(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def anything(_request: Request) -> Response:
    return PlainTextResponse("ok")


async def patient(request: Request) -> Response:
    """Swallows every error of the body, as frameworks do."""
    try:
        await request.body()
    except Exception:
        return JSONResponse({"error": "the body could not be parsed"}, 400)
    return PlainTextResponse("ok")


async def own_headers(request: Request) -> Response:
    headers = {"cache-control": "max-age=60", "content-security-policy": PAGE_POLICY}
    return PlainTextResponse(request.state.request_id, headers=headers)


def guarded_app() -> OriginGuard:
    paths = ["/", "/livez", "/readyz", "/v1/x", "/v2/x", "/docs", "/docs/a.js", "/docs/old/x"]
    routes = [Route(path, anything, methods=["GET", *UNSAFE]) for path in paths]
    routes += [Route("/echo", echo, methods=["POST"]), Route("/upload/x", echo, methods=["POST"])]
    routes += [Route("/patient", patient, methods=["POST"]), Route("/own", own_headers)]
    policy = OriginPolicy(
        allowed_hosts=("model.example", "*.models.example"),
        allowed_origins=("https://studio.example",),
        max_body_bytes=1000,
        max_body_bytes_by_prefix={"/upload": 5000},
        headers_by_prefix={
            "/docs": {"Content-Security-Policy": PAGE_POLICY},
            "/docs/old": {"Content-Security-Policy": "old"},
        },
    )
    return OriginGuard(Starlette(routes=routes), policy)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with running(guarded_app(), parser=request.param) as server:
        yield server


def ask(
    server: RunningServer,
    method: str = "GET",
    path: str = "/",
    body: bytes = b"",
    host: str = "localhost",
    **fields: str,
) -> Answer:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return server.ask("\r\n".join([*lines, "", ""]).encode() + body)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "127.9.9.9", "[::1]", "[::1]:8000"]
    + ["model.example", "Model.Example:443", "a.models.example", "a.b.models.example:80"],
)
def test_own_host_is_answered(server: RunningServer, host: str) -> None:
    assert ask(server, host=host).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil-localhost", "127.0.0.1.evil.example"]
    + ["xmodel.example", "models.example", "evilmodels.example", "192.0.2.1", "[2001:db8::1]:80"]
    + ["0x7f.1", "localhost.", "model.example."],
)
def test_foreign_host_is_refused(server: RunningServer, host: str) -> None:
    answer = ask(server, host=host)
    assert (answer.status, answer.error["code"]) == (400, "foreign_host")
    assert ask(server, host=host).status == 400, "and is not remembered as ours"


def test_probes_answer_to_any_host(server: RunningServer) -> None:
    assert ask(server, path="/livez", host="10.0.0.7:8000").status == 200
    assert ask(server, path="/readyz", host="pod-17.cluster").status == 200
    assert ask(server, path="/livez/", host="evil.example").status == 400


def test_own_address_is_answered_without_being_named() -> None:
    hosts = HostList(())
    hosts.check(b"10.1.2.3:8000", {"server": ("10.1.2.3", 8000)})
    with pytest.raises(HttpRefusal):
        hosts.check(b"10.1.2.4", {"server": ("10.1.2.3", 8000)})


def test_star_answers_to_every_host_but_not_to_every_origin() -> None:
    with running(OriginGuard(anything_app(), OriginPolicy(allowed_hosts=("*",)))) as server:
        assert ask(server, host="anywhere.example").status == 200
        foreign = ask(server, "POST", host="anywhere.example", Origin="http://evil.example")
        assert foreign.status == 403


def anything_app() -> Starlette:
    return Starlette(routes=[Route("/", anything, methods=["GET", *UNSAFE])])


@pytest.mark.parametrize("method", UNSAFE)
@pytest.mark.parametrize(
    "fields",
    [
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Origin": "http://localhost:8000"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://localhost:8000.evil.example"},
        {"Origin": "http://studio.example"},
        {"Origin": ""},
    ],
)
def test_page_of_another_origin_changes_nothing(
    server: RunningServer, method: str, fields: dict[str, str]
) -> None:
    answer = ask(server, method, host="localhost:8000", **fields)
    assert (answer.status, answer.error["code"]) == (403, "foreign_origin")


@pytest.mark.parametrize("method", UNSAFE)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"Sec_Fetch_Site": "none"},
        {"Sec_Fetch_Site": "same-origin", "Origin": "http://localhost:8000"},
        {"Origin": "https://LOCALHOST:8000"},
        {"Sec_Fetch_Site": "cross-site", "Origin": "https://studio.example"},
    ],
)
def test_own_page_and_no_page_may_change_things(
    server: RunningServer, method: str, fields: dict[str, str]
) -> None:
    assert ask(server, method, host="localhost:8000", **fields).status == 200


def test_foreign_page_may_follow_a_link(server: RunningServer) -> None:
    assert ask(server, Sec_Fetch_Site="cross-site", Origin="http://evil.example").status == 200


def test_refusals_have_the_form_of_their_interface(server: RunningServer) -> None:
    v1 = ask(server, path="/v1/x", host="evil.example").error
    assert set(v1) == {"type", "message", "param", "code"}
    v2 = ask(server, "POST", "/v2/x", Origin="null").error
    assert isinstance(v2, str)
    assert "PYTORCHLIB_ALLOWED_ORIGINS" in v2


def test_body_at_the_limit_passes_and_one_byte_more_is_413(server: RunningServer) -> None:
    assert ask(server, "POST", "/echo", b"x" * 1000).body == b"1000"
    answer = ask(server, "POST", "/echo", b"x" * 1001)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert "1000" in answer.error["message"]
    assert ask(server, "POST", "/upload/x", b"x" * 5000).body == b"5000"
    assert ask(server, "POST", "/upload/x", b"x" * 5001).status == 413


def test_declared_body_is_refused_before_it_is_sent(server: RunningServer) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n"
    with connected(server.port) as client:
        answer = client.send(head + b"Expect: 100-continue\r\n\r\n").answer()
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert client.rest() == b""


@pytest.mark.parametrize("path", ["/echo", "/patient"])
@pytest.mark.parametrize("num_bytes", [1000, 1001, 300_000])
def test_chunked_body_is_counted(server: RunningServer, path: str, num_bytes: int) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    rest = b"x" * (num_bytes - 300)
    chunks = b"1\r\nx\r\n" * 300 + b"%x\r\n%s\r\n0\r\n\r\n" % (len(rest), rest)
    with connected(server.port) as client:
        answer = client.send(head.encode() + chunks).answer()
        assert answer.status == (200 if num_bytes == 1000 else 413)
        if num_bytes > 1000:
            assert client.rest() == b"", "one answer, whatever the application made of it"


def test_every_answer_carries_the_safe_headers(server: RunningServer) -> None:
    for answer in (ask(server), ask(server, path="/nowhere"), ask(server, host="evil.example")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-request-id"]
        assert "server" not in answer.headers


def test_headers_can_differ_by_path_and_the_longest_prefix_decides(server: RunningServer) -> None:
    assert ask(server, path="/docs").headers["content-security-policy"] == PAGE_POLICY
    assert ask(server, path="/docs/a.js").headers["content-security-policy"] == PAGE_POLICY
    assert ask(server, path="/docs/old/x").headers["content-security-policy"] == "old"


def test_headers_of_the_application_stay(server: RunningServer) -> None:
    headers = ask(server, path="/own").headers
    assert headers["cache-control"] == "max-age=60"
    assert headers["content-security-policy"] == PAGE_POLICY
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("given", ["a", "8c1e_F.0-9", "x" * 64])
def test_harmless_request_id_is_kept(server: RunningServer, given: str) -> None:
    answer = ask(server, path="/own", X_Request_ID=given)
    assert (answer.headers["x-request-id"], answer.body.decode()) == (given, given)


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a;b", "<b>", "${x}", "\xe9"])
def test_other_request_id_is_replaced(server: RunningServer, given: str) -> None:
    first = ask(server, path="/own", X_Request_ID=given)
    assert first.headers["x-request-id"] not in ("", given)
    assert first.headers["x-request-id"] == first.body.decode()
    assert ask(server, path="/own").headers["x-request-id"] != first.headers["x-request-id"]


def test_client_that_leaves_in_its_body_leaves_no_error_behind(
    server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(server.port) as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf")
    assert ask(server).status == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
