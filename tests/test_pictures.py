"""Pictures that wait for their turn as they came: whose row is whose, and who fails alone."""

import asyncio
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.types import Message

from app.api.predict import PredictRoute
from app.engine.batcher import Batcher, LaneOptions
from app.engine.crew import Crew
from app.engine.decoding import IN_TURN_PICTURES, Decoder
from app.engine.live import LiveModels
from app.engine.loading import LoadedVersion, load_version
from app.engine.pictures import Pictures
from app.engine.predictor import Prediction, Predictor
from app.errors import QueueFull
from models import resizing
from models.picture import PictureError, PictureLimits
from models.store import ModelStore

pytestmark = pytest.mark.anyio

CPU = torch.device("cpu")


def png(seed: int, side: int = 96) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def torn(seed: int) -> bytes:
    """Its header promises more than follows."""
    return png(seed)[:600]


def options(**others: int) -> LaneOptions:
    return LaneOptions(max_batch_items=4, inline_below_ms=0, **others)


class Bench:
    """One live model on a thread, without HTTP."""

    def __init__(self, store: ModelStore, lane: LaneOptions) -> None:
        self.batcher = Batcher(CPU)
        self.decoder = Decoder(
            num_threads=2, limits=PictureLimits(), max_pixels_in_flight=1 << 22, max_waiting=64
        )
        self.store, self.lane = store, lane

    def serve(self, loaded: LoadedVersion) -> Predictor:
        return Predictor(loaded, self.batcher, self.decoder, self.lane)

    def predictor(self) -> Predictor:
        return self.serve(load_version(self.store.resolve("digits"), CPU))

    @contextlib.asynccontextmanager
    async def busy(self, predictor: Predictor) -> AsyncIterator[None]:
        """The device does something else inside, so that all who come meanwhile wait."""
        begun, over = threading.Event(), threading.Event()

        def wait() -> None:
            begun.set()
            over.wait(20)

        call = asyncio.ensure_future(predictor.lane.call(wait))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        try:
            yield
            await asyncio.sleep(0.01)
        finally:
            over.set()
        await call


@contextlib.asynccontextmanager
async def started(store: ModelStore, lane: LaneOptions | None = None) -> AsyncIterator[Bench]:
    bench = Bench(store, lane or options())
    bench.batcher.start()
    try:
        yield bench
    finally:
        await bench.batcher.stop(5)
        bench.decoder.close()


def in_a_minute() -> float:
    return time.monotonic() + 60


async def ask(predictor: Predictor, *pictures: bytes) -> Prediction:
    rows = await predictor.rows_of(pictures, in_a_minute())
    assert isinstance(rows, Pictures), "they wait for their turn"
    return await predictor.predict(rows, in_a_minute())


async def decoded_first(predictor: Predictor, *pictures: bytes) -> torch.Tensor:
    return (
        await predictor.predict(await predictor.decode(pictures, in_a_minute()), in_a_minute())
    ).logits


async def test_they_are_answered_as_if_they_had_been_decoded_first(store: ModelStore) -> None:
    async with started(store) as bench:
        predictor = bench.predictor()
        numbers = await predictor.decode([png(7)], in_a_minute())
        expected = [await decoded_first(predictor, png(seed)) for seed in range(3)]
        async with bench.busy(predictor):
            asked = [asyncio.ensure_future(ask(predictor, png(seed))) for seed in range(3)]
            as_numbers = asyncio.ensure_future(predictor.predict(numbers, in_a_minute()))
        answers = await asyncio.gather(*asked)
        torch.testing.assert_close([one.logits for one in answers], expected)
        assert {one.batch_size for one in answers} == {4}, "they rode together, with the numbers"
        torch.testing.assert_close(
            (await as_numbers).logits, await decoded_first(predictor, png(7))
        )
        assert all(one.decode_ms > 0 for one in answers)


async def test_all_share_in_a_picture_that_comes_alone(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resizing, "BAND_PIXELS", 1024)
    shared: list[int] = []
    share = Crew.share

    def told(crew: Crew, function: Callable[[Any], Any], pieces: Sequence[Any]) -> list[Any]:
        shared.append(len(pieces))
        return share(crew, function, pieces)

    async with started(store) as bench:
        predictor = bench.predictor()
        before = [(await ask(predictor, png(seed))).logits for seed in range(2)]
        monkeypatch.setattr(Crew, "share", told)
        assert torch.equal((await ask(predictor, png(0))).logits, before[0])
        assert torch.equal(await decoded_first(predictor, png(1)), before[1])
        assert shared == [2, 2]
        await ask(predictor, png(0), png(1))
        await decoded_first(predictor, png(0), png(1))
        assert shared == [2, 2], "several fill the cores as they are"


async def test_one_that_cannot_be_read_fails_alone(store: ModelStore) -> None:
    async with started(store) as bench:
        predictor = bench.predictor()
        async with bench.busy(predictor):
            sent = [(png(1),), (torn(2),), (png(3), torn(4)), (png(5),)]
            asked = [asyncio.ensure_future(ask(predictor, *pictures)) for pictures in sent]
        first, alone, second_of_two, last = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(alone, PictureError)
        assert "damaged" in str(alone)
        assert isinstance(second_of_two, PictureError)
        assert str(second_of_two).startswith("picture 2 of 2: ")
        for answer, seed in ((first, 1), (last, 5)):
            assert isinstance(answer, Prediction)
            torch.testing.assert_close(answer.logits, await decoded_first(predictor, png(seed)))


async def test_a_batch_of_which_none_can_be_read_computes_nothing(store: ModelStore) -> None:
    async with started(store) as bench:
        predictor = bench.predictor()
        for _ in range(2):
            with pytest.raises(PictureError):
                await ask(predictor, torn(1))
        assert predictor.statistics.execution_count == 0
        assert predictor.is_idle
        assert (await ask(predictor, png(1))).batch_size == 1


async def test_more_than_a_batch_are_split_and_come_back_in_order(store: ModelStore) -> None:
    async with started(store) as bench:
        predictor = bench.predictor()
        pictures = [png(seed) for seed in range(11)]
        answer = await ask(predictor, *pictures)
        for seed, logits in enumerate(answer.logits):
            torch.testing.assert_close(logits[None], await decoded_first(predictor, png(seed)))
        with pytest.raises(PictureError, match="picture 10 of 11: "):
            await ask(predictor, *pictures[:9], torn(9), pictures[10])
        assert predictor.is_idle, "the rest of its rows waits no more"


async def test_large_ones_many_and_bad_headers_do_not_wait(store: ModelStore) -> None:
    async with started(store) as bench:
        predictor = bench.predictor()
        for pictures in ([png(1, side=1600)], [png(1)] * (IN_TURN_PICTURES + 1)):
            rows = await predictor.rows_of(pictures, in_a_minute())
            assert isinstance(rows, torch.Tensor)
        with pytest.raises(PictureError, match="picture 2 of 2: the picture is not a JPEG"):
            await predictor.rows_of([png(1), b"GIF89a"], in_a_minute())


async def test_a_request_for_which_there_is_no_place_is_not_read(store: ModelStore) -> None:
    async with started(store, options(max_queue_items=16)) as bench:
        live = LiveModels(store, lambda version: load_version(version, CPU), bench.serve)
        route = PredictRoute(live, max_inputs=8, max_body_bytes=1 << 20, request_timeout_ms=60_000)
        predictor = await live.get("digits")

        async def receive() -> Message:
            raise AssertionError("its body was asked for")

        async def send(message: Message) -> None:
            raise AssertionError(f"it was answered: {message}")

        scope = {"type": "http", "headers": [], "query_string": b""}
        scope["path_params"] = {"model": "digits"}
        async with bench.busy(predictor):
            waits = asyncio.ensure_future(ask(predictor, *[png(1)] * 16))
            await asyncio.sleep(0.01)
            with pytest.raises(QueueFull):
                await route(scope, receive, send)
        await waits
        await live.stop()
