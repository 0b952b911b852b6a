"""A device that computes by itself: nothing is read too early, written too soon, or kept too long.

There is no GPU in these tests. `LateStreams` does what it is given only when somebody waits for
it, and then in an order of its own choice that keeps the marks: what a stream was not told to
wait for happens too late or too early here, as it may there.
"""

import asyncio
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.pipeline import Accelerator, Pipeline
from app.engine.slots import Ring
from app.engine.streams import HostStreams, Stream
from app.errors import DeviceLost, ForwardFailed

CPU = torch.device("cpu")
T = TypeVar("T")


class LateStreams:
    """Streams that run as late as they may, and in any order that their marks allow."""

    def __init__(self, seed: int = 0) -> None:
        self.choice = random.Random(seed)
        self.given: dict[str, list[Callable[[], None] | int]] = {
            "upload": [],
            "compute": [],
            "download": [],
        }
        self.passed: set[int] = set()
        self.num_marks = 0

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        self.given[stream].append(work)

    def made(self, stream: Stream, work: Callable[[], T]) -> T:
        self.settle(self.mark(stream))
        return work()

    def mark(self, stream: Stream) -> int:
        self.num_marks += 1
        number = self.num_marks
        self.given[stream].append(lambda: self.passed.add(number))
        return number

    def wait(self, stream: Stream, mark: int) -> None:
        self.given[stream].append(mark)

    def settle(self, mark: int) -> None:
        while mark not in self.passed:
            self.step()

    def rest(self) -> None:
        while any(self.given.values()):
            self.step()

    def step(self) -> None:
        """One piece of one stream that is not waiting."""
        ready = [one for one in self.given.values() if one and self.may_run(one[0])]
        assert ready, "the streams wait for each other"
        work = self.choice.choice(ready).pop(0)
        if callable(work):
            work()

    def may_run(self, work: Callable[[], None] | int) -> bool:
        return callable(work) or work in self.passed


@dataclass
class Replay:
    """A recording as a GPU makes it: fixed memory in, fixed memory out."""

    inputs: Tensor
    outputs: dict[str, Tensor]
    respond: Callable[[Tensor], dict[str, Tensor]]

    def replay(self) -> None:
        for name, output in self.respond(self.inputs).items():
            self.outputs[name].copy_(output)


def recorder() -> Callable[..., Replay]:
    return lambda respond, rows: Replay(rows.clone(), dict(respond(rows)), respond)


def doubled(rows: Tensor) -> dict[str, Tensor]:
    return {"logits": rows.float() * 2, "sum": rows.float().sum(1)}


def rows(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(-1, 1).repeat(1, 300)


def late(seed: int = 0) -> Accelerator:
    return Accelerator(CPU, LateStreams(seed), recorder)


@pytest.mark.parametrize("seed", range(20))
def test_two_batches_fly_at_once_and_come_back_as_they_went(seed: int) -> None:
    pipeline = Pipeline(doubled, late(seed))
    with torch.inference_mode():
        for number in range(0, 40, 4):
            first = pipeline.start([rows(number), rows(number + 1)], 2)
            second = pipeline.start([rows(number + 2, number + 3)], 2)
            for flight, start in ((first, number), (second, number + 2)):
                answers, _ = pipeline.land(flight)
                assert answers["logits"][:, 0].tolist() == [2.0 * start, 2.0 * start + 2]
                assert answers["sum"].tolist() == [300.0 * start, 300.0 * (start + 1)]


@pytest.mark.parametrize("seed", range(20))
def test_a_recording_is_not_overwritten_while_it_is_read(seed: int) -> None:
    pipeline = Pipeline(doubled, late(seed))
    with torch.inference_mode():
        pipeline.recordings[2] = recorder()(doubled, rows(0, 0))
        flights = [pipeline.start([rows(number, 9)], 2) for number in range(3)]
        found = [pipeline.land(flight)[0]["logits"][:, 0].tolist() for flight in flights]
    assert found == [[2.0 * number, 18.0] for number in range(3)]


def test_answers_outlive_their_slot() -> None:
    pipeline = Pipeline(doubled, late())
    with torch.inference_mode():
        kept = pipeline(rows(7))
        for number in range(6):
            pipeline(rows(number))
    assert kept["logits"][0, 0] == 14.0


def test_more_batches_than_slots_are_an_error_of_ours() -> None:
    pipeline = Pipeline(doubled, late())
    with torch.inference_mode():
        flights = [pipeline.start([rows(1)], 1) for _ in range(3)]
        with pytest.raises(RuntimeError, match="more than 3 batches"):
            pipeline.start([rows(1)], 1)
        for flight in flights:
            pipeline.land(flight)
        assert pipeline(rows(1))["logits"][0, 0] == 2.0


def test_a_batch_that_fails_gives_its_slot_back() -> None:
    def fails(batch: Tensor) -> dict[str, Tensor]:
        raise ValueError(f"not with {len(batch)} rows")

    pipeline = Pipeline(fails, Accelerator(CPU, HostStreams()))
    for _ in range(5):
        with pytest.raises(ValueError, match="not with 1 rows"):
            pipeline.start([rows(1)], 1)


def test_memory_grows_to_the_largest_batch_and_no_further() -> None:
    ring = Ring(CPU, HostStreams())
    sizes = []
    for num_rows in (1, 8, 2, 8, 4, 8, 1):
        slot = ring.take()
        here, there = slot.inputs(num_rows, rows(0))
        sizes.append(slot._in.host.numel())
        assert here.shape == there.shape == (num_rows, 300)
        slot.release()
    assert max(sizes) == 8 * 300


def test_what_proves_itself_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(doubled, Accelerator(CPU, HostStreams(), recorder))
    monkeypatch.setattr(Pipeline, "_best_s", lambda *_: 1.0)
    assert pipeline.record(rows(1, 2)) == "is recorded"
    replays: list[int] = []
    replay = pipeline.recordings[2].replay
    monkeypatch.setattr(Replay, "replay", lambda _: (replays.append(1), replay()))
    with torch.inference_mode():
        assert pipeline(rows(3, 4))["logits"][:, 0].tolist() == [6.0, 8.0]
        assert pipeline(rows(3))["logits"][:, 0].tolist() == [6.0]
    assert len(replays) == 1


def test_a_recording_that_answers_otherwise_is_dropped() -> None:
    def wrong() -> Callable[..., Replay]:
        return lambda _, rows: recorder()(lambda batch: {"logits": batch.float() * 3}, rows)

    pipeline = Pipeline(doubled, Accelerator(CPU, HostStreams(), wrong))
    assert "changes golden outputs" in pipeline.record(rows(1, 2))
    assert not pipeline.recordings


def test_a_recording_that_is_slower_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0])
    monkeypatch.setattr(Pipeline, "_best_s", lambda *_: next(seconds))
    pipeline = Pipeline(doubled, Accelerator(CPU, HostStreams(), recorder))
    assert "is slower" in pipeline.record(rows(1, 2))
    assert not pipeline.recordings


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out"),
    ],
)
def test_what_cannot_be_recorded_runs_eagerly(error: RuntimeError, words: str) -> None:
    def refuses(*_: object) -> Replay:
        raise error

    pipeline = Pipeline(doubled, Accelerator(CPU, HostStreams(), lambda: refuses))
    assert words in pipeline.record(rows(1))
    with torch.inference_mode():
        assert pipeline(rows(5))["logits"][0, 0] == 10.0


def test_a_device_that_is_lost_over_a_recording_is_told() -> None:
    def breaks(*_: object) -> Replay:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    pipeline = Pipeline(doubled, Accelerator(CPU, HostStreams(), lambda: breaks))
    with pytest.raises(torch.AcceleratorError):
        pipeline.record(rows(1))


def test_recordings_go_with_their_model() -> None:
    pipeline = Pipeline(doubled, Accelerator(CPU, HostStreams(), recorder))
    with torch.inference_mode():
        pipeline.recordings[1] = recorder()(doubled, rows(1))
    gone = weakref.ref(pipeline.recordings[1].inputs)
    del pipeline
    gc.collect()
    assert gone() is None


# Behind the batcher


@contextmanager
def batcher_of(*accelerators: Accelerator | torch.device) -> Iterator[Batcher]:
    batcher = Batcher(*accelerators)
    batcher.start()
    yield batcher


BYTES = LaneOptions(max_batch_items=8, dtype=torch.uint8)


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(5))
async def test_everybody_gets_their_own_rows_back(seed: int) -> None:
    with batcher_of(late(seed)) as batcher:
        run = Pipeline(doubled, batcher.accelerators[0])
        lane = batcher.open_lane("doubles", run, BYTES, row_shape=(300,))
        counts = random.Random(seed).choices(range(1, 20), k=60)
        asked = [rows(*range(start, start + count)) for start, count in enumerate(counts)]
        answers = await asyncio.gather(*(lane.submit(one) for one in asked))
        for one, answer in zip(asked, answers, strict=True):
            assert torch.equal(answer.outputs["logits"], one.float() * 2)
        assert lane.statistics.num_rows == sum(counts)
        await batcher.stop(5.0)


@pytest.mark.anyio
async def test_a_second_batch_starts_behind_a_first_only_if_it_is_full() -> None:
    flying, most = [], []
    accelerator = late()

    class Counting(Pipeline):
        def start(self, rows, num_rows):  # type: ignore[no-untyped-def]
            flying.append(num_rows)
            most.append(list(flying))
            return super().start(rows, num_rows)

        def land(self, flight):  # type: ignore[no-untyped-def]
            flying.pop(0)
            return super().land(flight)

    with batcher_of(accelerator) as batcher:
        lane = batcher.open_lane("c", Counting(doubled, accelerator), BYTES, row_shape=(300,))
        await asyncio.gather(*(lane.submit(rows(number)) for number in range(100)))
        await batcher.stop(5.0)
    assert any(len(one) == 2 for one in most)
    assert all(one[1] == 8 for one in most if len(one) == 2)
    assert max(map(len, most)) == 2


@pytest.mark.anyio
async def test_a_forward_that_fails_fails_its_batch_alone() -> None:
    def moody(batch: Tensor) -> dict[str, Tensor]:
        if (batch == 13).any():
            raise ValueError("not 13")
        return doubled(batch)

    with batcher_of(Accelerator(CPU, HostStreams())) as batcher:
        run = Pipeline(moody, batcher.accelerators[0])
        lane = batcher.open_lane("moody", run, BYTES, row_shape=(300,))
        with pytest.raises(ForwardFailed):
            await lane.submit(rows(13))
        assert (await lane.submit(rows(14))).outputs["logits"][0, 0] == 28.0
        await batcher.stop(5.0)


@pytest.mark.anyio
async def test_memory_that_runs_out_halves_the_batch() -> None:
    def small(batch: Tensor) -> dict[str, Tensor]:
        if len(batch) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return doubled(batch)

    with batcher_of(Accelerator(CPU, HostStreams())) as batcher:
        run = Pipeline(small, batcher.accelerators[0])
        lane = batcher.open_lane("small", run, BYTES, row_shape=(300,))
        answer = await lane.submit(rows(*range(8)))
        assert answer.outputs["logits"][:, 0].tolist() == [2.0 * number for number in range(8)]
        assert lane.largest_batch == 4
        await batcher.stop(5.0)


@pytest.mark.anyio
async def test_a_device_that_fails_while_it_flies_is_lost() -> None:
    class Failing(LateStreams):
        def settle(self, mark: int) -> None:
            raise torch.AcceleratorError(f"CUDA error: device-side assert triggered at {mark}")

    causes: list[BaseException] = []
    batcher = Batcher(Accelerator(CPU, Failing()), on_broken=causes.append)
    batcher.start()
    run = Pipeline(doubled, batcher.accelerators[0])
    lane = batcher.open_lane("lost", run, BYTES, row_shape=(300,))
    asked = [lane.submit(rows(number)) for number in range(30)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(one, DeviceLost) for one in results), results
    assert len(causes) == 1
    await batcher.stop(5.0)
