"""The routes of the Open Inference Protocol, over the whole application."""

import gzip
import re
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from conftest import publish_cnn
from starlette.testclient import TestClient

from app.api.v2 import EXTENSIONS, MODEL_PATHS, V2Options, infer_routes, v2_routes
from app.api.v2_schema import v2_entries
from app.api.v2_tensors import Limits
from app.engine.batch_policy import BatchPolicy
from models import checkpoint
from models.store import ModelStore

MODEL = "/v2/models/digits"
INFER = f"{MODEL}/infer"
HEADER = "Inference-Header-Content-Length"
ZEROS = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0] * 64}


def infer(client: TestClient, *inputs: Any, path: str = INFER, **more: Any) -> Any:
    """The outputs by name of a JSON request that must succeed."""
    answer = client.post(path, json={"inputs": list(inputs), **more})
    assert answer.status_code == 200, answer.text
    return {one["name"]: one for one in answer.json()["outputs"]}


def binary(document: Any, *buffers: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request whose tensors are raw."""
    text = orjson.dumps(document)
    return b"".join([text, *buffers]), {HEADER: str(len(text))}


def picture_input(picture: bytes, shape: list[int]) -> tuple[dict[str, Any], bytes]:
    element = len(picture).to_bytes(4, "little") + picture
    entry = {"name": "image", "shape": shape, "datatype": "BYTES"}
    return {**entry, "parameters": {"binary_data_size": len(element)}}, element


def numbers_of(store: ModelStore, picture: bytes) -> torch.Tensor:
    """What preprocessing makes of a picture, `[1, 1, 8, 8]`."""
    preprocessing = checkpoint.load(store.resolve("digits").folder).manifest.preprocessing
    return preprocessing.finish(preprocessing.picture(picture)[None])


def error_of(answer: Any, status: int) -> str:
    """The sentence of an error in the protocol's own form."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert list(body) == ["error"]
    return str(body["error"])


@pytest.mark.changes_nothing
def test_the_server_names_what_it_offers(client: TestClient) -> None:
    body = client.get("/v2").json()
    assert body["name"] == "pytorchlib"
    assert body["extensions"] == list(EXTENSIONS)
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


@pytest.mark.changes_nothing
def test_a_model_is_described(client: TestClient) -> None:
    assert client.get(MODEL).json() == {
        "name": "digits",
        "versions": ["1"],
        "platform": "pytorch",
        "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 8, 8]}],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
        ],
        "alternative_inputs": [
            {"name": "image", "datatype": "BYTES", "shape": [-1]},
            {"name": "pixels", "datatype": "UINT8", "shape": [-1, 1, 8, 8]},
        ],
    }


@pytest.mark.changes_nothing
def test_the_configuration_agrees_with_the_metadata(client: TestClient) -> None:
    config, metadata = client.get(f"{MODEL}/config").json(), client.get(MODEL).json()
    assert config["max_batch_size"] > 0
    assert config["dynamic_batching"]
    for ours, theirs in (("input", "inputs"), ("output", "outputs")):
        for one, other in zip(config[ours], metadata[theirs], strict=True):
            assert (one["name"], [-1, *one["dims"]]) == (other["name"], other["shape"])
            assert one["data_type"] == f"TYPE_{other['datatype']}"


def test_every_road_gives_the_same_numbers(
    client: TestClient, store: ModelStore, digit_png: bytes
) -> None:
    numbers = numbers_of(store, digit_png)
    expected = checkpoint.load(store.resolve("digits").folder).network(numbers)[0].tolist()
    entry = {"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32"}
    flat = {**entry, "data": numbers.flatten().tolist()}
    nested = {**entry, "data": numbers.tolist()}
    raw = {**entry, "parameters": {"binary_data_size": 256}}
    picture, element = picture_input(digit_png, [1])
    roads = [
        client.post(INFER, json={"inputs": [flat]}),
        client.post(INFER, json={"inputs": [nested]}),
        post(client, binary({"inputs": [raw]}, numbers.numpy().tobytes())),
        post(client, binary({"inputs": [picture]}, element)),
    ]
    for answer in roads:
        found = answer.json()["outputs"][0]["data"]
        assert found == pytest.approx(expected, abs=1e-5)


def post(client: TestClient, request: tuple[bytes, dict[str, str]], path: str = INFER) -> Any:
    return client.post(path, content=request[0], headers=request[1])


@pytest.mark.changes_nothing
def test_a_raw_body_is_one_item_and_its_answer_is_raw(client: TestClient) -> None:
    answer = post(client, (bytes(256), {HEADER: "0"}))
    length = int(answer.headers[HEADER])
    outputs = orjson.loads(answer.content[:length])["outputs"]
    assert answer.headers["content-type"] == "application/octet-stream"
    assert [one["shape"] for one in outputs] == [[1, 10], [1, 10]]
    found = np.frombuffer(answer.content[length:], "<f4")
    assert found[10:].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.changes_nothing
@pytest.mark.parametrize("datatype", ["float16", "bfloat16"])
def test_sixteen_bit_floats_widen(client: TestClient, datatype: str) -> None:
    numbers = torch.randn(2, 1, 8, 8).to(getattr(torch, datatype))
    name = {"float16": "FP16", "bfloat16": "BF16"}[datatype]
    entry = {"name": "input", "shape": [2, 1, 8, 8], "datatype": name}
    raw = numbers.view(torch.int16).numpy().tobytes()
    entry["parameters"] = {"binary_data_size": len(raw)}
    found = post(client, binary({"inputs": [entry]}, raw)).json()["outputs"][0]["data"]
    full = {**ZEROS, "shape": [2, 1, 8, 8], "data": numbers.float().flatten().tolist()}
    assert found == pytest.approx(infer(client, full)["logits"]["data"], abs=1e-6)


@pytest.mark.changes_nothing
def test_pictures_come_as_a_list_or_a_column(client: TestClient, digit_png: bytes) -> None:
    for shape in ([2], [2, 1]):
        picture, element = picture_input(digit_png, shape)
        picture["parameters"]["binary_data_size"] *= 2
        answer = post(client, binary({"inputs": [picture]}, element, element)).json()
        assert answer["outputs"][0]["shape"] == [2, 10]


@pytest.mark.changes_nothing
def test_a_batch_without_items_has_an_answer_without_items(client: TestClient) -> None:
    empty = {**ZEROS, "shape": [0, 1, 8, 8], "data": []}
    outputs = infer(client, empty)
    assert outputs["logits"]["shape"] == [0, 10]
    assert outputs["logits"]["data"] == []
    none = {"name": "image", "shape": [0], "datatype": "BYTES", "data": []}
    assert infer(client, none)["probabilities"]["shape"] == [0, 10]


@pytest.mark.changes_nothing
def test_classes_instead_of_numbers(client: TestClient) -> None:
    wanted = [{"name": "probabilities", "parameters": {"classification": 3}}]
    found = infer(client, ZEROS, outputs=wanted)["probabilities"]
    assert (found["datatype"], found["shape"]) == ("BYTES", [1, 3])
    value, index, label = found["data"][0].split(":")
    assert len(value.partition(".")[2]) == 6
    assert index == label
    assert list(infer(client, ZEROS, outputs=[{"name": "logits"}])) == ["logits"]


def test_versions_and_aliases_in_the_path(client: TestClient, store: ModelStore) -> None:
    publish_cnn(store, "digits", seed=2)
    store.move_alias("digits", "champion", 2, expected=None, by="test", why="test")
    first = infer(client, ZEROS, path=f"{MODEL}/versions/1/infer")["logits"]["data"]
    champion = infer(client, ZEROS, path=f"{MODEL}/versions/champion/infer")["logits"]["data"]
    assert first != champion
    assert infer(client, ZEROS, path="/v2/models/digits:2/infer")["logits"]["data"] == champion
    assert client.get(f"{MODEL}/versions/champion/ready").status_code == 200
    assert "versions" not in error_of(client.get(f"{MODEL}/versions/9/ready"), 404)
    assert client.get(MODEL).json()["versions"] == ["1", "2"]


@pytest.mark.changes_nothing
def test_the_id_comes_back(client: TestClient) -> None:
    answer = client.post(INFER, json={"id": "seven", "inputs": [ZEROS]}).json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("seven", "digits", "1")
    assert "id" not in client.post(INFER, json={"inputs": [ZEROS]}).json()


MISFITS = {
    "unknown input": ({**ZEROS, "name": "x"}, "no input 'x'; it takes input or image or pixels"),
    "FP64": ({**ZEROS, "datatype": "FP64"}, "takes FP32 or FP16 or BF16, not FP64"),
    "INT32": ({**ZEROS, "datatype": "INT32"}, "not INT32"),
    "no batch": ({**ZEROS, "shape": [1, 8, 8]}, r"takes \[-1, 1, 8, 8\]"),
    "other shape": ({**ZEROS, "shape": [1, 8, 8, 1]}, r"takes \[-1, 1, 8, 8\]"),
    "flat shape": ({**ZEROS, "shape": [64]}, r"takes \[-1, 1, 8, 8\]"),
    "FP16 as JSON": ({**ZEROS, "datatype": "FP16"}, "FP16 cannot travel as JSON"),
    "a number short": ({**ZEROS, "data": [0] * 63}, "has 63 elements"),
    "text": ({**ZEROS, "data": ["0"] * 64}, "takes numbers"),
    "no picture": (
        {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["no picture"]},
        "picture|image|format|JPEG",
    ),
}


@pytest.mark.changes_nothing
@pytest.mark.parametrize(("entry", "sentence"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_model_is_refused(
    client: TestClient, entry: Any, sentence: str
) -> None:
    answer = client.post(INFER, json={"inputs": [entry]})
    assert 400 <= answer.status_code < 422, answer.text
    assert re.search(sentence, answer.json()["error"])


@pytest.mark.changes_nothing
def test_a_tensor_and_a_picture_at_once_are_refused(client: TestClient) -> None:
    picture = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    answer = client.post(INFER, json={"inputs": [ZEROS, picture]})
    assert "takes input or image or pixels, not several at once" in error_of(answer, 400)


@pytest.mark.changes_nothing
def test_pixels_are_finished_as_a_picture_is(client: TestClient, store: ModelStore) -> None:
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    preprocessing = checkpoint.load(store.resolve("digits").folder).manifest.preprocessing
    numbers = preprocessing.finish(pixels).flatten().tolist()
    entry = {"name": "input", "shape": [2, 1, 8, 8]}
    expected = infer(client, {**entry, "datatype": "FP32", "data": numbers})
    as_bytes = {**entry, "datatype": "UINT8", "data": pixels.flatten().tolist()}
    assert infer(client, {**as_bytes, "name": "pixels"}) == expected
    error_of(client.post(INFER, json={"inputs": [as_bytes]}), 400)


@pytest.mark.changes_nothing
def test_errors_have_the_protocols_form(client: TestClient) -> None:
    unknown = client.post("/v2/models/digit/infer", json={"inputs": [ZEROS]})
    assert "digits" in error_of(unknown, 404)
    assert "not JSON" in error_of(client.post(INFER, content=b"{"), 400)
    assert "no inputs" in error_of(client.post(INFER, json={}), 400)
    assert "in range" in error_of(client.post(INFER, content=b"{}", headers={HEADER: "3"}), 400)
    error_of(client.get(INFER), 405)
    error_of(client.get("/v2/nothing"), 404)
    error_of(client.get("/v2/systemsharedmemory/status"), 404)
    headers = {"Content-Encoding": "br"}
    assert "neither" in error_of(client.post(INFER, content=b"{}", headers=headers), 415)
    headers = {"X-Request-Timeout-Ms": "soon"}
    error_of(client.post(INFER, json={"inputs": [ZEROS]}, headers=headers), 400)


@pytest.mark.changes_nothing
def test_the_content_type_is_ignored(client: TestClient) -> None:
    body = orjson.dumps({"inputs": [ZEROS]})
    for content_type in ("application/octet-stream", "text/plain", "", "nonsense"):
        answer = client.post(INFER, content=body, headers={"Content-Type": content_type})
        assert answer.status_code == 200


@pytest.mark.changes_nothing
def test_a_large_body_is_parsed_as_a_small_one_is(client: TestClient) -> None:
    body = orjson.dumps({"inputs": [ZEROS]}) + b" " * 2_000_000
    answer = client.post(INFER, content=body)
    assert answer.json()["outputs"][0]["shape"] == [1, 10]
    assert "not JSON" in error_of(client.post(INFER, content=body + b"x"), 400)
    assert "send tensors as binary" in error_of(client.post(INFER, content=b" " * 9_000_000), 413)


@pytest.mark.changes_nothing
def test_a_request_whose_time_is_up_is_refused(client: TestClient) -> None:
    late = {"inputs": [ZEROS], "parameters": {"timeout": 1}}
    assert client.post(INFER, json=late).status_code == 504
    relaxed = {"inputs": [ZEROS], "parameters": {"timeout": 60_000_000, "priority": 1}}
    assert client.post(INFER, json=relaxed).status_code == 200


@pytest.mark.changes_nothing
def test_only_infer_is_compressed_and_only_on_request(client: TestClient) -> None:
    body = orjson.dumps({"inputs": [ZEROS]})
    packed = client.post(
        INFER,
        content=gzip.compress(body),
        headers={"Content-Encoding": "gzip", "Accept-Encoding": "deflate"},
    )
    assert packed.headers["content-encoding"] == "deflate"
    plain = client.post(INFER, content=body, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert packed.json() == plain.json()
    for path in ("/v2", MODEL, f"{MODEL}/stats", "/v2/models/stats"):
        answer = client.get(path, headers={"Accept-Encoding": "gzip"})
        assert "content-encoding" not in answer.headers
    failed = client.post(INFER, content=b"{", headers={"Accept-Encoding": "gzip"})
    assert "content-encoding" not in failed.headers


def test_statistics_count_items_and_batches(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the event loop two rows may be two batches, where a slow moment makes them seem long.
    monkeypatch.setattr(BatchPolicy, "prefers_inline", lambda *_: False)
    before = statistics(client)
    # Two rows are one batch; three may be two, where that was quicker lately than padding.
    infer(client, {**ZEROS, "shape": [2, 1, 8, 8], "data": [0] * 128})
    infer(client, ZEROS)
    after = statistics(client)
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 2
    assert after["inference_stats"]["success"]["count"] == 2
    needed = {"success", "queue", "cache_hit", "cache_miss"}
    needed |= {"compute_input", "compute_infer", "compute_output"}
    assert needed <= after["inference_stats"].keys()
    assert sum(one["compute_infer"]["count"] for one in after["batch_stats"]) == 2


def statistics(client: TestClient) -> Any:
    [one] = client.get(f"{MODEL}/stats").json()["model_stats"]
    assert client.get("/v2/models/stats").json()["model_stats"] == [one]
    assert client.get(f"{MODEL}/versions/1/stats").json()["model_stats"] == [one]
    return one


def test_the_repository_loads_and_unloads(client: TestClient) -> None:
    index, load = "/v2/repository/index", "/v2/repository/models/digits/load"
    assert client.post(index).json()[0]["state"] == "UNAVAILABLE"
    assert client.post(index, json={"ready": True}).json() == []
    assert client.post(load, json={}).json() == {}
    assert client.post(index, json={"ready": True}).json() == [
        {"name": "digits", "version": "1", "state": "READY", "reason": ""}
    ]
    wish = {"parameters": {"unload_dependents": False}}
    assert client.post("/v2/repository/models/digits/unload", json=wish).status_code == 200
    assert "unloaded" in error_of(client.get(f"{MODEL}/ready"), 503)
    assert client.post(load).status_code == 200
    assert client.get(f"{MODEL}/ready").json() == {"name": "digits", "ready": True}


def test_the_repository_takes_no_files(client: TestClient) -> None:
    wish = {"parameters": {"config": "{}", "file:1/model.pt": "AAAA"}}
    answer = client.post("/v2/repository/models/digits/load", json=wish)
    assert "as it was published" in error_of(answer, 400)
    answer = client.post("/v2/repository/models/nothing/load", json={})
    assert "digits" in error_of(answer, 404)
    error_of(client.post("/v2/repository/index", content=b"["), 400)
    error_of(client.post("/v2/repository/index", json={"ready": 1}), 400)


@pytest.mark.changes_nothing
def test_every_route_has_an_entry_and_every_entry_a_route(client: TestClient) -> None:
    options = V2Options(Limits(), "0", 1, 1.0)
    state = client.app.state  # type: ignore[attr-defined]
    live, gate = state.engine.live, state.gate
    routes = [*infer_routes(live, options, gate), *v2_routes(live, options, gate)]
    entries = v2_entries()
    assert {route.path for route in routes} == set(entries)  # type: ignore[attr-defined]
    assert len(MODEL_PATHS) == 2
    for item in entries.values():
        for entry in item.values():
            assert entry["summary"].endswith(".")
            assert "example" in entry["responses"]["200"]["content"]["application/json"]
    assert client.get("/openapi.json").json()["paths"].keys() >= entries.keys()


@pytest.mark.changes_nothing
def test_the_example_in_the_documentation_works(client: TestClient) -> None:
    content = v2_entries()["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]
    example = content["application/json"]["example"]
    example["inputs"][0]["shape"] = [1, 1, 8, 8]  # this network is no perceptron
    answer = client.post(INFER, json=example)
    assert answer.json()["outputs"][0]["shape"] == [1, 3]
