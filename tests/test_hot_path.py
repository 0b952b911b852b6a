"""The short way of the routes that compute answers as the long way does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

PREDICT, INFER = "/v1/models/tiny/predict", "/v2/models/tiny/infer"
TENSOR = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    torch.manual_seed(0)
    options = {"inputs": 4, "num_classes": 2, "hidden": [2]}
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=options),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [4]}]),
        labels=("no", "yes"),
    )
    network = networks.build("mlp", options)
    store = ModelStore(tmp_path / "models")
    store.publish("tiny", lambda folder: checkpoint.save(folder, network, manifest))
    settings = Settings(home=tmp_path, device="cpu", threads=1, _env_file=None)
    with TestClient(create_app(settings), "http://127.0.0.1") as client:
        yield client


REQUESTS = {
    "v1": (PREDICT, {"json": {"inputs": [[1, 2, 3, 4]]}}, 200),
    "v2": (INFER, {"json": {"inputs": [TENSOR]}}, 200),
    "v2 version": ("/v2/models/tiny/versions/1/infer", {"json": {"inputs": [TENSOR]}}, 200),
    "no such model": ("/v1/models/nobody/predict", {"json": {"inputs": [[1]]}}, 404),
    "v1 wrong shape": (PREDICT, {"json": {"inputs": [[1, 2]]}}, 422),
    "v2 wrong shape": (INFER, {"json": {"inputs": [{**TENSOR, "shape": [2, 2]}]}}, 400),
    "foreign host": (INFER, {"json": {}, "headers": {"host": "evil.example"}}, 400),
    "foreign page": (PREDICT, {"json": {}, "headers": {"origin": "http://evil.example"}}, 403),
    "too large": (INFER, {"content": b"", "headers": {"content-length": "999999999"}}, 413),
    "no content type": (PREDICT, {"content": b"x"}, 415),
}


@pytest.mark.changes_nothing
@pytest.mark.parametrize("case", REQUESTS)
def test_both_ways_answer_alike(client: TestClient, case: str) -> None:
    path, options, status = REQUESTS[case]
    short = client.post(path, **options)
    app = client.app
    app.hot_path, hot = None, app.hot_path  # type: ignore[attr-defined]
    long = client.post(path, **options)
    app.hot_path = hot  # type: ignore[attr-defined]
    assert short.status_code == long.status_code == status
    different = ("x-request-id", "content-length")
    assert [field for field in short.headers.items() if field[0] not in different] == [
        field for field in long.headers.items() if field[0] not in different
    ]
    assert without_time(short.json()) == without_time(long.json())


def without_time(document: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in document.items() if name != "time_ms"}


def test_the_short_way_is_counted_and_the_framework_keeps_the_rest(client: TestClient) -> None:
    client.post(INFER, json={"inputs": [TENSOR]})
    assert client.get(INFER).status_code == 405
    assert client.post("/v2/models/tiny/nothing").status_code == 404
    series = client.get("/metrics").text
    labels = 'model="tiny",route="/v2/models/{model}/infer",status="200",version="1"'
    assert f"pytorchlib_request_seconds_count{{{labels}}} 1.0" in series
    assert "process_resident_memory_bytes" in series
    for stage in ("decode", "queue", "compute", "encode"):
        assert (
            f'pytorchlib_stage_seconds_total{{model="tiny",stage="{stage}",version="1"}}' in series
        )


def test_a_stranger_cannot_fill_the_memory_with_paths(client: TestClient) -> None:
    hot = client.app.hot_path  # type: ignore[attr-defined]
    for number in range(5000):
        hot.way({"type": "http", "method": "POST", "path": f"/v1/models/m{number}/predict"})
    assert len(hot._known) <= 4096


def test_what_nobody_foresaw_is_a_500_that_says_nothing(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.post(INFER, json={"inputs": [TENSOR]})
    predictor = client.app.state.engine.live.loaded()[0]  # type: ignore[attr-defined]
    predictor.lane.submit = None
    answer = client.post(INFER, json={"inputs": [TENSOR]})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the service failed on this request"}
    assert "not callable" in caplog.text
