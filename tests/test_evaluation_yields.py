"""How far an evaluation may delay those who predict: bounds of its making, whatever the machine."""

import asyncio
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_evaluation import digits, engine, found, trained_store

from app.engine.schedule import LOWEST
from app.engine.short_slices import SLICE_S
from app.evaluation import asking as asking_module
from app.evaluation.sitting import (
    GENTLE_MS,
    GENTLE_SHARE,
    ITEM_BATCHES,
    NICENESS,
    Sitting,
    step_back,
)
from app.main import Engine

__all__ = ["engine", "trained_store"]
pytestmark = pytest.mark.anyio
ROW = torch.rand(1, 1, 8, 8)


@dataclass(frozen=True)
class Asked:
    """One request of the evaluation, as its predictor saw it."""

    began: float
    ended: float
    num_rows: int
    expected_ms: float
    compute_ms: float
    in_flight: int


async def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What an evaluation asks for from now on."""
    predictor = await engine.live.get("digits", "2")
    predict, asked, on_the_way = type(predictor).predict, [], []

    async def watch(self: Any, batch: torch.Tensor, deadline: float, priority: int = 0) -> Any:
        if priority != LOWEST:
            return await predict(self, batch, deadline, priority)
        began, expected_ms = time.monotonic(), self.lane.expected_ms(len(batch))
        on_the_way.append(batch)
        answer = await predict(self, batch, deadline, priority)
        in_flight = len(on_the_way)
        on_the_way.pop()
        ended = time.monotonic()
        asked.append(Asked(began, ended, len(batch), expected_ms, answer.compute_ms, in_flight))
        return answer

    monkeypatch.setattr(type(predictor), "predict", watch)
    return asked


async def test_while_others_ask_one_short_batch_is_followed_by_a_long_rest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = await engine.live.get("digits", "2")
    asked = await watched(engine, monkeypatch)
    # A machine may be through with all before the evaluation can notice that it is not alone.
    for _ in range(5):
        asked.clear()
        task = asyncio.create_task(found(engine, digits(part="train")))
        while not task.done():
            await predictor.predict(ROW, time.monotonic() + 10)
            await asyncio.sleep(0.005)
        assert (await task).findings.num_offered > 1000
        gentle = [one for one in asked if one.began > asked[0].ended + 0.5]
        if len(gentle) > 5:
            break
    assert len(gentle) > 5
    assert {one.in_flight for one in gentle} == {1}
    alone_ms = predictor.lane.expected_ms(1)
    assert all(one.expected_ms <= 2 * max(GENTLE_MS, alone_ms) for one in gentle)
    rests = [
        (after.began - before.ended) / (before.compute_ms / 1000)
        for before, after in zip(gentle, gentle[1:], strict=False)
    ]
    assert min(rests) > 0.9 * (1 / GENTLE_SHARE - 1)


async def test_alone_it_asks_for_a_few_batches_and_whoever_comes_goes_between_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = (await engine.live.get("digits", "2")).lane
    turns, order = lane._turns, []
    assert turns.runs is not None
    (run,) = turns.runs

    def slowly(batch: torch.Tensor) -> Any:
        order.append(len(batch))
        time.sleep(0.02)
        return run(batch)

    monkeypatch.setattr(turns, "runs", (slowly,))
    predictor = await engine.live.get("digits", "2")
    rows = ROW.repeat(ITEM_BATCHES * lane.largest_batch, 1, 1, 1)
    many = [predictor.predict(rows, time.monotonic() + 30, LOWEST) for _ in range(2)]
    tasks = [asyncio.create_task(one) for one in many]
    for _ in range(5):
        await asyncio.sleep(0.03)
        before = len(order)
        await predictor.predict(ROW, time.monotonic() + 10)
        position = order.index(1, before - 1 if before else 0)
        assert position - before <= 1  # behind the batch that ran, and one that was being taken
        order[position] = 0
    await asyncio.gather(*tasks)
    assert max(order) == lane.largest_batch


async def test_the_interpreter_is_given_away_soon_while_it_evaluates(engine: Engine) -> None:
    before, seen = sys.getswitchinterval(), []
    await found(engine, digits(), lambda _: seen.append(sys.getswitchinterval()))
    assert seen
    assert max(seen) == pytest.approx(SLICE_S)
    assert sys.getswitchinterval() == before


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no niceness of its own")
async def test_threads_that_decode_step_back_and_no_other_does() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    here = niceness()
    with ThreadPoolExecutor(1, initializer=step_back) as threads:
        assert threads.submit(niceness).result() == max(here, NICENESS)
        assert threads.submit(torch.get_num_threads).result() == 1
    assert niceness() == here


@dataclass
class Busy:
    """The way to predictors that others ask all the time."""

    left_s: float
    is_quiet: bool = False
    rests: list[float] = field(default_factory=list)

    def folder_of_run(self, run: str | None) -> None:
        """Nothing was answered out of fold."""

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)


async def test_the_rests_leave_half_of_the_time_to_the_work(engine: Engine) -> None:
    asking, predictor = Busy(left_s=100.0), await engine.live.get("digits", "2")
    sitting = Sitting(digits(), [predictor], asking, 1, lambda _: None)  # type: ignore[arg-type]
    sitting._rest(compute_s=0.001, num_batches=10)
    sitting._rest(compute_s=0.1, num_batches=100)
    asking.is_quiet = True
    sitting._rest(compute_s=0.1, num_batches=100)
    assert asking.rests == pytest.approx([0.049, 0.5])


async def test_a_rest_ends_when_nobody_asks_any_more_or_it_is_stopped(engine: Engine) -> None:
    predictor = await engine.live.get("digits", "2")
    asking = asking_module.Asking(engine.live, asyncio.get_running_loop(), time.monotonic() + 60)
    assert asking.is_quiet
    await predictor.predict(ROW, time.monotonic() + 10)
    asking._look()
    assert not asking.is_quiet
    began = time.monotonic()
    await asyncio.to_thread(asking.rest, 30.0)
    assert 0.9 < time.monotonic() - began < 20
    await predictor.predict(ROW, time.monotonic() + 10)
    asking._look()
    asking.stop()
    with pytest.raises(asking_module.Stopped):
        await asyncio.to_thread(asking.rest, 30.0)


async def test_others_are_noticed_after_a_version_with_many_answers_has_gone(
    engine: Engine,
) -> None:
    first = await engine.live.get("digits", "1")
    for _ in range(20):
        await first.predict(ROW, time.monotonic() + 10)
    second = await engine.live.get("digits", "2")
    asking = asking_module.Asking(engine.live, asyncio.get_running_loop(), time.monotonic() + 60)
    engine.live._evict(first)
    del first
    await second.predict(ROW, time.monotonic() + 10)
    asking._look()
    assert not asking.is_quiet
