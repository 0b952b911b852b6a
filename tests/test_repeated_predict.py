"""`/v1` predictions whose head came before: answered without ASGI, alike but for their times."""

import contextlib
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from PIL import Image
from raw_http import Answer, RawClient, RunningServer, connected, running

from app.main import create_app
from app.settings import Settings
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

SIDES = {"small": 8, "large": 96}


def publish(store: ModelStore, name: str, side: int) -> None:
    torch.manual_seed(0)
    options = {"channels": 1, "size": side, "num_classes": 10, "width": side // 3}
    network = networks.build("cnn", options).eval()
    steps = ["decode", {"step": "color", "mode": "L"}, {"step": "crop", "size": [side, side]}]
    manifest = Manifest(
        network=NetworkSpec(name="cnn", options=options),
        preprocessing=Preprocessing(
            steps=[{"step": one} if isinstance(one, str) else one for one in (*steps, "scale")]
        ),
        labels=tuple(map(str, range(10))),
    )
    store.publish(name, lambda folder: checkpoint.save(folder, network, manifest))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Networks for grey pictures; pictures of the large one wait for their turn."""
    store = ModelStore(tmp_path_factory.mktemp("home") / "models")
    for name, side in SIDES.items():
        publish(store, name, side)
    return store


@pytest.fixture(scope="module")
def app(store: ModelStore) -> FastAPI:
    settings = Settings(
        home=store.folder.parent, device="cpu", threads=1, jobs=False, max_inputs=4, _env_file=None
    )
    return create_app(settings)


@pytest.fixture(scope="module")
def server(app: FastAPI) -> Iterator[RunningServer]:
    with running(app, parser="httptools") as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[RawClient]:
    server.forget_heads()
    with connected(server.port) as client:
        yield client


def png(seed: int, side: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def predict(body: bytes, kind: str, model: str = "small", **fields: str) -> bytes:
    named = {"Host": "localhost", "Content-Type": kind, **fields, "Content-Length": str(len(body))}
    lines = "".join(f"{name}: {text}\r\n" for name, text in named.items())
    return f"POST /v1/models/{model}/predict HTTP/1.1\r\n{lines}\r\n".encode() + body


PART = b'--%b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n%b\r\n'


def form(*pictures: bytes, model: str = "small", boundary: str = "x", said: str = "") -> bytes:
    """A form; its head may say another boundary than its body has."""
    parts = [PART % (boundary.encode(), picture) for picture in pictures]
    body = b"".join(parts) + b"--%b--\r\n" % boundary.encode()
    return predict(body, f"multipart/form-data; boundary={said or boundary}", model)


def numbers(seed: int, model: str = "small") -> bytes:
    side = SIDES[model]
    rows = np.random.default_rng(seed).random((2, 1, side, side)).round(3).tolist()
    return predict(json.dumps({"inputs": rows, "top_k": 2}).encode(), "application/json", model)


REQUESTS = {
    "a picture": lambda model, seed: predict(png(seed, SIDES[model]), "image/png", model),
    "a form": lambda model, seed: form(png(seed, SIDES[model]), model=model),
    "a form of three": lambda model, seed: form(
        *(png(seed + one, SIDES[model]) for one in range(3)), model=model
    ),
    "numbers": lambda model, seed: numbers(seed, model),
}


def live(app: FastAPI, model: str) -> Any:
    """The predictor that answers."""
    return app.state.engine.live.get_nowait(model)


def said(answer: Answer) -> tuple[int, list[str], Any]:
    """What an answer says but for what is new in each."""
    document = json.loads(answer.body)
    times = document.pop("time_ms", {})
    assert all(value >= 0 for value in times.values())
    return answer.status, sorted(answer.headers), document


@pytest.mark.parametrize("model", SIDES)
@pytest.mark.parametrize("kind", REQUESTS)
def test_the_second_of_two_is_answered_by_itself_and_alike(
    app: FastAPI,
    server: RunningServer,
    client: RawClient,
    usual: list[str],
    kind: str,
    model: str,
) -> None:
    make = REQUESTS[kind]
    client.send(make(model, 0)).answer()
    assert model == "small" or not live(app, model).lane.is_inline
    assert len(usual) == 1
    repeated = [client.send(make(model, seed)).answer() for seed in (0, 1, 2, 3)]
    assert len(usual) == 1
    alone = [server.ask(make(model, seed)) for seed in (0, 1, 2, 3)]
    assert [said(one) for one in repeated] == [said(one) for one in alone]
    assert len({repr(said(one)[2]) for one in repeated}) == 4
    assert {one.status for one in repeated} == {200}


FAULTS = {
    "torn": form(png(0, 96)[:600], model="large"),
    "no picture": form(b"no picture", model="large"),
    "no file": predict(b"--x--\r\n", "multipart/form-data; boundary=x", "large"),
    "too many": form(*[png(0, 8)] * 5, model="large"),
    "no form": predict(b"nothing", "multipart/form-data; boundary=x", "large"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_as_ever_and_the_next_is_answered(
    server: RunningServer, client: RawClient, fault: str
) -> None:
    good = form(png(0, 96), model="large")
    first = client.send(good).answer()
    repeated, alone = client.send(FAULTS[fault]).answer(), server.ask(FAULTS[fault])
    assert 400 <= repeated.status < 500
    assert repeated.status == alone.status
    assert repeated.error["message"] == alone.error["message"]
    assert said(client.send(good).answer()) == said(first)


def test_each_form_has_a_boundary_of_its_own(
    server: RunningServer, client: RawClient, usual: list[str]
) -> None:
    names = ["x", "another", "-----x", "7" * 70, "x"]
    requests = [form(png(0, 96), model="large", boundary=name) for name in names]
    answers = [said(client.send(request).answer()) for request in requests]
    assert len(usual) == 1
    assert answers == [said(server.ask(requests[0]))] * len(requests)
    wrong = form(png(0, 96), model="large", boundary="x", said="y")
    assert client.send(wrong).answer().error == server.ask(wrong).error
    for unusual in ("a b", '"quoted"', "8" * 71, "a=b", "x; charset=utf-8"):
        request = form(png(0, 96), model="large", boundary="x", said=unusual)
        assert client.send(request).answer().status == server.ask(request).status
        assert client.send(requests[1]).answer().status == 200


def test_a_form_whose_head_is_known_may_take_the_usual_way(client: RawClient) -> None:
    """It is read by its own boundary there too."""
    file = io.BytesIO()
    Image.new("L", (1600, 1400), 7).save(file, "PNG")
    for data in (png(0, 96), file.getvalue(), png(1, 96), file.getvalue()):
        for boundary in ("one", "two"):
            request = form(data, model="large", boundary=boundary)
            assert client.send(request).answer().status == 200


def test_a_client_that_draws_boundaries_is_answered_so(
    server: RunningServer, usual: list[str]
) -> None:
    address = f"http://127.0.0.1:{server.port}/v1/models/large/predict"
    with httpx.Client() as client:
        for seed in range(4):
            answer = client.post(address, files={"file": ("a.png", png(seed, 96))})
            assert answer.status_code == 200
    assert len(usual) == 1


def test_a_large_picture_takes_the_usual_way_each_time(client: RawClient, usual: list[str]) -> None:
    """Nobody's forward waits while it is decoded."""
    file = io.BytesIO()
    Image.new("L", (1600, 1400), 7).save(file, "PNG")
    request = predict(file.getvalue(), "image/png", "large")
    answers = [client.send(request).answer() for _ in range(2)]
    assert said(answers[0]) == said(answers[1])
    assert len(usual) == 2


def test_time_that_the_head_gives_counts_each_time(
    app: FastAPI, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = predict(png(0, 96), "image/png", "large", **{"X-Request-Timeout-Ms": "7000"})
    client.send(request).answer()
    lane, left_s = live(app, "large").lane, []
    begin = lane.begin

    def watched(waiter: Any, rows: Any, deadline: float, *rest: Any) -> Any:
        left_s.append(deadline - time.monotonic())
        return begin(waiter, rows, deadline, *rest)

    monkeypatch.setattr(lane, "begin", watched)
    assert [client.send(request).answer().status for _ in range(3)] == [200] * 3
    assert left_s == pytest.approx([7] * 3, abs=1)


def test_it_is_one_of_many_that_share_a_batch(server: RunningServer) -> None:
    """Eight connections, each with pictures of its own, and everybody's own answer."""
    requests = [form(png(seed, 96), model="large") for seed in range(8)]
    alone = [said(server.ask(request)) for request in requests]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connected(server.port)) for _ in requests]
        for _ in range(5):
            for one, request in zip(clients, requests, strict=True):
                one.send(request)
            found = [said(one.answer()) for one in clients]
            assert all(close(one, own) for one, own in zip(found, alone, strict=True))


def close(found: tuple[int, Any, Any], expected: tuple[int, Any, Any]) -> bool:
    """Alike within what the size of a batch rounds."""
    pairs = zip(found[2]["predictions"], expected[2]["predictions"], strict=True)
    for one, other in pairs:
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
    return found[:2] == expected[:2]
