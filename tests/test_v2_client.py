"""A client that nobody here wrote, against a real server process.

`tritonclient` looks at status 200 exactly, sends odd content types or none, asks for compressed
answers that it reads only on `infer`, and slices bodies by their lengths. Every story runs with its
sync and its asyncio client.
"""

import asyncio
import contextlib
import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from conftest import ROOT, publish_cnn

from app.main import create_app
from app.settings import Settings
from models import checkpoint
from models.store import ModelStore

pytestmark = [
    pytest.mark.slow,
    # tritonclient's asyncio client leaves the answers to its questions about health unread.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
triton = pytest.importorskip("tritonclient.http")
aio = pytest.importorskip("tritonclient.http.aio")
ml_dtypes = pytest.importorskip("ml_dtypes")

Ask = Callable[..., Any]
ServerError = pytest.importorskip("tritonclient.utils").InferenceServerException
SHAPE = [1, 1, 8, 8]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`digits` in two versions, 1 in production and 2 the champion; and `spare` to play with."""
    home = tmp_path_factory.mktemp("home")
    store = ModelStore(home / "models")
    publish_cnn(store, "digits", seed=1)
    publish_cnn(store, "digits", seed=2)
    publish_cnn(store, "spare", seed=3)
    store.move_alias("digits", "champion", 2, expected=None, by="test", why="test")
    return home


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    """Where a server process listens, without a scheme, as the client wants it."""
    command = [sys.executable, "-m", "app", "serve", "--home", str(home), "--port", "0"]
    options = ["--device", "cpu", "--threads", "1", "--log-level", "error"]
    with subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            greeting = process.stdout.readline()
            found = re.search(r"http://([^/;\s]+)", greeting)
            assert found, f"the server said {greeting!r}"
            wait_until_live(found[1])
            yield found[1]
        finally:
            process.terminate()
            process.communicate(timeout=30)


def wait_until_live(url: str) -> None:
    """The socket listens before the application is there; the first answer comes when it is."""
    connection = http.client.HTTPConnection(url, timeout=60)
    connection.request("GET", "/v2/health/live")
    assert connection.getresponse().read() == b'{"live":true}'
    connection.close()


@pytest.fixture(params=["sync", "aio"])
def ask(request: pytest.FixtureRequest, url: str) -> Ask:
    """Calls one method of the client, whichever of the two it is."""

    def sync(method: str, *args: Any, **kwargs: Any) -> Any:
        with triton.InferenceServerClient(url) as client:
            return getattr(client, method)(*args, **kwargs)

    async def awaited(method: str, *args: Any, **kwargs: Any) -> Any:
        async with aio.InferenceServerClient(url) as client:
            return await getattr(client, method)(*args, **kwargs)

    if request.param == "sync":
        return sync
    return lambda *args, **kwargs: asyncio.run(awaited(*args, **kwargs))


@pytest.fixture(scope="module")
def digits(home: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The network of version 1 in this process: float32 `[n, 1, 8, 8]` -> logits."""
    network = checkpoint.load(ModelStore(home / "models").resolve("digits:1").folder).network

    def logits(numbers: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(numbers)).numpy()

    return logits


def numbers(count: int = 1) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 1, 8, 8), dtype=np.float32)


def tensor(array: np.ndarray, binary: bool = True, datatype: str = "FP32") -> Any:
    one = triton.InferInput("input", list(array.shape), datatype)
    return one.set_data_from_numpy(array, binary_data=binary)


def wanted(name: str = "logits", **kwargs: Any) -> Any:
    return triton.InferRequestedOutput(name, **kwargs)


# The ten traps.


def test_1_success_is_status_200_exactly(ask: Ask) -> None:
    ask("load_model", "spare")
    assert ask("is_model_ready", "spare")
    ask("unload_model", "spare")
    assert not ask("is_model_ready", "spare")
    ask("load_model", "spare")
    assert ask("is_model_ready", "spare")


def test_2_the_content_type_says_nothing(ask: Ask, digits: Any) -> None:
    array = numbers()
    inputs, outputs = [tensor(array, binary=False)], [wanted(binary_data=False)]
    for content_type in (None, "application/octet-stream", "text/plain"):
        headers = {"Content-Type": content_type} if content_type else None
        result = ask("infer", "digits", inputs, outputs=outputs, headers=headers)
        np.testing.assert_allclose(result.as_numpy("logits"), digits(array), atol=1e-5)


def test_3_nothing_but_infer_is_compressed(ask: Ask) -> None:
    headers = {"Accept-Encoding": "gzip, deflate"}
    assert ask("get_server_metadata", headers=headers)["name"] == "pytorchlib"
    assert ask("get_model_metadata", "digits", headers=headers)["name"] == "digits"
    assert ask("get_inference_statistics", headers=headers)["model_stats"]
    with pytest.raises(ServerError, match="no output 'nothing'"):
        ask("infer", "digits", [tensor(numbers())], outputs=[wanted("nothing")], headers=headers)


@pytest.mark.parametrize("binary", [True, False])
def test_4_and_5_every_answer_has_a_length_and_outputs(url: str, binary: bool) -> None:
    inputs = [tensor(np.empty((0, 1, 8, 8), np.float32)), tensor(numbers())]
    for one in inputs:
        body, length = triton.InferenceServerClient.generate_request_body(
            [one], outputs=[wanted(binary_data=binary)]
        )
        headers = {"Inference-Header-Content-Length": str(length)}
        connection = http.client.HTTPConnection(url, timeout=10)
        connection.request("POST", "/v2/models/digits/infer", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status == 200
        assert answer.getheader("Content-Length") == str(len(content))
        assert answer.getheader("Transfer-Encoding") is None
        header = answer.getheader("Inference-Header-Content-Length")
        result = triton.InferenceServerClient.parse_response_body(
            content, header_length=int(header) if header else None
        )
        assert [out["name"] for out in result.get_response()["outputs"]] == ["logits"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_6_the_shape_is_the_shape(ask: Ask, digits: Any, count: int) -> None:
    array = numbers(count) if count else np.empty((0, 1, 8, 8), np.float32)
    result = ask("infer", "digits", [tensor(array)])
    assert result.as_numpy("logits").shape == (count, 10)
    assert result.as_numpy("probabilities").shape == (count, 10)
    if count:
        np.testing.assert_allclose(result.as_numpy("logits"), digits(array), atol=1e-5)


def test_7_names_are_quoted_and_versions_are_not(ask: Ask) -> None:
    assert ask("is_model_ready", "digits", "1")
    assert ask("is_model_ready", "digits", "champion")
    assert ask("is_model_ready", "digits@champion")
    assert not ask("is_model_ready", "digits", "nope")
    assert not ask("is_model_ready", "nope")
    assert ask("get_model_metadata", "digits", "champion")["versions"] == ["1", "2"]
    by_alias = ask("infer", "digits", [tensor(numbers())], model_version="champion")
    assert by_alias.get_response()["model_version"] == "2"


def test_7_a_base_path_before_the_protocol(home: Path) -> None:
    with prefixed_server(home, "/prefix") as url, triton.InferenceServerClient(url) as client:
        assert client.is_server_live()
        assert client.is_model_ready("digits", "champion")
        assert client.infer("digits", [tensor(numbers())]).as_numpy("logits").shape == (1, 10)


def test_8_the_repository_takes_what_the_client_sends(ask: Ask) -> None:
    index = {(one["name"], one["version"]) for one in ask("get_model_repository_index")}
    assert index == {("digits", "1"), ("digits", "2"), ("spare", "1")}
    ask("unload_model", "spare", unload_dependents=True)
    [spare] = [one for one in ask("get_model_repository_index") if one["name"] == "spare"]
    assert spare["state"] == "UNAVAILABLE"
    with pytest.raises(ServerError, match="unloaded"):
        ask("infer", "spare", [tensor(numbers())])
    ask("load_model", "spare")
    with pytest.raises(ServerError, match="as it was published"):
        ask("load_model", "spare", config="{}")
    with pytest.raises(ServerError, match="nope"):
        ask("load_model", "nope")


def test_9_many_connections_each_get_their_own(url: str, digits: Any) -> None:
    arrays = [numbers(1 + seed % 4) * seed for seed in range(64)]
    with triton.InferenceServerClient(url, concurrency=8) as client:
        pending = [client.async_infer("digits", [tensor(array)]) for array in arrays]
        for array, one in zip(arrays, pending, strict=True):
            found = one.get_result().as_numpy("logits")
            np.testing.assert_allclose(found, digits(array), rtol=1e-4, atol=1e-4)


def test_10_statistics_of_everything_and_of_one(ask: Ask) -> None:
    ask("infer", "digits", [tensor(numbers())])
    everything = ask("get_inference_statistics")["model_stats"]
    assert ("digits", "1") in {(one["name"], one["version"]) for one in everything}
    before = counts(ask)
    ask("infer", "digits", [tensor(numbers(3))])
    ask("infer", "digits", [tensor(numbers(1))])
    after = counts(ask)
    assert (after[0] - before[0], after[1] - before[1]) == (4, 2)


def counts(ask: Ask) -> tuple[int, int]:
    [one] = ask("get_inference_statistics", "digits", "1")["model_stats"]
    for part in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert one["inference_stats"][part].keys() == {"count", "ns"}
    return one["inference_count"], one["execution_count"]


# The rest of the protocol.


def test_health_and_metadata(ask: Ask) -> None:
    assert ask("is_server_live")
    assert ask("is_server_ready")
    assert "binary_tensor_data" in ask("get_server_metadata")["extensions"]
    metadata, config = ask("get_model_metadata", "digits"), ask("get_model_config", "digits")
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]
    assert config["max_batch_size"] > 0
    assert config["input"][0]["dims"] == SHAPE[1:]


@pytest.mark.parametrize("sent_binary", [True, False])
@pytest.mark.parametrize("got_binary", [True, False])
def test_json_and_binary_in_every_mixture(
    ask: Ask, digits: Any, sent_binary: bool, got_binary: bool
) -> None:
    array = numbers(2)
    outputs = [
        wanted("probabilities", binary_data=not got_binary),
        wanted("logits", binary_data=got_binary),
    ]
    result = ask("infer", "digits", [tensor(array, sent_binary)], outputs=outputs, request_id="7")
    assert result.get_response()["id"] == "7"
    assert [one["name"] for one in result.get_response()["outputs"]] == ["probabilities", "logits"]
    np.testing.assert_allclose(result.as_numpy("logits"), digits(array), atol=1e-5)
    np.testing.assert_allclose(result.as_numpy("probabilities").sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("request_encoding", ["gzip", "deflate", None])
@pytest.mark.parametrize("response_encoding", ["gzip", "deflate", None])
def test_compressed_both_ways(
    ask: Ask, digits: Any, request_encoding: str | None, response_encoding: str | None
) -> None:
    array = numbers(2)
    for binary in (True, False):
        result = ask(
            "infer",
            "digits",
            [tensor(array, binary)],
            outputs=[wanted(binary_data=binary)],
            request_compression_algorithm=request_encoding,
            response_compression_algorithm=response_encoding,
        )
        np.testing.assert_allclose(result.as_numpy("logits"), digits(array), atol=1e-5)


@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", "f2"), ("BF16", ml_dtypes.bfloat16)])
def test_sixteen_bit_floats(ask: Ask, digits: Any, datatype: str, dtype: Any) -> None:
    array = numbers().astype(dtype)
    result = ask("infer", "digits", [tensor(array, datatype=datatype)])
    expected = digits(array.astype(np.float32))
    np.testing.assert_allclose(result.as_numpy("logits"), expected, atol=1e-5)


def test_sixteen_bit_floats_as_json_are_refused(ask: Ask) -> None:
    array = numbers().astype(np.float16)
    with pytest.raises(ServerError, match="cannot travel as JSON"):
        ask("infer", "digits", [tensor(array, binary=False, datatype="FP16")])


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_encoded_pictures(ask: Ask, home: Path, digits: Any, digit_png: bytes, shape: Any) -> None:
    preprocessing = checkpoint.load(
        ModelStore(home / "models").resolve("digits:1").folder
    ).manifest.preprocessing
    batch = preprocessing.finish(preprocessing.picture(digit_png)[None]).numpy()
    array = np.array([digit_png, digit_png], dtype=object).reshape(shape)
    picture = triton.InferInput("image", shape, "BYTES").set_data_from_numpy(array)
    found = ask("infer", "digits", [picture]).as_numpy("logits")
    np.testing.assert_allclose(found, np.repeat(digits(batch), 2, 0), atol=1e-5)
    with pytest.raises(ServerError, match="not several at once"):
        ask("infer", "digits", [picture, tensor(numbers())])


@pytest.mark.parametrize("binary", [True, False])
def test_classification(ask: Ask, digits: Any, binary: bool) -> None:
    array = numbers(2)
    output = wanted("logits", binary_data=binary, class_count=3)
    found = ask("infer", "digits", [tensor(array)], outputs=[output]).as_numpy("logits")
    assert found.shape == (2, 3)
    first = found[0][0]
    value, index, label = (first.decode() if binary else first).split(":")
    best = int(digits(array)[0].argmax())
    assert (int(index), label) == (best, str(best))
    assert float(value) == pytest.approx(float(digits(array)[0, best]), abs=1e-4)


def test_priority_and_timeout(ask: Ask) -> None:
    inputs = [tensor(numbers())]
    assert ask("infer", "digits", inputs, priority=1, timeout=30_000_000)
    with pytest.raises(ServerError) as refused:
        ask("infer", "digits", inputs, timeout=1)
    assert refused.value.status() == "504"


def test_random_bits_are_numbers_too(ask: Ask) -> None:
    """perf_analyzer fills its inputs with random bytes: NaN and infinity among them."""
    bits = np.random.default_rng(0).integers(0, 256, 4 * 64, dtype=np.uint8)
    array = bits.view(np.float32).reshape(SHAPE)
    assert ask("infer", "digits", [tensor(array)]).as_numpy("logits").shape == (1, 10)
    nothing = [tensor(np.full(SHAPE, np.nan, np.float32))]
    assert np.isnan(ask("infer", "digits", nothing).as_numpy("logits")).all()
    with pytest.raises(ServerError, match="NaN or infinity.*binary data"):
        ask("infer", "digits", nothing, outputs=[wanted(binary_data=False)])


def test_errors_are_read_by_the_client(ask: Ask) -> None:
    inputs = [tensor(numbers())]
    refused = {
        "nearest": ("infer", "digit", inputs),
        "no input": ("infer", "digits", [triton.InferInput("x", [1], "FP32")]),
        r"takes \[-1, 1, 8, 8\]": ("infer", "digits", [tensor(numbers()[0])]),
        "not FP64": ("infer", "digits", [tensor(numbers().astype("f8"), datatype="FP64")]),
        "no inputs": ("infer", "digits", []),
    }
    refused["no input"][2][0].set_data_from_numpy(np.zeros(1, np.float32))  # type: ignore[attr-defined]
    for sentence, call in refused.items():
        with pytest.raises(ServerError) as error:
            ask(*call)
        assert error.value.status() in ("400", "404")
        assert "decoding the response" not in error.value.message()
        assert re.search(sentence, error.value.message()), error.value.message()


@contextlib.contextmanager
def prefixed_server(home: Path, prefix: str) -> Iterator[str]:
    """The application behind a base path, in a thread of this process."""
    app = create_app(Settings(home=home, device="cpu", threads=1))

    async def prefixed(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(prefix)
        await app({**scope, "path": path}, receive, send)

    server = uvicorn.Server(uvicorn.Config(prefixed, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{prefix}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
