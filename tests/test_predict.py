"""The predict endpoint: every road in, and every way to get it wrong."""

import base64
import csv
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import publish_cnn
from starlette.testclient import TestClient

from models import checkpoint
from models.store import ModelStore

URL = "/v1/models/digits/predict"


@pytest.mark.changes_nothing
def test_a_picture_in_a_form(client: TestClient, digit_png: bytes) -> None:
    answer = client.post(URL, files={"file": ("x.png", digit_png, "image/png")})
    body = answer.json()
    assert answer.status_code == 200
    assert (body["model"], body["version"]) == ("digits", 1)
    [prediction] = body["predictions"]
    assert prediction["label"] == prediction["top_k"][0]["label"]
    assert len(prediction["top_k"]) == 5
    assert body["time_ms"].keys() == {"decode", "queue", "compute", "total"}


def test_every_road_gives_the_same_numbers(
    client: TestClient, store: ModelStore, digit_png: bytes
) -> None:
    loaded = checkpoint.load(store.resolve("digits").folder)
    pixels = loaded.manifest.preprocessing.picture(digit_png)
    tensor = loaded.manifest.preprocessing.finish(pixels[None])
    expected = torch.softmax(loaded.network(tensor), 1)[0].topk(10).values.tolist()
    text = base64.b64encode(digit_png).decode()
    roads = [
        client.post(URL, params={"top_k": 10}, files={"file": digit_png}),
        client.post(URL, data={"top_k": "10"}, files={"file": digit_png}),
        client.post(URL + "?top_k=10", content=digit_png, headers={"content-type": "image/png"}),
        client.post(URL, json={"images": [text], "top_k": 10}),
        client.post(URL, json={"image": f"data:image/png;base64,{text}", "top_k": 10}),
        client.post(URL, json={"inputs": tensor.tolist(), "top_k": 10}),
        client.post(URL, json={"inputs": tensor[0].tolist(), "top_k": 10}),
    ]
    for road in roads:
        top = road.json()["predictions"][0]["top_k"]
        assert [one["probability"] for one in top] == pytest.approx(expected, abs=1e-6)


@pytest.mark.changes_nothing
def test_several_pictures_keep_their_order(client: TestClient, digit_png: bytes) -> None:
    white = _png(np.full((8, 8), 255, np.uint8))
    one_by_one = [
        client.post(URL, files={"file": picture}).json()["predictions"][0]
        for picture in (digit_png, white, digit_png)
    ]
    together = client.post(
        URL, files=[("file", picture) for picture in (digit_png, white, digit_png)]
    ).json()["predictions"]
    for single, batched in zip(one_by_one, together, strict=True):
        assert single["label"] == batched["label"]
        assert single["probability"] == pytest.approx(batched["probability"], abs=1e-6)


@pytest.mark.changes_nothing
@pytest.mark.parametrize("name", ["digits", "digits:1", "digits@production"])
def test_names_versions_and_aliases(client: TestClient, digit_png: bytes, name: str) -> None:
    answer = client.post(f"/v1/models/{name}/predict", files={"file": digit_png})
    assert answer.json()["version"] == 1


def test_a_moved_alias_is_followed(client: TestClient, store: ModelStore, digit_png: bytes) -> None:
    client.post(URL, files={"file": digit_png})
    publish_cnn(store, "digits", seed=2)
    store.move_alias("digits", "production", 2)
    for _ in range(200):
        if client.post(URL, files={"file": digit_png}).json()["version"] == 2:
            return
        threading.Event().wait(0.02)
    pytest.fail("the alias moved and version 1 still answers after four seconds")


def test_a_damaged_version_is_refused_and_others_serve(
    client: TestClient, store: ModelStore, digit_png: bytes
) -> None:
    publish_cnn(store, "other", seed=3)
    weights = store.resolve("digits").folder / "weights.safetensors"
    weights.chmod(0o644)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    answer = client.post(URL, files={"file": digit_png})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "load_failed"
    assert "sha256" in answer.json()["error"]["message"]
    assert client.post("/v1/models/other/predict", files={"file": digit_png}).status_code == 200


@pytest.mark.changes_nothing
def test_an_unknown_model_lists_the_nearest(client: TestClient, digit_png: bytes) -> None:
    answer = client.post("/v1/models/digit/predict", files={"file": digit_png})
    assert answer.status_code == 404
    assert "digits" in answer.json()["error"]["message"]


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{", 400),
        ("application/json", b"\xff\xfe", 400),
        ("application/json", b"[]", 422),
        ("application/json", b"{}", 422),
        ("application/json", b'{"inputs": []}', 422),
        ("application/json", b'{"inputs": "seven"}', 422),
        ("application/json", b'{"inputs": [["1", 2]]}', 422),
        ("application/json", b'{"inputs": [[null]]}', 422),
        ("application/json", b'{"inputs": [[true]]}', 422),
        ("application/json", b'{"inputs": [[1], [1, 2]]}', 422),
        ("application/json", b'{"inputs": [[1, 2]]}', 422),
        ("application/json", b'{"inputs": [[1e999]]}', 400),
        ("application/json", b'{"inputs": [[NaN]]}', 400),
        ("application/json", b'{"images": "x"}', 422),
        ("application/json", b'{"images": ["!"]}', 422),
        ("application/json", b'{"images": [], "inputs": []}', 422),
        ("application/json", b'{"images": ["aGVsbG8="]}', 415),
        ("application/json", b'{"inputs": [1], "colour": 1}', 422),
        ("application/json", b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        ("image/png", b"", 422),
        ("image/png", b"hello", 415),
        ("text/plain", b"hello", 415),
        ("", b"hello", 415),
        ("multipart/form-data", b"hello", 400),
        ("multipart/form-data; boundary=x", b"hello", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422),
        ("multipart/form-data; boundary=" + "x" * 71, b"--x--\r\n", 400),
    ],
)
def test_bad_bodies(client: TestClient, content_type: str, body: bytes, status: int) -> None:
    answer = client.post(URL, content=body, headers={"content-type": content_type})
    assert (answer.status_code, len(answer.json()["error"]["message"]) > 20) == (status, True)


@pytest.mark.changes_nothing
def test_a_number_that_float32_cannot_hold(client: TestClient) -> None:
    inputs = [[[1e39] * 8] * 8]
    answer = client.post(URL, content=json.dumps({"inputs": inputs}), headers=JSON)
    assert answer.status_code == 422
    assert "float32" in answer.json()["error"]["message"]


@pytest.mark.changes_nothing
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", "9" * 30])
def test_bad_top_k(client: TestClient, digit_png: bytes, value: str) -> None:
    answer = client.post(URL, params={"top_k": value}, files={"file": digit_png})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "top_k")


@pytest.mark.changes_nothing
@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "1e12"])
def test_bad_timeouts(client: TestClient, digit_png: bytes, value: str) -> None:
    headers = {"x-request-timeout-ms": value}
    answer = client.post(URL, files={"file": digit_png}, headers=headers)
    assert answer.status_code == 400


@pytest.mark.changes_nothing
def test_no_picture_of_the_corpus_is_a_server_error(client: TestClient, real_data: Path) -> None:
    with (real_data / "images" / "MANIFEST.tsv").open() as file:
        names = [row["file"] for row in csv.DictReader(file, delimiter="\t")]
    for name in names:
        picture = (real_data / "images" / name).read_bytes()
        answer = client.post(URL, files={"file": (name, picture)})
        assert answer.status_code in (200, 413, 415, 422), (name, answer.text)


JSON = {"content-type": "application/json"}


def _png(pixels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
