"""A live version on a device that computes by itself: recorded, proven, asked in every way.

The device is `LateStreams` of `tests/test_pipeline.py`, or a real GPU where there is one.
"""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from conftest import publish_cnn
from test_pipeline import LateStreams, recorder

from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.decoding import Decoder
from app.engine.device_error import is_device_lost
from app.engine.live import LiveModels
from app.engine.loading import load_everywhere, load_version
from app.engine.pipeline import Accelerator, Pipeline
from app.engine.predictor import Predictor
from app.errors import DeviceLost, LoadFailed
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.picture import PictureLimits
from models.preprocessing import Preprocessing
from models.store import ModelStore

pytestmark = pytest.mark.anyio

CPU = torch.device("cpu")
PLACES = [
    pytest.param("late"),
    pytest.param("two late"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def places(kind: str) -> list[Accelerator | torch.device]:
    if kind == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("this machine has no CUDA device")
        return [torch.device("cuda", 0)]
    count = 2 if kind == "two late" else 1
    return [Accelerator(CPU, LateStreams(seed), recorder) for seed in range(count)]


class Bench:
    """A store, a batcher and live models, without HTTP."""

    def __init__(self, store: ModelStore, where: list[Accelerator | torch.device]) -> None:
        self.broken: list[BaseException] = []
        self.batcher = Batcher(*where, on_broken=self.broken.append)
        decoder = Decoder(
            num_threads=1, limits=PictureLimits(), max_pixels_in_flight=1 << 20, max_waiting=8
        )
        options = LaneOptions(max_batch_items=4)
        self.live = LiveModels(
            store,
            lambda version: load_everywhere(version, self.batcher.devices, self.batcher.lost),
            lambda loaded: Predictor(loaded, self.batcher, decoder, options),
            on_lost=self.batcher.lose,
        )

    async def stop(self) -> None:
        await self.live.stop()
        await self.batcher.stop(5)


@pytest.fixture(params=PLACES)
async def bench(request: pytest.FixtureRequest, store: ModelStore) -> AsyncIterator[Bench]:
    bench = Bench(store, places(request.param))
    bench.batcher.start()
    yield bench
    await bench.stop()


async def test_pixels_numbers_and_pictures_are_answered_alike(
    bench: Bench, store: ModelStore, digit_png: bytes
) -> None:
    predictor = await bench.live.get("digits")
    deadline = time.monotonic() + 60
    plain = load_version(store.resolve("digits"), CPU)
    pixels = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    numbers = plain.manifest.preprocessing.finish(pixels)
    with torch.inference_mode():
        expected = plain.network(numbers)
    picture = await predictor.decode([digit_png], deadline)
    assert picture.dtype == torch.uint8
    await predictor.predict(picture, deadline)
    for batch in (await predictor.from_pixels(pixels), numbers):
        answer = await predictor.predict(batch, deadline)
        torch.testing.assert_close(answer.logits, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(predictor.finished(batch), numbers)
        values, labels = answer.best(3)
        assert torch.equal(labels, answer.probabilities.topk(3).indices)
        assert torch.equal(values, answer.probabilities.topk(3).values)
        assert answer.best(100)[0].shape == (3, 10)
    assert predictor.statistics.inference_count == 7
    assert predictor.num_waiting_rows == 0
    assert predictor.is_idle


async def test_every_batch_size_of_both_ways_was_tried(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    predictor = await bench.live.get("digits")
    for lane in predictor.lanes:
        for run in lane.runs:
            assert isinstance(run, Pipeline)
            assert run.recordings.keys() <= {1, 2, 4}
    told = [one for one in caplog.messages if " rows is " in one]
    assert len(told) == 3 * 2 * len(bench.batcher.devices), caplog.messages


async def test_a_second_version_beside_the_first(bench: Bench, store: ModelStore) -> None:
    await bench.live.get("digits")
    publish_cnn(store, "others", seed=2)
    other = await bench.live.get("others")
    rows = torch.zeros((9, 1, 8, 8))
    answers = await asyncio.gather(*(other.predict(rows, time.monotonic() + 60) for _ in range(4)))
    assert all(torch.equal(one.logits, answers[0].logits[:1].expand(9, -1)) for one in answers) or (
        torch.allclose(answers[0].logits, answers[1].logits, atol=1e-4)
    )


@pytest.mark.gpu
async def test_memory_comes_back_when_a_version_goes(store: ModelStore) -> None:
    where = places("cuda")
    bench = Bench(store, where)
    bench.batcher.start()
    await bench.live.get("digits")
    publish_cnn(store, "others", seed=2)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved(0)
    for _ in range(3):
        await bench.live.load("others")
        await bench.live.unload("others")
        gc.collect()
        await bench.batcher.call(lambda: None)
        await asyncio.sleep(0.2)
    assert torch.cuda.memory_reserved(0) <= before + (4 << 20)
    await bench.stop()


# A device that is lost while a version is loaded


class Breaking(torch.nn.Module):
    """Whose forward is the last that a device hears."""

    error: type[RuntimeError] = torch.AcceleratorError
    sentence = "CUDA error: an illegal memory access was encountered"
    num_good = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Breaking.num_good:
            Breaking.num_good -= 1
            return self.layer(x)
        raise self.error(self.sentence)


@pytest.fixture
def breaking(tmp_path: Path) -> ModelStore:
    name = f"{__name__}:Breaking"
    manifest = Manifest(
        network=NetworkSpec(name=name, options={}),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [1]}]),
        labels=("no", "yes"),
    )
    store = ModelStore(tmp_path / "breaking")
    network = networks.build(name, {})
    store.publish("breaking", lambda folder: checkpoint.save(folder, network, manifest))
    Breaking.error, Breaking.num_good = torch.AcceleratorError, 0
    Breaking.sentence = "CUDA error: an illegal memory access was encountered"
    return store


async def test_a_device_lost_in_loading_counts_as_lost(breaking: ModelStore) -> None:
    bench = Bench(breaking, [CPU])
    bench.batcher.start()
    with pytest.raises(DeviceLost):
        await bench.live.get("breaking")
    assert bench.batcher.broken
    assert [type(one) for one in bench.broken] == [torch.AcceleratorError]
    await bench.stop()


async def test_the_other_device_loads_it_then(breaking: ModelStore) -> None:
    bench = Bench(breaking, [CPU, CPU])
    bench.batcher.start()
    with pytest.raises(DeviceLost):
        await bench.live.get("breaking")
    assert bench.batcher.lost == {0}
    Breaking.num_good = 1000
    predictor = await bench.live.get("breaking")
    answer = await predictor.predict(torch.zeros(1, 1), time.monotonic() + 60)
    assert answer.logits.shape == (1, 2)
    await bench.stop()


async def test_too_little_memory_is_the_versions_own_failure(breaking: ModelStore) -> None:
    Breaking.error, Breaking.sentence = torch.OutOfMemoryError, "CUDA out of memory"
    bench = Bench(breaking, [CPU])
    bench.batcher.start()
    with pytest.raises(LoadFailed, match="does not fit into the memory of cpu"):
        await bench.live.get("breaking")
    assert not bench.batcher.broken
    await bench.stop()


def test_running_out_of_memory_loses_no_device() -> None:
    assert not is_device_lost(torch.OutOfMemoryError("CUDA out of memory"), CPU)
