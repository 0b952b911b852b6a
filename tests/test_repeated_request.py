"""Requests that repeat a head are answered without ASGI, and nobody can tell from outside."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from raw_http import Answer, RawClient, RunningServer, connected, running

from app.auth.store import KeyStore
from app.http.limits import HttpLimits
from app.main import create_app
from app.settings import Settings
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

OPTIONS = {"inputs": 4, "num_classes": 2, "hidden": [2]}
GOOD = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def publish(store: ModelStore, seed: int, name: str = "tiny") -> None:
    torch.manual_seed(seed)
    network = networks.build("mlp", OPTIONS)
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=OPTIONS),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [4]}]),
        labels=("no", "yes"),
    )
    store.publish(name, lambda folder: checkpoint.save(folder, network, manifest))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    store = ModelStore(tmp_path_factory.mktemp("home") / "models")
    publish(store, 0)
    return store


@pytest.fixture(scope="module")
def app(store: ModelStore) -> FastAPI:
    home = store.folder.parent
    settings = Settings(
        home=home, device="cpu", threads=1, watch_interval_s=0.05, jobs=False, _env_file=None
    )
    return create_app(settings)


@pytest.fixture(scope="module")
def server(app: FastAPI) -> Iterator[RunningServer]:
    limits = HttpLimits(body_grace_s=0.3, body_idle_s=0.3)
    with running(app, parser="httptools", limits=limits) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[RawClient]:
    server.forget_heads()
    with connected(server.port) as client:
        yield client


def infer(document: Any = GOOD, path: str = "/v2/models/tiny/infer", **fields: str) -> bytes:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    named = {"Host": "localhost", **fields, "Content-Length": str(len(body))}
    lines = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in named.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def same(first: Answer, second: Answer) -> bool:
    """Alike but for what is new in every answer."""
    new = ("x-request-id", "date")
    seen = [
        (one.status, one.body, sorted(x for x in one.headers.items() if x[0] not in new))
        for one in (first, second)
    ]
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    return seen[0] == seen[1]


def binary(data: bytes, **parameters: Any) -> tuple[bytes, str]:
    """An infer request with raw tensor bytes, and the length of its JSON."""
    entry = {**GOOD["inputs"][0], "parameters": {"binary_data_size": len(data), **parameters}}
    del entry["data"]
    text = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    return text + data, str(len(text))


def test_the_second_of_two_is_answered_by_itself_and_alike(
    client: RawClient, usual: list[str]
) -> None:
    first = client.send(infer()).answer()
    others = [client.send(infer()).answer() for _ in range(3)]
    assert first.status == 200
    assert len(usual) == 1
    assert all(same(first, other) for other in others)


def test_so_it_is_with_binary_data(client: RawClient, usual: list[str]) -> None:
    body, length = binary(torch.arange(1.0, 5.0).numpy().tobytes())
    request = infer(body, Inference_Header_Content_Length=length)
    first, second = client.send(request).answer(), client.send(request).answer()
    assert first.headers["content-type"] == "application/octet-stream"
    assert same(first, second)
    assert len(usual) == 1


@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_body_that_comes_in_pieces_is_gathered(
    client: RawClient, usual: list[str], size: int
) -> None:
    first = client.send(infer()).answer()
    request = infer()
    head = request.index(b"\r\n\r\n") + 4
    for start in (0, *range(head, len(request), size)):
        client.send(request[start : head if start == 0 else start + size])
        time.sleep(0.002)
    assert same(first, client.answer())
    assert len(usual) == 1


def test_a_body_may_have_another_length(client: RawClient, usual: list[str]) -> None:
    for padding in (0, 1, 9, 900, 0):
        document = json.dumps(GOOD).encode() + b" " * padding
        assert client.send(infer(document)).answer().status == 200
    assert len(usual) == 1


def test_what_follows_a_gathered_body_is_the_next_request(client: RawClient) -> None:
    client.send(infer()).answer()
    request, other = infer(), infer(path="/v2/models/nobody/infer")
    client.send(request[:-3])
    client.send(request[-3:] + other + request)
    assert [client.answer().status for _ in range(3)] == [200, 404, 200]


def test_a_gathered_body_has_a_deadline(client: RawClient, server: RunningServer) -> None:
    client.send(infer()).answer()
    answer = client.send(infer()[:-3]).answer()
    assert (answer.status, server.refused[-1:]) == (408, ["body_too_slow"])
    assert client.rest() == b""


BAD = {
    "no JSON": b"{" + json.dumps(GOOD).encode()[1:-1] + b",",
    "wrong count": json.dumps(GOOD).replace(", 4]}", "   ]}").encode(),
    "another name": json.dumps(GOOD).replace('"input"', '"onput"').encode(),
    "another type": json.dumps(GOOD).replace("FP32", "FP99").encode(),
    "another shape": json.dumps(GOOD).replace("[1, 4]", "[4, 1]").encode(),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_told_as_ever_and_the_next_is_answered(
    client: RawClient, server: RunningServer, usual: list[str], case: str
) -> None:
    good, bad = infer(), infer(BAD[case])
    assert len(good) == len(bad)
    first = client.send(good).answer()
    repeated = client.send(bad).answer()
    assert 400 <= repeated.status < 500
    assert len(usual) == 1
    assert same(repeated, server.ask(bad))
    assert same(first, client.send(good).answer())


def test_heads_that_alternate_never_answer_for_each_other(client: RawClient) -> None:
    one, other = infer(), infer(path="/v2/models/tiny/versions/1/infer")
    nobody = infer(path="/v2/models/nobody/infer")
    for request, status in ((one, 200), (nobody, 404), (one, 200), (other, 200), (nobody, 404)) * 3:
        assert client.send(request).answer().status == status
    client.send(one + nobody + one + one + nobody)
    assert [client.answer().status for _ in range(5)] == [200, 404, 200, 200, 404]


def test_another_connection_is_answered_by_what_the_first_found_out(
    client: RawClient, server: RunningServer, usual: list[str]
) -> None:
    first = client.send(infer()).answer()
    longer = infer({**GOOD, "id": "longer"})
    for request in (infer(), longer):
        for at in (len(request), 1, len(request) - 40):
            with connected(server.port) as other:
                other.send(request[:at])
                if at < len(request):
                    time.sleep(0.02)
                answer = other.send(request[at:]).answer()
                assert answer.status == 200
                assert ("longer" in answer.body.decode()) is (request is longer)
                assert same(other.send(infer()).answer(), first)
    assert len(usual) == 1


def test_another_head_on_another_connection_is_read(
    client: RawClient, server: RunningServer, usual: list[str]
) -> None:
    client.send(infer()).answer()
    heads = [
        infer(X_Else="1"),
        infer().replace(b"Content-Length: ", b"Content-Length:  "),
        infer().replace(b"\r\n\r\n", b" \r\n\r\n", 1),
        infer().replace(b"HTTP/1.1", b"HTTP/1.0"),
    ]
    assert [server.ask(head).status for head in heads] == [200] * 4
    assert len(usual) == 5
    assert server.ask(infer().replace(b"Host", b"Hose")).status == 400


def test_a_long_body_on_another_connection_takes_the_usual_way(
    client: RawClient, server: RunningServer, usual: list[str]
) -> None:
    client.send(infer()).answer()
    long = infer(json.dumps(GOOD).encode() + b" " * 1024 * 1024)
    assert server.ask(long).status == 200
    assert server.ask(infer() + infer()).status == 200  # two at once, as well
    assert len(usual) == 3


def test_a_bad_key_is_held_against_the_address_that_sent_it(tmp_path: Path) -> None:
    """Although what its head asks for was found out for another address."""
    publish(ModelStore(tmp_path / "models"), 0)
    key, token = KeyStore(tmp_path).create("one", ("predict",))
    application = create_app(
        Settings(home=tmp_path, device="cpu", threads=1, jobs=False, _env_file=None)
    )
    request = infer(Authorization=f"Bearer {token}")
    with running(application, parser="httptools") as server:
        assert server.ask(request).status == 200
        KeyStore(tmp_path).revoke(key.id)
        application.state.gate._keys.look()
        for _ in range(10):
            with connected(server.port, source="127.0.0.2") as other:
                assert other.send(request).answer().status == 401
        with connected(server.port, source="127.0.0.2") as other:
            assert other.send(request).answer().status == 429
        assert server.ask(request).status == 401


def test_an_offer_that_comes_too_late_is_not_taken(client: RawClient) -> None:
    one, nobody = infer(), infer(path="/v2/models/nobody/infer")
    client.send(one + nobody)
    assert [client.answer().status for _ in range(2)] == [200, 404]
    assert client.send(nobody).answer().status == 404


def test_a_new_version_answers_as_soon_as_the_alias_has_moved(
    client: RawClient, store: ModelStore
) -> None:
    publish(store, 0, "other")
    request = infer(path="/v2/models/other/infer")
    old = client.send(request).answer()
    publish(store, 1, "other")
    store.move_alias("other", "production", 2)
    deadline = time.monotonic() + 5
    while (answer := client.send(request).answer()).headers["x-model-version"] == "1":
        assert answer.body == old.body
        assert time.monotonic() < deadline
    assert answer.headers["x-model-version"] == "2"
    assert json.loads(answer.body)["model_version"] == "2"
    assert answer.body != old.body


def test_a_key_that_ends_opens_nothing_any_more(tmp_path: Path) -> None:
    publish(ModelStore(tmp_path / "models"), 0)
    keys = KeyStore(tmp_path)
    key, token = keys.create("one", ("predict",))
    application = create_app(
        Settings(home=tmp_path, device="cpu", threads=1, jobs=False, _env_file=None)
    )
    request = infer(Authorization=f"Bearer {token}")
    with running(application, parser="httptools") as server, connected(server.port) as client:
        assert [client.send(request).answer().status for _ in range(2)] == [200, 200]
        keys.revoke(key.id)
        application.state.gate._keys.look()
        assert client.send(request).answer().status == 401


def counted(client: RawClient, status: int) -> float:
    """Requests that were answered so, by `/metrics`."""
    metrics = client.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").answer().body
    labels = f'model="tiny",route="/v2/models/{{model}}/infer",status="{status}",version="1"'
    found = re.search(
        rf"pytorchlib_request_seconds_count{{{re.escape(labels)}}} (.+)", metrics.decode()
    )
    return float(found[1]) if found else 0.0


def test_requests_are_counted_whichever_way_they_take(client: RawClient) -> None:
    before = [counted(client, status) for status in (200, 400)]
    for _ in range(3):
        client.send(infer()).answer()
    client.send(infer(BAD["another name"])).answer()
    after = [counted(client, status) for status in (200, 400)]
    assert [after[0] - before[0], after[1] - before[1]] == [3, 1]


def tiny(app: FastAPI) -> Any:
    """Its live predictor."""
    return app.state.engine.live.get_nowait("tiny")


def test_a_caller_who_hangs_up_is_waited_for_no_more(
    app: FastAPI, server: RunningServer, client: RawClient
) -> None:
    client.send(infer()).answer()
    predictor = tiny(app)
    num_abandoned = predictor.lane.statistics.num_abandoned
    turns = predictor.lane._turns
    ripe_at, turns.ripe_at = turns.ripe_at, lambda now: now + 60  # nobody's turn comes
    client.send(infer())
    deadline = time.monotonic() + 5
    while predictor.lane.is_idle and time.monotonic() < deadline:
        time.sleep(0.005)
    client.connection.close()
    while not predictor.lane.is_idle and time.monotonic() < deadline:
        time.sleep(0.005)
    turns.ripe_at = ripe_at
    assert predictor.lane.is_idle
    assert predictor.lane.statistics.num_abandoned == num_abandoned + 1
    assert server.ask(infer()).status == 200


def test_a_model_that_fails_is_an_error_and_its_tensors_are_let_go(
    app: FastAPI, client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.send(infer()).answer()
    predictor = tiny(app)
    network = predictor.loaded.execution.form.network
    handle = network.register_forward_pre_hook(lambda *_: 1 / 0)
    answer = client.send(infer()).answer()
    handle.remove()
    assert answer.status == 500
    assert b"failed on this batch" in answer.body
    assert "ZeroDivisionError" in caplog.text
    assert client.send(infer()).answer().status == 200


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"Accept-Encoding": "gzip"}, ("content-encoding", "gzip")),
        ({"X-Request-Id": "mine"}, ("x-request-id", "mine")),
        ({"X-Model-Version": "1"}, ("x-model-version", "1")),
    ],
)
def test_what_the_head_asks_for_is_done_each_time(
    client: RawClient, fields: dict[str, str], told: tuple[str, str]
) -> None:
    request = infer(**fields)
    answers = [client.send(request).answer() for _ in range(3)]
    assert len({answer.body for answer in answers}) == 1
    assert {answer.headers[told[0]] for answer in answers} == {told[1]}


def test_what_was_received_is_answered_when_the_server_stops(tmp_path: Path) -> None:
    publish(ModelStore(tmp_path / "models"), 0)
    application = create_app(
        Settings(home=tmp_path, device="cpu", threads=1, jobs=False, _env_file=None)
    )
    with running(application, parser="httptools") as server, connected(server.port) as client:
        client.send(infer()).answer()
        client.send(infer())
        server.server.should_exit = True
        assert client.answer().status == 200
