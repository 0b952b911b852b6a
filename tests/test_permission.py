"""Who may do what: every route has its scope, and no request passes without a key that has it."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from fastapi import APIRouter, FastAPI, Request, UploadFile
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.testclient import TestClient

from app.api.error_answers import install_error_answers
from app.api.permission import (
    PUBLIC,
    Gate,
    Guarded,
    Unguarded,
    every_route,
    key_name,
    requires,
    requires_or_signed,
    scopes_of,
    signed_link,
)
from app.auth.scope import ALL_SCOPES, Scope
from app.auth.signed_link import LinkSigner
from app.auth.store import KeyStore
from app.auth.watch import KeySources, KeyWatch
from app.main import create_app
from app.settings import Settings
from models.store import ModelStore

BAD = {"Authorization": "Bearer ptl_00000000_" + "x" * 43}
PAIRS: list[tuple[Scope, ...]] = [("predict",), ("admin",), ("predict", "admin")]
Open = Callable[..., TestClient]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def application(store: ModelStore) -> FastAPI:
    """The whole application over a store with `digits`, with a key that is of no use."""
    KeyStore(store.folder.parent).create("nothing", ("admin",))
    settings = Settings(home=store.folder.parent, device="cpu", threads=1, watch_interval_s=0.05)
    return create_app(settings)


@pytest.fixture
def keys(store: ModelStore) -> KeyStore:
    return KeyStore(store.folder.parent)


Make = Callable[..., str]


@pytest.fixture
def make(application: FastAPI, keys: KeyStore) -> Make:
    """Makes a key that the application knows at once, and returns its text."""

    def make(name: str, *scopes: Scope) -> str:
        _, token = keys.create(name, scopes)
        application.state.gate._keys.look()
        return token

    return make


@pytest.fixture
def at(application: FastAPI) -> Iterator[Open]:
    """Clients with addresses of their own, of one running application."""
    base = {"base_url": "http://127.0.0.1:8000", "raise_server_exceptions": False}
    with TestClient(application, **base):  # type: ignore[arg-type]
        yield lambda address="192.0.2.1": TestClient(
            application,
            client=(address, 1),
            **base,  # type: ignore[arg-type]
        )


def asked(application: FastAPI) -> Iterator[tuple[str, str, Scope]]:
    """(method, path with its parameters filled in, scope) of every route that asks for a key."""
    for path, route in every_route(application.routes):
        for scope in scopes_of(route):
            for method in sorted(route.methods):  # type: ignore[attr-defined]
                yield method, re.sub(r"\{[^}]+\}", "digits", path), scope


# What each route says.


def test_every_route_says_its_scope_or_is_public(application: FastAPI) -> None:
    routes = every_route(application.routes)
    public = {path for path, route in routes if not scopes_of(route)}
    assert public == PUBLIC
    assert len(list(asked(application))) > 20


def test_every_route_with_a_scope_is_behind_the_gate(application: FastAPI) -> None:
    for _, route in every_route(application.routes):
        if scopes_of(route):
            doors = [route.handle, getattr(route, "app", None)]
            assert any(isinstance(door, Guarded) for door in doors), route


@pytest.mark.parametrize(
    "route",
    [
        Route("/plain", lambda _: None),
        Mount("/mounted", app=StaticFiles(directory=".")),
        Mount("/livez/inner", routes=[Route("/x", lambda _: None)]),
    ],
)
def test_a_route_that_says_nothing_stops_the_start(application: FastAPI, route: Any) -> None:
    with pytest.raises(Unguarded, match=r"says no scope: give it dependencies"):
        application.state.gate.guard([route])


def test_a_router_that_says_nothing_stops_the_start(application: FastAPI) -> None:
    inner, outer, app = APIRouter(), APIRouter(prefix="/outer"), FastAPI(openapi_url=None)
    inner.get("/livez")(lambda: None)  # the name of a public one, elsewhere
    outer.include_router(inner, prefix="/inner")
    app.include_router(outer, prefix="/v9")
    with pytest.raises(Unguarded, match="/v9/outer/inner/livez says no scope"):
        application.state.gate.guard(app.routes)


def test_a_route_asks_for_what_its_router_asks_for_as_well(tmp_path: Path) -> None:
    tokens = [KeyStore(tmp_path).create(f"k{i}", scopes)[1] for i, scopes in enumerate(PAIRS)]
    router, app = APIRouter(dependencies=[requires("predict")]), FastAPI(openapi_url=None)
    router.get("/x", dependencies=[requires("admin")])(lambda: None)
    app.include_router(router)
    gate = Gate(
        KeyWatch(KeySources(tmp_path), 60), LinkSigner(tmp_path, 60), open_without_keys=True
    )
    gate.guard(app.routes)
    install_error_answers(app)
    with TestClient(app) as client:
        statuses = [client.get("/x", headers=bearer(token)).status_code for token in tokens]
    assert statuses == [403, 403, 200]


def test_scopes_of_the_routes_that_change_things(application: FastAPI) -> None:
    said = {f"{method} {path}": scope for method, path, scope in asked(application)}
    assert said["POST /v1/models/digits/predict"] == "predict"
    assert said["POST /v2/models/digits/infer"] == "predict"
    assert said["POST /v2/repository/models/digits/load"] == "models:write"
    assert said["POST /v2/repository/models/digits/unload"] == "models:write"
    assert said["GET /metrics"] == "metrics"


# What a request meets.


def test_no_route_answers_without_a_key(application: FastAPI, at: Open) -> None:
    client = at()
    for method, path, _ in asked(application):
        answer = client.request(method, path)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_route_answers_a_wrong_key(application: FastAPI, at: Open) -> None:
    for number, (method, path, _) in enumerate(asked(application)):
        answer = at(f"198.51.100.{number}").request(method, path, headers=BAD)
        assert answer.status_code == 401, (method, path)


def test_no_route_answers_a_key_that_lacks_the_scope(
    application: FastAPI, at: Open, make: Make
) -> None:
    tokens = {
        scope: make(f"not-{i}", *(one for one in ALL_SCOPES if one != scope))
        for i, scope in enumerate(ALL_SCOPES)
    }
    for method, path, scope in asked(application):
        answer = at().request(method, path, headers=bearer(tokens[scope]))
        assert answer.status_code == 403, (method, path)
        if method != "HEAD":
            error = answer.json()["error"]
            message = error if path.startswith("/v2") else error["message"]
            assert f"lacks the scope '{scope}'" in message


def test_every_route_lets_a_key_with_its_scope_alone_pass(
    application: FastAPI, at: Open, make: Make
) -> None:
    tokens = {scope: make(f"only-{i}", scope) for i, scope in enumerate(ALL_SCOPES)}
    for method, path, scope in asked(application):
        answer = at().request(method, path, headers=bearer(tokens[scope]))
        assert answer.status_code not in (401, 403, 429), (method, path, answer.text)


def test_every_bad_key_gets_the_same_answer(
    application: FastAPI, at: Open, keys: KeyStore, make: Make
) -> None:
    revoked = make("revoked", "predict")
    assert at().get("/v1/models", headers=bearer(revoked)).status_code == 200
    keys.revoke("revoked")
    application.state.gate._keys.look()
    answers = {
        at().get("/v1/models", headers=headers).content
        for headers in (
            {},
            BAD,
            bearer(revoked),
            bearer(revoked[:-1]),
            bearer("x" * 5000),
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer "},
            {"Authorization": "Basic dTpw"},
            {"Authorization": f"Token {revoked}"},
        )
    }
    assert len(answers) == 1
    error = orjson.loads(answers.pop())["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "key_refused")


def test_v2_refuses_in_its_own_shape(at: Open) -> None:
    answer = at().post("/v2/models/digits/infer", json={})
    assert answer.status_code == 401
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith("this needs a key")


def test_the_key_is_asked_for_before_the_body_is_read(at: Open, report: TestClient) -> None:
    read = []

    def body() -> Iterator[bytes]:
        read.append(True)
        yield b"--x\r\n"

    form = {"Content-Type": "multipart/form-data; boundary=x"}
    for client, path in (
        (at(), "/v1/models/digits/predict"),
        (at(), "/v2/repository/index"),
        (report, "/uploads"),
    ):
        assert client.post(path, content=body(), headers=form).status_code == 401
    assert not read


def test_public_routes_need_no_key(at: Open) -> None:
    wait_for(lambda: at().get("/readyz").status_code == 200)
    for path in PUBLIC - {"/docs/assets"} | {"/docs/assets/docs.js"}:
        assert at().get(path).status_code == 200, path
    for path in ("/livez", "/readyz"):
        assert at().get(path, headers={"Host": "probe.cluster.example"}).status_code == 200


def test_a_key_in_the_address_opens_nothing(at: Open, make: Make) -> None:
    token = make("ci", "predict")
    for name in ("key", "api_key", "token", "access_token"):
        assert at().get("/v1/models", params={name: token}).status_code == 401


def test_the_scheme_is_read_in_any_case(at: Open, make: Make) -> None:
    token = make("ci", "predict")
    headers = {"authorization": f"bEARER   {token}"}
    assert at().get("/v1/models", headers=headers).status_code == 200


def test_a_revoked_key_is_refused_within_the_interval(at: Open, keys: KeyStore, make: Make) -> None:
    token = make("ci", "predict")
    assert at().get("/v1/models", headers=bearer(token)).status_code == 200
    revoked = time.monotonic()
    keys.revoke("ci")
    wait_for(lambda: at().get("/v1/models", headers=bearer(token)).status_code == 401)
    assert time.monotonic() - revoked < 1.0  # the interval is 0.05 s; the rest is the machine's


def test_ten_bad_keys_a_minute_and_then_wait(at: Open, make: Make) -> None:
    token = make("ci", "predict")
    statuses = [at().get("/v1/models", headers=BAD).status_code for _ in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    refused = at().get("/v2", headers=bearer("a-guess-of-a-short-one"))
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert at("192.0.2.2").get("/v1/models", headers=BAD).status_code == 401
    # Nobody is shut out by a neighbour behind the same proxy.
    assert at().get("/v1/models", headers=bearer(token)).status_code == 200
    assert at().get("/v1/models", headers=bearer(make("new", "predict"))).status_code == 200
    assert at().get("/v1/models").status_code == 401


def test_a_key_from_outside_waits_too_unless_it_was_good_before(tmp_path: Path) -> None:
    secret = "one-key-from-the-environment"
    settings = Settings(home=tmp_path / "empty", device="cpu", threads=1, api_key=secret)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        for _ in range(11):
            client.get("/v1/models", headers=BAD)
        assert client.get("/v1/models", headers=bearer(secret)).status_code == 429
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models", headers=bearer(secret)).status_code == 200
        for _ in range(11):
            client.get("/v1/models", headers=BAD)
        assert client.get("/v1/models", headers=bearer(secret)).status_code == 200


def test_a_key_is_never_logged_nor_answered(
    at: Open, caplog: pytest.LogCaptureFixture, make: Make
) -> None:
    caplog.set_level(logging.DEBUG)
    token = make("ci", "metrics")
    said = [
        at().get("/v1/models", headers=bearer(token)),
        at().get("/v1/nothing", headers=bearer(token)),
        at().post("/v1/models/digits/predict", headers=bearer(token + "x")),
        at().get("/metrics", headers=bearer(token)),
    ]
    assert [answer.status_code for answer in said] == [403, 404, 401, 200]
    at().get(f"/v1/models/{token}")  # what it asked for is told to itself alone
    own = [one for one in caplog.records if one.name.startswith("app.")]  # not the client's
    log = "".join(f"{one.getMessage()} {vars(one)}" for one in own)
    assert "/v1/models/ptl_… 401" in log
    assert "'key': 'ci'" in log
    for text in (log, *(answer.text + str(answer.headers) for answer in said)):
        assert token.split("_", 2)[2] not in text


# Where there are no keys.


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.5"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "0.0.0.0"}, 401),
        ({"host": "192.0.2.1"}, 401),
        ({"host": "0.0.0.0", "no_auth": True}, 200),
        ({"no_auth": True, "api_key": "one-key-from-the-environment"}, 401),
        ({"api_key": "one-key-from-the-environment"}, 401),
        ({"api_key": " "}, 200),
        ({"api_keys_file": "absent"}, 401),
    ],
)
def test_who_is_open_without_a_key(tmp_path: Path, given: dict[str, Any], status: int) -> None:
    settings = Settings(home=tmp_path, device="cpu", threads=1, **given)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.get("/v1/models").status_code == status


def test_a_first_key_closes_what_was_open_and_no_revocation_opens_it(
    client: TestClient, keys: KeyStore
) -> None:
    assert client.get("/v1/models").status_code == 200
    key, _ = keys.create("first", ("predict",))
    wait_for(lambda: client.get("/v1/models").status_code == 401)
    keys.revoke(key.id)
    keys.path.unlink()
    time.sleep(0.3)
    assert client.get("/v1/models").status_code == 401


def test_readyz_is_200_on_an_empty_store(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "new", device="cpu", threads=1)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        assert client.get("/readyz").json() == {"ready": True}


def test_readyz_waits_for_what_is_preloaded(store: ModelStore) -> None:
    settings = Settings(home=store.folder.parent, device="cpu", threads=1, preload=("digits",))
    application = create_app(settings)
    with TestClient(application, base_url="http://127.0.0.1") as client:
        wait_for(lambda: client.get("/readyz").status_code == 200)
        assert [one.name for one in application.state.engine.live.loaded()] == ["digits"]
    missing = settings.model_copy(update={"preload": ("nothing",)})
    with TestClient(create_app(missing), base_url="http://127.0.0.1") as client:
        time.sleep(0.3)
        assert client.get("/readyz").json()["reason"] == "loading nothing"


def test_readyz_says_when_nobody_watches_the_keys(client: TestClient) -> None:
    wait_for(lambda: client.get("/readyz").status_code == 200)
    gate: Gate = client.app.state.gate  # type: ignore[attr-defined]
    assert gate._keys._watcher is not None
    gate._keys._watcher.cancel()
    wait_for(lambda: client.get("/readyz").status_code == 503)
    assert "revoked would still open" in client.get("/readyz").json()["reason"]


# Signed links.


@pytest.fixture
def report(tmp_path: Path) -> Iterator[TestClient]:
    """A small application with a page that a browser opens."""
    KeyStore(tmp_path).create("ci", ("evaluate",))
    keys = KeyWatch(KeySources(tmp_path), 60)
    gate = Gate(keys, LinkSigner(tmp_path, 60), open_without_keys=True)
    app = FastAPI(openapi_url=None)
    app.state.gate = gate
    page = [requires_or_signed("evaluate")]

    @app.get("/e/{name}/report", dependencies=page)
    @app.post("/e/{name}/report", dependencies=page)
    async def read(request: Request, name: str) -> list[str]:
        return [name, key_name(request.scope), signed_link(request, f"/e/{name}/report")]

    @app.get("/e/{name}", dependencies=[requires("evaluate")])
    async def describe(name: str) -> str:
        return name

    @app.post("/uploads", dependencies=[requires("evaluate")])
    async def upload(file: UploadFile) -> int | None:
        return file.size

    install_error_answers(app)
    gate.guard(app.routes)
    with TestClient(app) as client:
        yield client


def test_a_signed_link_opens_a_report_in_place_of_a_key(report: TestClient, tmp_path: Path) -> None:
    assert report.get("/e/e1/report").status_code == 401
    link = LinkSigner(tmp_path, 60).sign("/e/e1/report")
    assert report.get(link).json()[:2] == ["e1", "signed-link"]
    query = link.partition("?")[2]
    assert report.get(f"/e/e2/report?{query}").status_code == 401
    assert report.get(f"/e/e1?{query}").status_code == 401
    assert report.post(link).status_code == 401
    assert report.get(LinkSigner(tmp_path, -1).sign("/e/e1/report")).status_code == 401


def test_a_key_opens_the_report_too_and_gets_links(report: TestClient, tmp_path: Path) -> None:
    _, token = KeyStore(tmp_path).create("reader", ("evaluate",))
    report.app.state.gate._keys.look()  # type: ignore[attr-defined]
    name, by, link = report.get("/e/e1/report", headers=bearer(token)).json()
    assert (name, by) == ("e1", "reader")
    assert report.get(link).status_code == 200


def test_without_keys_a_link_is_the_path_itself(tmp_path: Path) -> None:
    gate = Gate(
        KeyWatch(KeySources(tmp_path), 60), LinkSigner(tmp_path, 60), open_without_keys=True
    )
    assert gate.signed_link("/a") == "/a"
    assert not (tmp_path / "links.secret").exists()


# What /docs says.


def test_the_description_names_the_scope_of_every_operation(application: FastAPI, at: Open) -> None:
    document = at().get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    said = {
        (method, path): operation.get("security")
        for path, item in document["paths"].items()
        for method, operation in item.items()
    }
    for path, route in every_route(application.routes):
        for method in getattr(route, "methods", None) or ():
            if (method.lower(), path) in said:
                scopes = list(scopes_of(route))
                assert said[method.lower(), path] == ([{"key": scopes}] if scopes else None), path
    load = document["paths"]["/v2/repository/models/{model}/load"]["post"]["responses"]
    assert "models:write" in load["403"]["description"]
    assert load["401"]["content"]["application/json"]["schema"]["$ref"].endswith("/V2Error")


def wait_for(condition: Callable[[], bool], patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
