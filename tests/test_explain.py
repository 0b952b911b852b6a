"""Explanations: what they promise in mathematics, in bounds, and in the answers they give."""

import asyncio
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

from app.engine.attribution import Explainer, Explanation, Question
from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.decoding import Decoder
from app.engine.loading import load_version
from app.engine.predictor import Predictor
from app.engine.twin import twin_of
from app.errors import BadInput, DeadlineExceeded, Overloaded
from models.picture import PictureLimits
from models.store import ModelStore
from training.config import TrainConfig
from training.datasets import Dataset
from training.publish import publish
from training.recipes import with_recipe
from training.train import train

METHODS = ("saliency", "integrated_gradients", "grad_cam", "occlusion")
URL = "/v1/models/digits/explain"


def run(loop: Any) -> Any:
    """What a generator returns in the end."""
    while True:
        try:
            next(loop)
        except StopIteration as stop:
            return stop.value


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelStore, Dataset]:
    """A store with `digits`, really trained, and the pictures it was tested on."""
    store = ModelStore(tmp_path_factory.mktemp("explain") / "models")
    config = TrainConfig.of(**with_recipe({"dataset": "digits"}) | {"epochs": 6, "threads": 1})
    result = run(train(config))
    publish(result, store, "digits")
    return store, result.dataset


@pytest.fixture(scope="module")
def pictures(trained: tuple[ModelStore, Dataset]) -> Tensor:
    """Fifty test pictures as the network takes them."""
    dataset = trained[1]
    assert dataset.test is not None
    raw = torch.stack([dataset.test.samples.read(index)[0] for index in range(50)])
    return dataset.preprocessing.finish(raw)


class Bench:
    """A live model without HTTP."""

    def __init__(self, store: ModelStore, name: str = "digits", max_running: int = 2) -> None:
        device = torch.device("cpu")
        self.batcher = Batcher(device)
        self.batcher.start()
        decoder = Decoder(
            num_threads=1, limits=PictureLimits(), max_pixels_in_flight=1 << 20, max_waiting=8
        )
        self.predictor = Predictor(
            load_version(store.resolve(name), device), self.batcher, decoder, LaneOptions()
        )
        self.explainer = Explainer(max_running)

    async def ask(self, inputs: Tensor, method: str, target: int, **options: Any) -> Explanation:
        question = Question(method=method, target=target, **options)  # type: ignore[arg-type]
        until = time.monotonic() + 60
        return await self.explainer.explain(self.predictor, inputs, question, until)

    async def close(self) -> None:
        self.explainer.close()
        await self.batcher.stop(1.0)


@pytest.mark.anyio
@pytest.mark.slow
async def test_integrated_gradients_sum_to_what_the_output_gained(
    trained: tuple[ModelStore, Dataset], pictures: Tensor
) -> None:
    bench = Bench(trained[0])
    network = bench.predictor.loaded.network
    for picture in pictures[:20]:
        with torch.no_grad():
            target = int(network(picture[None]).argmax())
            black = trained[1].preprocessing.finish(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
            gained = float((network(picture[None]) - network(black))[0, target])
        found = await bench.ask(picture[None], "integrated_gradients", target)
        assert found.completeness is not None
        assert found.completeness.error <= 0.01
        assert abs(float(found.attributions.sum()) - gained) <= 0.011 * abs(gained)
    await bench.close()


@pytest.mark.anyio
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
async def test_the_most_important_tenth_matters_more_than_a_random_one(
    trained: tuple[ModelStore, Dataset], pictures: Tensor, method: str
) -> None:
    bench = Bench(trained[0])
    network, generator = bench.predictor.loaded.network, torch.Generator().manual_seed(0)
    black = float(
        trained[1].preprocessing.finish(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))[0, 0, 0, 0]
    )
    lost: list[float] = []
    for picture in pictures:
        with torch.no_grad():
            logits = network(picture[None])[0]
        target = int(logits.argmax())
        found = await bench.ask(picture[None], method, target)
        importance = found.attributions.flatten()
        if method in ("saliency", "grad_cam"):  # a slope, and a place: only ink can be covered
            importance = importance * (picture.flatten() - black)
        drops = []
        for chosen in (importance.topk(6).indices, torch.randperm(64, generator=generator)[:6]):
            covered = picture.flatten().clone()
            covered[chosen] = black
            with torch.no_grad():
                drops.append(float(logits[target] - network(covered.view(1, 1, 8, 8))[0, target]))
        lost.append(drops[0] - drops[1])
    await bench.close()
    mean, error = float(np.mean(lost)), float(np.std(lost) / len(lost) ** 0.5)
    assert mean > 3 * error > 0, (mean, error)


@pytest.mark.anyio
@pytest.mark.slow
async def test_what_serves_is_never_touched(store: ModelStore) -> None:
    bench = Bench(store)
    network = bench.predictor.loaded.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for method in METHODS:
        await bench.ask(torch.rand(1, 1, 8, 8), method, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    await bench.close()


def test_a_twin_shares_its_weights_and_keeps_its_inputs(store: ModelStore) -> None:
    loaded = load_version(store.resolve("digits"), torch.device("cpu"))
    twin = twin_of(loaded)
    shared = zip(twin.parameters(), loaded.network.parameters(), strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in shared)
    assert twin is not loaded.network
    assert not any(getattr(module, "inplace", False) for module in twin.modules())


@pytest.mark.anyio
@pytest.mark.parametrize("method", METHODS)
async def test_no_piece_is_longer_than_a_batch(store: ModelStore, method: str) -> None:
    bench = Bench(store)
    rows: list[int] = []
    twin = bench.explainer._twin(bench.predictor)
    twin.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    await bench.ask(torch.rand(1, 1, 8, 8), method, 0, stride=1)
    assert 0 < max(rows) <= bench.predictor.lane.largest_batch
    assert method == "occlusion" or max(rows) <= 4
    await bench.close()


@pytest.mark.anyio
async def test_a_caller_who_leaves_ends_the_work(store: ModelStore) -> None:
    bench = Bench(store)
    twin = bench.explainer._twin(bench.predictor)
    twin.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    question = {"steps": 4096, "max_steps": 4096}
    task = asyncio.create_task(
        bench.ask(torch.rand(1, 1, 8, 8), "integrated_gradients", 0, **question)
    )
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(5):
        while bench.explainer._running:
            await asyncio.sleep(0.01)
    await bench.close()


@pytest.mark.anyio
async def test_time_that_is_up_is_an_answer_or_an_error(store: ModelStore) -> None:
    bench = Bench(store)
    inputs = torch.rand(1, 1, 8, 8)
    twin = bench.explainer._twin(bench.predictor)
    twin.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    asked = Question("integrated_gradients", 0, steps=1, max_steps=1)
    found = await bench.explainer.explain(bench.predictor, inputs, asked, time.monotonic() + 5)
    assert found.steps == 1
    long = Question("integrated_gradients", 0, steps=2048)
    with pytest.raises(DeadlineExceeded):
        await bench.explainer.explain(bench.predictor, inputs, long, time.monotonic() + 0.2)
    await bench.close()


@pytest.mark.anyio
async def test_too_many_at_once_are_refused(store: ModelStore) -> None:
    bench = Bench(store, max_running=1)
    bench.explainer._twin(bench.predictor).register_forward_pre_hook(lambda *_: time.sleep(0.05))
    first = asyncio.create_task(bench.ask(torch.rand(1, 1, 8, 8), "saliency", 0))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="send this again later"):
        await bench.ask(torch.rand(1, 1, 8, 8), "saliency", 0)
    await first
    await bench.close()


@pytest.mark.anyio
async def test_a_network_without_a_convolution_has_no_grad_cam(tmp_path: Path) -> None:
    from tests.publishing import writing

    store = ModelStore(tmp_path / "models")
    store.publish("plain", writing(0))
    bench = Bench(store, "plain")
    with pytest.raises(BadInput, match="has none; take integrated_gradients"):
        await bench.ask(torch.rand(1, 2), "grad_cam", 0)
    for method in ("saliency", "integrated_gradients", "occlusion"):
        found = await bench.ask(torch.rand(1, 2), method, 1)
        assert found.attributions.shape == (2,)
    await bench.close()


@pytest.mark.changes_nothing
def test_json_says_how_complete_it_is(client: TestClient, digit_png: bytes) -> None:
    answer = client.post(URL, files={"file": digit_png}, data={"target": "7"})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["target"]["label"] == "7"
    assert document["completeness"]["error"] <= 0.01
    assert np.array(document["attributions"]).shape == (1, 8, 8) == tuple(document["shape"])


def test_the_predicted_class_is_explained_unless_another_is_named(
    client: TestClient, digit_png: bytes
) -> None:
    headers = {"content-type": "image/png"}
    predicted = client.post("/v1/models/digits/predict", content=digit_png, headers=headers).json()
    document = client.post(URL, content=digit_png, headers=headers).json()
    best = predicted["predictions"][0]
    assert document["target"]["label"] == document["predicted"] == best["label"]
    assert document["target"]["probability"] == pytest.approx(best["probability"])


@pytest.mark.changes_nothing
@pytest.mark.parametrize("method", METHODS)
def test_a_picture_under_its_heat_map(client: TestClient, digit_png: bytes, method: str) -> None:
    headers = {"accept": "image/png", "content-type": "image/png"}
    answer = client.post(URL, content=digit_png, params={"method": method}, headers=headers)
    assert answer.headers["content-type"] == "image/png", answer.text
    picture = Image.open(io.BytesIO(answer.content), formats=["PNG"])
    assert (picture.size, picture.mode) == ((256, 256), "RGB")
    pixels = np.asarray(picture, dtype=int)
    assert (pixels.max(-1) - pixels.min(-1)).max() > 50, "nothing is coloured"


def test_raw_numbers_as_the_open_inference_protocol_sends_them(
    client: TestClient, digit_png: bytes
) -> None:
    from tritonclient.http import InferResult

    headers = {"accept": "application/octet-stream", "content-type": "image/png"}
    answer = client.post(URL, content=digit_png, headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    result = InferResult.from_response_body(answer.content, header_length=length)
    plain = client.post(URL, content=digit_png, headers={"content-type": "image/png"}).json()
    np.testing.assert_allclose(
        result.as_numpy("attributions"), np.array(plain["attributions"]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.changes_nothing
def test_tensors_and_base64_are_explained_alike(client: TestClient, digit_png: bytes) -> None:
    import base64

    picture = client.post(URL, json={"image": base64.b64encode(digit_png).decode()}).json()
    pixels = np.asarray(Image.open(io.BytesIO(digit_png), formats=["PNG"]).resize((8, 8), 4))
    numbers = ((pixels / 255.0 - 0.5) / 0.25).reshape(1, 1, 8, 8)
    tensor = client.post(URL, json={"inputs": numbers.tolist(), "baseline": "black"}).json()
    np.testing.assert_allclose(
        picture["attributions"], tensor["attributions"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"method": "magic"}, 422, "method"),
        ({"target": "ten"}, 422, "target"),
        ({"target": 10}, 422, "target"),
        ({"steps": 0}, 422, "steps"),
        ({"steps": 10**9}, 422, "steps"),
        ({"window": 9, "method": "occlusion"}, 422, "window"),
        ({"window": 2, "stride": 3, "method": "occlusion"}, 422, "stride"),
        ({"colour": "red"}, 422, None),
        ({"top_k": 3}, 422, "top_k"),
        ({"baseline": "grey"}, 422, "baseline"),
    ],
)
def test_bad_options_name_themselves(
    client: TestClient, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = client.post(URL, json={"inputs": np.zeros((1, 1, 8, 8)).tolist()} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


@pytest.mark.changes_nothing
def test_unknown_options_in_the_query_and_many_inputs(client: TestClient, digit_png: bytes) -> None:
    headers = {"content-type": "image/png"}
    answer = client.post(URL, content=digit_png, headers=headers, params={"colour": "red"})
    assert answer.status_code == 422
    assert "'colour' is no option; known are method" in answer.json()["error"]["message"]
    two = [("file", digit_png), ("file", digit_png)]
    assert "one input is explained" in client.post(URL, files=two).json()["error"]["message"]


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("*/*", "application/json"),
        ("image/png", "image/png"),
        ("text/html,image/*;q=0.8,*/*;q=0.5", "image/png"),
        ("application/json;q=0.2, application/octet-stream", "application/octet-stream"),
        ("image/png;q=0, */*;q=0.1", "application/json"),
        ("image/png;q=much", "application/json"),
        ("text/html", "application/json"),
        ("", "application/json"),
    ],
)
def test_accept_chooses_the_answer(accept: str, wanted: str) -> None:
    from app.api.explain import preferred_type

    assert preferred_type(accept) == wanted


def test_undone_gives_the_picture_back(trained: tuple[ModelStore, Dataset]) -> None:
    preprocessing = trained[1].preprocessing
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    again = preprocessing.undone(preprocessing.finish(pixels))
    assert torch.equal(again.round().to(torch.uint8), pixels)


@pytest.mark.anyio
@pytest.mark.slow
async def test_a_residual_network_with_relus_in_place_is_explained(tmp_path: Path) -> None:
    from models import checkpoint, networks
    from models.backbones import picture_preprocessing
    from models.manifest import Manifest, NetworkSpec

    torch.manual_seed(0)
    spec = NetworkSpec(name="torchvision/resnet18", options={"num_classes": 3})
    network = networks.build(spec.name, spec.options).eval()
    steps = picture_preprocessing(64, 64, [0.5] * 3, [0.25] * 3)
    manifest = Manifest(network=spec, preprocessing=steps, labels=("a", "b", "c"))
    store = ModelStore(tmp_path / "models")
    store.publish("parts", lambda folder: checkpoint.save(folder, network, manifest))
    bench = Bench(store, "parts")
    for method in METHODS:
        found = await bench.ask(torch.rand(1, 3, 64, 64), method, 2, max_steps=64)
        assert found.attributions.shape == (3, 64, 64)
        assert float(found.attributions.abs().sum()) > 0
    await bench.close()
