"""The batcher: what it takes and in which order, who is skipped or refused, and how it ends."""

import asyncio
import contextlib
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.engine.batcher import LOWEST, Batcher, Lane, LaneOptions
from app.engine.item_queue import Answer
from app.engine.lane import LaneClosed
from app.engine.turns import OutOfDeviceMemory
from app.engine.waiter import TOGETHER, Outcome, Step, go_on
from app.errors import (
    BadInput,
    DeadlineExceeded,
    DeadlineUnreachable,
    DeviceLost,
    Draining,
    ForwardFailed,
    QueueFull,
    QueueTooSlow,
)

pytestmark = pytest.mark.anyio

CPU = torch.device("cpu")
THREAD = LaneOptions(max_batch_items=8, inline_below_ms=0)
INLINE = LaneOptions(max_batch_items=8, inline_below_ms=1e6)


@contextlib.asynccontextmanager
async def started(**options: object) -> AsyncIterator[Batcher]:
    batcher = Batcher(CPU, **options)
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.stop(5)


def rows(*numbers: float) -> Tensor:
    """Rows of one number each, which tell whose they are."""
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1)


def doubled(batch: Tensor) -> dict[str, Tensor]:
    return {"y": 2 * batch}


def numbers(answer: Answer) -> list[float]:
    return answer.outputs["y"].flatten().tolist()


class Gate:
    """A forward that stays closed until it is told: what waits meanwhile is known exactly."""

    def __init__(self, forward: Callable[[Tensor], dict[str, Tensor]] = doubled) -> None:
        self.batches: list[list[float]] = []
        self._forward = forward
        self._entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        self.batches.append(batch.flatten().tolist())
        self._entered.set()
        assert self._open.wait(10), "nobody opened the gate"
        return self._forward(batch)

    async def closed_behind(self, lane: Lane) -> asyncio.Task[Answer]:
        """The device is busy with row 0 until `open`."""
        task = asyncio.create_task(lane.submit(rows(0)))
        await asyncio.to_thread(self._entered.wait, 10)
        return task

    def open(self) -> None:
        self._open.set()


async def submitted(lane: Lane, inputs: Iterable[Tensor], **options: object) -> list[asyncio.Task]:
    """Tasks whose rows wait in the lane."""
    tasks = [asyncio.create_task(lane.submit(each, **options)) for each in inputs]
    await asyncio.sleep(0)
    return tasks


async def freed(gone: weakref.ref[Any]) -> None:
    """The device thread may hold its last batch for the moment that it takes to fall asleep."""
    async with asyncio.timeout(5):
        while gone() is not None:
            await asyncio.sleep(0.001)


# Batches


@pytest.mark.parametrize("options", [THREAD, INLINE])
async def test_a_batch_of_one(options: LaneOptions) -> None:
    async with started() as batcher:
        network = nn.Linear(3, 2)
        lane = batcher.open_lane("one", lambda x: {"y": network(x)}, options, row_shape=(3,))
        await lane.warm_up()
        inputs = torch.randn(1, 3)
        answer = await lane.submit(inputs)
        assert torch.allclose(answer.outputs["y"], network(inputs))
        assert answer.batch_size == 1
        assert answer.queue_ms >= 0
        assert answer.compute_ms > 0


async def test_a_free_device_takes_all_that_waits() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("all", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(n) for n in (1, 2, 3, 4)])
        gate.open()
        assert numbers(await first) == [0]
        assert [numbers(await task) for task in tasks] == [[2], [4], [6], [8]]
        assert gate.batches == [[0], [1, 2, 3, 4]]


async def test_a_batch_ends_at_the_largest() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("largest", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(n) for n in range(1, 21)])
        gate.open()
        answers = await asyncio.gather(first, *tasks)
        assert [numbers(answer) for answer in answers] == [[2.0 * n] for n in range(21)]
        assert [len(batch) for batch in gate.batches] == [1, 8, 8, 4]
        assert [answer.batch_size for answer in answers] == [1] + 8 * [8] + 8 * [8] + 4 * [4]


async def test_without_a_delay_nobody_waits_for_company() -> None:
    async with started() as batcher:
        gate = Gate()
        gate.open()
        lane = batcher.open_lane("hasty", gate, THREAD, row_shape=(1,))
        await lane.submit(rows(1))
        await lane.submit(rows(2))
        assert gate.batches == [[1], [2]]


async def test_with_a_delay_a_batch_waits_for_company() -> None:
    options = LaneOptions(max_batch_items=8, max_delay_ms=150)
    async with started() as batcher:
        gate = Gate()
        gate.open()
        lane = batcher.open_lane("patient", gate, options, row_shape=(1,))
        first = asyncio.create_task(lane.submit(rows(1)))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, lane.submit(rows(2)))
        assert gate.batches == [[1, 2]]


async def test_a_full_batch_waits_for_nothing() -> None:
    options = LaneOptions(max_batch_items=2, max_delay_ms=60_000)
    async with started() as batcher:
        lane = batcher.open_lane("full", doubled, options, row_shape=(1,))
        async with asyncio.timeout(5):
            answers = await asyncio.gather(lane.submit(rows(1)), lane.submit(rows(2)))
        assert [numbers(answer) for answer in answers] == [[2], [4]]


async def test_a_large_request_is_split_and_rejoined() -> None:
    async with started() as batcher:
        gate = Gate()
        gate.open()
        lane = batcher.open_lane("split", gate, THREAD, row_shape=(1,))
        answer = await lane.submit(rows(*range(21)))
        assert numbers(answer) == [2.0 * n for n in range(21)]
        assert [len(batch) for batch in gate.batches] == [8, 8, 8]  # the last one padded
        assert answer.batch_size == 8


async def test_parts_of_a_split_request_share_batches_with_others() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("share", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(1, 2, 3), rows(*range(10, 20)), rows(4, 5, 6)])
        gate.open()
        await first
        assert numbers(await tasks[0]) == [2, 4, 6]
        assert numbers(await tasks[1]) == [2.0 * n for n in range(10, 20)]
        assert numbers(await tasks[2]) == [8, 10, 12]
        assert gate.batches[1:] == [
            [1, 2, 3, 10, 11, 12, 13, 14],
            [15, 16, 17, 18, 19, 4, 5, 6],
        ]


async def test_batches_are_padded_to_fixed_sizes() -> None:
    async with started() as batcher:
        gate = Gate()
        gate.open()
        lane = batcher.open_lane("padded", gate, THREAD, row_shape=(1,))
        for count in range(1, 9):
            answer = await lane.submit(rows(*range(count)))
            assert numbers(answer) == [2.0 * n for n in range(count)]
        assert {len(batch) for batch in gate.batches} <= {1, 2, 4, 8}
        assert lane.statistics.num_padding_rows > 0


async def test_sizes_of_ones_own() -> None:
    options = LaneOptions(max_batch_items=6, sizes=(3, 6, 9), inline_below_ms=0)
    async with started() as batcher:
        gate = Gate()
        gate.open()
        lane = batcher.open_lane("own", gate, options, row_shape=(1,))
        await lane.submit(rows(1))
        await lane.submit(rows(1, 2, 3, 4))
        assert gate.batches == [[1, 1, 1], [1, 2, 3, 4, 4, 4]]
        assert lane.largest_batch == 6


async def test_several_outputs_keep_their_names() -> None:
    async with started() as batcher:
        lane = batcher.open_lane(
            "two", lambda x: {"sum": x.sum(1), "rows": x + 1}, THREAD, row_shape=(2,)
        )
        inputs = torch.arange(22.0).reshape(11, 2)
        outputs = (await lane.submit(inputs)).outputs
        assert torch.equal(outputs["sum"], inputs.sum(1))
        assert torch.equal(outputs["rows"], inputs + 1)


async def test_answers_outlive_the_memory_that_batches_share() -> None:
    """Large batches are laid out in the same memory; an answer may not be a view of it."""
    async with started() as batcher:
        gate = Gate(lambda batch: {"y": batch, "view": batch[:, ::2]})
        lane = batcher.open_lane("large", gate, THREAD, row_shape=(60_000,))
        gate.open()
        inputs = [torch.full((1, 60_000), float(n)) for n in range(16)]
        answers = await asyncio.gather(*(lane.submit(each) for each in inputs))
        assert max(answer.batch_size for answer in answers) > 1
        for given, answer in zip(inputs, answers, strict=True):
            assert torch.equal(answer.outputs["y"], given)
            assert torch.equal(answer.outputs["view"], given[:, ::2])


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(1, 2),
        torch.zeros(()),
        torch.zeros(0, 1),
        torch.zeros(2000, 1),
        torch.ones(1, 1).int(),
    ],
)
async def test_rows_that_do_not_fit_are_refused(inputs: Tensor) -> None:
    async with started() as batcher:
        lane = batcher.open_lane("strict", doubled, THREAD, row_shape=(1,))
        with pytest.raises(BadInput, match="strict takes"):
            await lane.submit(inputs)


# Who goes first, and who is skipped


async def test_the_earliest_deadline_is_first() -> None:
    options = LaneOptions(max_batch_items=1, inline_below_ms=0)
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("edf", gate, options, row_shape=(1,))
        tasks = [await gate.closed_behind(lane)]
        now = time.monotonic()
        for number, left_s in ((1, 50), (2, 30), (3, None), (4, 40)):
            deadline = None if left_s is None else now + left_s
            tasks += await submitted(lane, [rows(number)], deadline=deadline)
        gate.open()
        await asyncio.gather(*tasks)
        assert gate.batches == [[0], [2], [4], [1], [3]]


async def test_the_earliest_deadline_is_first_across_lanes() -> None:
    async with started() as batcher:
        gate = Gate()
        lanes = [batcher.open_lane(str(n), gate, THREAD, row_shape=(1,)) for n in range(4)]
        tasks = [await gate.closed_behind(lanes[0])]
        now = time.monotonic()
        for number, left_s in ((1, 30), (2, 10), (3, 20)):
            tasks += await submitted(lanes[number], [rows(number)], deadline=now + left_s)
        gate.open()
        await asyncio.gather(*tasks)
        assert gate.batches == [[0], [2], [3], [1]]


async def test_a_lower_priority_rides_only_where_padding_would() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("priority", gate, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(lane)]
        tasks += await submitted(lane, [rows(*range(20, 26))], priority=LOWEST)
        tasks += await submitted(lane, [rows(1), rows(2), rows(3)])
        gate.open()
        answers = await asyncio.gather(*tasks)
        assert gate.batches[1] == [1, 2, 3, 20]
        assert numbers(answers[1]) == [40, 42, 44, 46, 48, 50]


async def test_a_cancelled_caller_is_skipped_and_its_neighbours_are_not() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("cancel", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(n) for n in (1, 2, 3)])
        tasks[1].cancel()
        await asyncio.sleep(0)
        assert lane.num_waiting_rows == 2
        gate.open()
        await first
        assert [numbers(await task) for task in (tasks[0], tasks[2])] == [[2], [6]]
        assert gate.batches == [[0], [1, 3]]
        assert lane.statistics.num_abandoned == 1


async def test_who_was_cancelled_is_skipped_before_the_event_loop_knows() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("at once", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(n) for n in (1, 2, 3)])
        tasks[1].cancel()
        gate.open()
        while len(gate.batches) < 2:
            time.sleep(0.001)  # the event loop stands still, the device thread does not
        await asyncio.gather(first, *tasks, return_exceptions=True)
        assert gate.batches == [[0], [1, 3]]
        assert lane.num_waiting_rows == 0


async def test_a_caller_who_leaves_its_running_batch_hurts_nobody() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("leave", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        (second,) = await submitted(lane, [rows(1)])
        first.cancel()
        gate.open()
        assert numbers(await second) == [2]
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_who_is_told_at_once_needs_no_further_round_of_the_loop() -> None:
    rounds: list[int] = []
    told_in: list[tuple[int, list[float]]] = []
    async with started() as batcher:
        lane = batcher.open_lane("told", doubled, INLINE, row_shape=(1,))
        await lane.warm_up()
        assert lane.is_inline
        outcome: Outcome[Answer] = Outcome(
            lambda: told_in.append((len(rounds), numbers(outcome.take())))
        )
        lane.end(lane.begin(outcome, rows(1, 2)))
        while not outcome.done():
            rounds.append(1)
            await asyncio.sleep(0)
    # the batch runs in the round after its rows came, and says so in it
    assert told_in == [(1, [2, 4])]


async def test_those_who_share_a_batch_take_each_step_together() -> None:
    taken: list[str] = []

    def way(name: str) -> Step:
        def third() -> None:
            taken.append(f"{name}3")

        def second() -> Step | None:
            taken.append(f"{name}2")
            return third if name == "b" else None

        def first() -> Step:
            taken.append(f"{name}1")
            return second

        return first

    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("steps", gate, THREAD, row_shape=(1,))
        before = await gate.closed_behind(lane)
        outcomes: list[Outcome[Answer]] = [Outcome(way(name)) for name in "abc"]
        items = [lane.begin(each, rows(n)) for n, each in enumerate(outcomes, 1)]
        outcomes[2].cancel()
        assert taken == ["c1", "c2"]
        gate.open()
        await before
        async with asyncio.timeout(5):
            while not all(each.done() for each in outcomes):
                await asyncio.sleep(0.001)
        for item in items:
            lane.end(item)
    assert taken == ["c1", "c2", "a1", "b1", "a2", "b2", "b3"]


def test_of_many_a_group_is_through_before_the_next_begins() -> None:
    taken: list[tuple[int, int]] = []

    def way(number: int) -> Step:
        def first() -> Step:
            taken.append((1, number))
            return lambda: taken.append((2, number))

        return first

    go_on(way(number) for number in range(TOGETHER + 1))
    group = [(step, number) for step in (1, 2) for number in range(TOGETHER)]
    assert taken == [*group, (1, TOGETHER), (2, TOGETHER)]


async def test_who_cannot_be_told_hurts_no_neighbour() -> None:
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: complaints.append(str(context["exception"]))
    )

    def broken() -> None:
        raise RuntimeError("the connection is odd")

    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("neighbours", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        outcomes = [Outcome(broken), Outcome(lambda: None)]
        items = [lane.begin(each, rows(n)) for n, each in enumerate(outcomes, 1)]
        gate.open()
        await first
        async with asyncio.timeout(5):
            while not lane.is_idle:
                for item, outcome in zip(items, outcomes, strict=True):
                    if outcome.done():
                        lane.end(item)
                await asyncio.sleep(0.001)
    assert gate.batches == [[0], [1, 2]]
    assert [numbers(each.take()) for each in outcomes] == [[2], [4]]
    assert complaints == ["the connection is odd"]


async def test_who_gives_up_is_told_once_and_neither_is_answered() -> None:
    told: list[bool] = []
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("gone", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        outcome: Outcome[Answer] = Outcome(lambda: told.append(outcome.cancelled()))
        item = lane.begin(outcome, rows(1))
        for _ in range(2):
            outcome.cancel()
        lane.end(item)
        gate.open()
        await first
        assert gate.batches == [[0]]
        assert lane.statistics.num_abandoned == 1
    assert told == [True]
    with pytest.raises(asyncio.CancelledError):
        outcome.take()


async def test_thousands_of_cancelled_callers_leave_nothing_behind() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("leavers", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        for _ in range(5):
            tasks = await submitted(lane, [rows(n) for n in range(500)])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert lane.num_waiting_rows == 0
        assert not list(lane._turns.items)
        gate.open()
        await first
        assert gate.batches == [[0]]


async def test_who_is_late_is_told_in_time_and_never_computed() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("late", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        began = time.monotonic()
        late, patient = await submitted(lane, [rows(1)], deadline=began + 0.05) + await submitted(
            lane, [rows(2)]
        )
        with pytest.raises(DeadlineExceeded):
            await late
        assert time.monotonic() - began < 2  # although the device is still busy
        gate.open()
        await asyncio.gather(first, patient)
        assert gate.batches == [[0], [2]]
        assert lane.statistics.num_expired == 1


async def test_who_is_late_is_skipped_before_the_event_loop_knows() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("too late", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(1)], deadline=time.monotonic() + 0.02)
        tasks += await submitted(lane, [rows(2)])
        time.sleep(0.04)
        gate.open()
        while len(gate.batches) < 2:
            time.sleep(0.001)  # the event loop stands still, the device thread does not
        await asyncio.gather(first, *tasks, return_exceptions=True)
        assert gate.batches == [[0], [2]]
        assert isinstance(tasks[0].exception(), DeadlineExceeded)


async def test_promises_are_remembered() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("promises", gate, THREAD, row_shape=(1,))
        policy = lane._turns.policy
        before = policy.margin
        with pytest.raises(DeadlineExceeded):
            await lane.submit(rows(0), deadline=time.monotonic() + 0.02)
        broken = policy.margin
        gate.open()
        await lane.submit(rows(1), deadline=time.monotonic() + 30)
        assert policy.margin == broken > before, "half a minute for what takes a moment is no test"
        gate = Gate()
        lane = batcher.open_lane("kept", gate, THREAD, row_shape=(1,))
        policy = lane._turns.policy
        task = asyncio.create_task(lane.submit(rows(2), deadline=time.monotonic() + 2.0))
        await asyncio.sleep(0.6)
        gate.open()
        await task
        assert policy.margin < before


async def test_who_runs_past_its_deadline_is_told_in_time() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("running", gate, THREAD, row_shape=(1,))
        with pytest.raises(DeadlineExceeded):
            await lane.submit(rows(0), deadline=time.monotonic() + 0.05)
        gate.open()
        assert numbers(await lane.submit(rows(1))) == [2]


async def test_the_sweep_rings_for_who_comes_late_and_has_less_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.engine.dispatch.LONGEST_SWEEP_S", 20.0)
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("patient", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        patient = await submitted(lane, [rows(1)], deadline=time.monotonic() + 60)
        began = time.monotonic()
        for priority in (0, 5):  # before the patient one, and behind it
            with pytest.raises(DeadlineExceeded):
                await lane.submit(rows(2), time.monotonic() + 0.05, priority)
        with pytest.raises(DeadlineExceeded):
            await lane.call(lambda: None, time.monotonic() + 0.05)
        assert time.monotonic() - began < 5
        gate.open()
        await asyncio.gather(first, *patient)


async def test_who_waited_too_long_for_a_turn_is_told_to_come_later() -> None:
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.3)
            return doubled(batch)

        gate = Gate(slow)
        lane = batcher.open_lane("crowded", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        gate.open()
        with pytest.raises(QueueTooSlow, match="its turn came too late"):
            await lane.submit(rows(1), deadline=time.monotonic() + 0.4)
        await first
        await lane.submit(rows(2))
        assert gate.batches == [[0], [1], [2]], "it was computed, too late"
        with pytest.raises(DeadlineExceeded) as alone:
            await lane.submit(rows(3), deadline=time.monotonic() + 0.1)
        assert not isinstance(alone.value, QueueTooSlow)


async def test_in_a_crowd_who_is_late_is_told_to_come_later() -> None:
    async with started() as batcher:
        gate = Gate()
        options = LaneOptions(max_batch_items=1, max_queue_items=1, inline_below_ms=0)
        lane = batcher.open_lane("crowd", gate, options, row_shape=(1,))
        late = await submitted(lane, [rows(0)], deadline=time.monotonic() + 0.2)
        while not gate.batches:
            await asyncio.sleep(0.001)
        waiting = await submitted(lane, [rows(1)])
        with pytest.raises(QueueFull):
            await lane.submit(rows(2))
        with pytest.raises(QueueTooSlow, match="its turn came too late"):
            await late[0]
        gate.open()
        await asyncio.gather(*waiting)
        gate = Gate()
        lane = batcher.open_lane("nobody else", gate, options, row_shape=(1,))
        with pytest.raises(DeadlineExceeded) as alone:
            await lane.submit(rows(0), deadline=time.monotonic() + 0.1)
        assert not isinstance(alone.value, QueueTooSlow)
        gate.open()


async def test_an_answer_after_the_deadline_is_none() -> None:
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.03)
            return doubled(batch)

        lane = batcher.open_lane("slow", slow, INLINE, row_shape=(1,))
        lane._turns.home = lane._dispatch.inline  # no sweep there: it blocks the event loop
        with pytest.raises(DeadlineExceeded):
            await lane.submit(rows(1), deadline=time.monotonic() + 0.01)


# Admission


async def test_a_full_queue_says_when_to_come_back() -> None:
    options = LaneOptions(max_batch_items=2, max_queue_items=4, inline_below_ms=0)
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("full", gate, options, row_shape=(1,))
        tasks = [await gate.closed_behind(lane)]
        tasks += await submitted(lane, [rows(1, 2, 3)])
        with pytest.raises(QueueFull, match="3 inputs wait") as refused:
            await lane.submit(rows(4, 5))
        assert refused.value.retry_after_s > 0
        tasks += await submitted(lane, [rows(6)])
        gate.open()
        await asyncio.gather(*tasks)
        assert numbers(await lane.submit(rows(7, 8, 9, 10))) == [14, 16, 18, 20]
        assert lane.statistics.num_refused_full == 1


async def test_retry_after_follows_the_measured_drain_rate() -> None:
    options = LaneOptions(max_batch_items=1, max_queue_items=10, inline_below_ms=0)
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.02)
            return doubled(batch)

        lane = batcher.open_lane("rate", slow, options, row_shape=(1,))
        await lane.submit(rows(*range(8)))
        waiting = asyncio.create_task(lane.submit(rows(*range(10))))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            await lane.submit(rows(1, 2))
        await waiting
        assert 0.15 < refused.value.retry_after_s < 5  # ten rows of 20 ms


async def test_a_queue_may_be_bounded_by_time() -> None:
    options = LaneOptions(max_batch_items=1, max_wait_ms=100, inline_below_ms=0)
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.02)
            return doubled(batch)

        lane = batcher.open_lane("bounded", slow, options, row_shape=(1,))
        await lane.submit(rows(1, 2, 3, 4))
        tasks = await submitted(lane, [rows(n) for n in range(20)])
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [each for each in results if isinstance(each, QueueFull)]
        assert 10 <= len(refused) <= 19
        assert not isinstance(results[0], Exception)


async def test_who_cannot_make_its_deadline_is_refused_at_once() -> None:
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.03)
            return doubled(batch)

        lane = batcher.open_lane("slow", slow, THREAD, row_shape=(1,))
        await lane.warm_up()
        with pytest.raises(DeadlineUnreachable, match="needs about"):
            await lane.submit(rows(1), deadline=time.monotonic() + 0.01)
        with pytest.raises(DeadlineUnreachable):
            await lane.submit(rows(1), deadline=time.monotonic() - 1)
        assert numbers(await lane.submit(rows(1), deadline=time.monotonic() + 10)) == [2]
        assert lane.statistics.num_refused_late == 2
        assert lane.statistics.num_requests == 1


async def test_old_times_refuse_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engine.batch_time.TRUSTED_FOR_S", 0.02)
    pause_s = 0.3

    def once_slow(batch: Tensor) -> dict[str, Tensor]:
        time.sleep(pause_s)
        return doubled(batch)

    async with started() as batcher:
        options = LaneOptions(max_batch_items=1, inline_below_ms=0)
        lane = batcher.open_lane("once slow", once_slow, options, row_shape=(1,))
        await lane.warm_up()
        pause_s = 0.0
        await asyncio.sleep(0.03)
        assert numbers(await lane.submit(rows(1), deadline=time.monotonic() + 0.28)) == [2]


async def test_what_runs_counts_when_a_deadline_is_judged() -> None:
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.2)
            return doubled(batch)

        lane = batcher.open_lane("runs", slow, LaneOptions(max_batch_items=1), row_shape=(1,))
        await lane.warm_up()
        (first,) = await submitted(lane, [rows(1)])
        while lane.num_waiting_rows:
            await asyncio.sleep(0.001)
        with pytest.raises(DeadlineUnreachable):
            await lane.submit(rows(2), deadline=time.monotonic() + 0.3)
        await first


async def test_an_urgent_request_is_admitted_before_a_long_queue() -> None:
    options = LaneOptions(max_batch_items=1, inline_below_ms=0)
    async with started() as batcher:

        def slow(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.01)
            return doubled(batch)

        lane = batcher.open_lane("urgent", slow, options, row_shape=(1,))
        await lane.submit(rows(1, 2, 3, 4))
        tasks = await submitted(lane, [rows(*range(100))], deadline=time.monotonic() + 60)
        answer = await lane.submit(rows(7), deadline=time.monotonic() + 0.5)
        assert numbers(answer) == [14]
        assert not tasks[0].done()
        with pytest.raises(DeadlineUnreachable):
            # Behind the queue, because its priority is lower.
            await lane.submit(rows(8), deadline=time.monotonic() + 0.5, priority=LOWEST)
        tasks[0].cancel()


# Failures


def poisoned(batch: Tensor) -> dict[str, Tensor]:
    if (batch < 0).any():
        raise ValueError("a negative row")
    return doubled(batch)


@pytest.mark.parametrize("options", [THREAD, INLINE])
async def test_a_failing_forward_fails_its_own_batch(options: LaneOptions) -> None:
    async with started() as batcher:
        lane = batcher.open_lane("poison", poisoned, options, row_shape=(1,))
        await lane.warm_up()
        for _ in range(3):
            with pytest.raises(ForwardFailed) as failed:
                await lane.submit(rows(-1))
            assert isinstance(failed.value.__cause__, ValueError)
            assert numbers(await lane.submit(rows(1))) == [2]
        assert lane.statistics.num_failed == 3


async def test_a_failed_part_fails_its_request_and_the_rest_is_not_computed() -> None:
    async with started() as batcher:
        gate = Gate(poisoned)
        gate.open()
        lane = batcher.open_lane("part", gate, THREAD, row_shape=(1,))
        with pytest.raises(ForwardFailed):
            await lane.submit(rows(-1, *range(1, 1000)))
        assert numbers(await lane.submit(rows(5))) == [10]
        assert len(gate.batches) == 2
        assert lane.num_waiting_rows == 0


async def test_a_failed_forward_leaves_no_tensors_behind(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "app.engine.turns")  # what is captured keeps its traceback
    scratch: list[weakref.ref[Tensor]] = []

    def failing(batch: Tensor) -> dict[str, Tensor]:
        copy = batch.clone()
        scratch.append(weakref.ref(copy))
        raise ValueError(f"{len(copy)} rows are too many")

    async with started() as batcher:
        lane = batcher.open_lane("leaves", failing, THREAD, row_shape=(1,))
        gc.disable()
        try:
            with contextlib.suppress(ForwardFailed):
                await lane.submit(rows(1))
            await freed(scratch[0])
            with contextlib.suppress(ValueError):
                await lane.call(lambda: failing(rows(1)))
            await freed(scratch[1])
        finally:
            gc.enable()


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: {"y": x[:1]},
        lambda x: {"y": x.sum()},
        lambda x: dict.fromkeys(x[:0]),
        lambda x: x,
        lambda x: {"y": str(x)},
    ],
)
async def test_an_answer_of_another_form_is_a_failure(answer: Callable) -> None:
    async with started() as batcher:
        lane = batcher.open_lane("odd", answer, THREAD, row_shape=(1,))
        with pytest.raises(ForwardFailed):
            await lane.submit(rows(1, 2))


async def test_outputs_that_change_from_batch_to_batch_fail_only_who_needs_both() -> None:
    names = iter("abcdefgh")
    async with started() as batcher:
        lane = batcher.open_lane("moody", lambda x: {next(names): x}, THREAD, row_shape=(1,))
        with pytest.raises(ForwardFailed):
            await lane.submit(rows(*range(16)))
        assert list((await lane.submit(rows(1))).outputs) == ["c"]


class SmallMemory:
    """A forward into which `largest` rows fit; counts what it is asked."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.sizes: list[int] = []
        self.scratch: list[weakref.ref[Tensor]] = []
        self.held: list[bool] = []

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(batch))
        self.held.append(any(each() is not None for each in self.scratch))
        scratch = batch.clone()
        self.scratch.append(weakref.ref(scratch))
        if len(batch) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return doubled(batch)


async def test_out_of_memory_halves_the_batch_once_and_lowers_the_largest() -> None:
    async with started() as batcher:
        memory = SmallMemory(largest=4)
        lane = batcher.open_lane("memory", memory, THREAD, row_shape=(1,))
        assert numbers(await lane.submit(rows(*range(8)))) == [2.0 * n for n in range(8)]
        assert memory.sizes == [8, 4, 4]
        assert lane.largest_batch == 4
        assert lane.statistics.num_halved == 1
        await lane.submit(rows(*range(8)))
        assert memory.sizes == [8, 4, 4, 4, 4]


async def test_the_failed_forward_is_freed_before_the_second_try() -> None:
    async with started() as batcher:
        memory = SmallMemory(largest=4)
        lane = batcher.open_lane("freed", memory, THREAD, row_shape=(1,))
        gc.disable()
        try:
            await lane.submit(rows(*range(8)))
        finally:
            gc.enable()
        assert memory.held == [False, False, False]


async def test_what_does_not_fit_halved_either_fails_alone() -> None:
    class OneLarge(SmallMemory):
        def __call__(self, batch: Tensor) -> dict[str, Tensor]:
            self.largest = 1 if (batch == 7).any() else 4
            return super().__call__(batch)

    async with started() as batcher:
        gate = Gate(OneLarge(largest=4))
        lane = batcher.open_lane("alone", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(n) for n in range(1, 9)])
        gate.open()
        results = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert [numbers(each) for each in results[:5]] == [[0], [2], [4], [6], [8]]
        assert all(isinstance(each, OutOfDeviceMemory) for each in results[5:])
        assert numbers(await lane.submit(rows(7))) == [14]


async def test_halves_cut_through_a_request() -> None:
    async with started() as batcher:
        gate = Gate(SmallMemory(largest=4))
        lane = batcher.open_lane("cut", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        tasks = await submitted(lane, [rows(1, 2), rows(3, 4, 5, 6), rows(7, 8)])
        gate.open()
        await first
        assert [numbers(await task) for task in tasks] == [[2, 4], [6, 8, 10, 12], [14, 16]]


# The device is lost


def lost(batch: Tensor) -> dict[str, Tensor]:
    raise torch.AcceleratorError(f"CUDA error: device-side assert triggered, {len(batch)} rows")


async def test_a_lost_device_fails_all_who_wait_and_says_so() -> None:
    causes: list[BaseException] = []
    async with started(on_broken=causes.append) as batcher:
        gate = Gate(lost)
        bad = batcher.open_lane("bad", gate, THREAD, row_shape=(1,))
        good = batcher.open_lane("good", doubled, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(bad)]
        tasks += await submitted(bad, [rows(1)])
        tasks += await submitted(good, [rows(2)])
        tasks += [asyncio.create_task(good.call(lambda: 1))]
        await asyncio.sleep(0)
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, DeviceLost) for each in results)
        assert [type(cause) for cause in causes] == [torch.AcceleratorError]
        assert batcher.broken
        with pytest.raises(DeviceLost):
            await good.submit(rows(1))
        with pytest.raises(DeviceLost):
            batcher.open_lane("new", doubled, THREAD, row_shape=(1,))
        assert gate.batches == [[0]]


async def test_a_call_may_find_the_device_lost_too() -> None:
    causes: list[BaseException] = []
    async with started(on_broken=causes.append) as batcher:
        with pytest.raises(DeviceLost):
            await batcher.call(lambda: lost(rows(1)))
        await asyncio.sleep(0)
        assert len(causes) == 1


async def test_a_thread_that_dies_is_noticed() -> None:
    def exits(batch: Tensor) -> dict[str, Tensor]:
        raise SystemExit(f"the thread is gone, with {len(batch)} rows")

    causes: list[BaseException] = []
    async with started(on_broken=causes.append) as batcher:
        gate = Gate(exits)
        lane = batcher.open_lane("dies", gate, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(lane), *await submitted(lane, [rows(1)])]
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, DeviceLost) for each in results)
        assert [type(cause) for cause in causes] == [SystemExit]


async def test_a_forward_that_never_returns_is_noticed() -> None:
    causes: list[BaseException] = []
    async with started(on_broken=causes.append, stuck_after_s=0.05) as batcher:
        gate = Gate()
        lane = batcher.open_lane("stuck", gate, THREAD, row_shape=(1,))
        with pytest.raises(DeviceLost):
            await lane.submit(rows(1))
        assert len(causes) == 1
        gate.open()


# The end


async def test_stopping_answers_what_was_received() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("stopping", gate, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(lane), *await submitted(lane, [rows(1), rows(2)])]
        stops = [asyncio.create_task(batcher.stop(5)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await lane.submit(rows(3))
        with pytest.raises(Draining):
            await batcher.call(lambda: 1)
        gate.open()
        assert [numbers(await task) for task in tasks] == [[0], [2], [4]]
        await asyncio.gather(*stops)
        assert not [each for each in threading.enumerate() if each.name == "device"]


async def test_who_is_not_answered_in_time_is_refused_at_the_end() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("hurry", gate, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(lane), *await submitted(lane, [rows(1)])]
        stop = asyncio.create_task(batcher.stop(0.02))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in results] == [Draining, Draining]
        gate.open()
        await stop
        assert gate.batches == [[0]]


async def test_a_closing_lane_answers_then_lets_go_of_its_network() -> None:
    async with started() as batcher:
        network = nn.Linear(1, 1)
        gone = weakref.ref(network)
        gate = Gate(lambda batch: {"y": batch})
        other = batcher.open_lane("other", doubled, THREAD, row_shape=(1,))

        def run(batch: Tensor, network: nn.Module = network) -> dict[str, Tensor]:
            return {"y": network(gate(batch)["y"])}

        lane = batcher.open_lane("closing", run, THREAD, row_shape=(1,))
        del network, run
        tasks = [await gate.closed_behind(lane), *await submitted(lane, [rows(1)])]
        closing = asyncio.create_task(batcher.close_lane(lane, 5))
        await asyncio.sleep(0)
        with pytest.raises(LaneClosed):
            await lane.submit(rows(1))
        gate.open()
        assert len(await asyncio.gather(*tasks)) == 2
        del tasks
        await closing
        assert numbers(await other.submit(rows(1))) == [2]
        await freed(gone)
        assert lane not in batcher.lanes


class Named:
    """A network whose output has a name."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def run(self, batch: Tensor) -> dict[str, Tensor]:
        return {"y": self.network(batch)}


async def test_a_lane_without_an_owner_takes_its_network_along() -> None:
    async with started() as batcher:
        network = nn.Sequential(nn.Linear(1, 1))
        gone = weakref.ref(network)
        # A bound method holds the network, as a closure would.
        lane = batcher.open_lane("forgotten", Named(network).run, THREAD, row_shape=(1,))
        await lane.submit(rows(1))
        gc.disable()
        try:
            del lane, network
            await freed(gone)
        finally:
            gc.enable()
        assert not batcher.lanes


async def test_letting_go_refuses_who_still_waits() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("letting", gate, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(lane), *await submitted(lane, [rows(1)])]
        lane.let_go()
        gate.open()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], LaneClosed)
        assert gate.batches == [[0]]


# Calls


async def test_a_call_runs_on_the_device_thread_with_gradients() -> None:
    async with started() as batcher:
        lane = batcher.open_lane("calls", doubled, THREAD, row_shape=(1,))

        def gradient() -> tuple[str, float]:
            x = torch.tensor(3.0, requires_grad=True)
            (x * x).backward()
            assert x.grad is not None
            return threading.current_thread().name, x.grad.item()

        assert await lane.call(gradient) == ("device", 6.0)
        with pytest.raises(ZeroDivisionError):
            await lane.call(lambda: 1 / 0)


async def test_a_call_has_its_turn_after_what_is_more_urgent() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("turns", gate, THREAD, row_shape=(1,))
        tasks: list[asyncio.Task] = [await gate.closed_behind(lane)]
        tasks += [asyncio.create_task(lane.call(lambda: list(gate.batches)))]
        await asyncio.sleep(0)
        tasks += await submitted(lane, [rows(1)])
        gate.open()
        assert (await asyncio.gather(*tasks))[1] == [[0], [1]]


async def test_calls_are_skipped_bounded_and_have_deadlines() -> None:
    async with started() as batcher:
        gate, called = Gate(), []
        lane = batcher.open_lane("bounded", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        with pytest.raises(DeadlineExceeded):
            await lane.call(lambda: called.append(0), deadline=time.monotonic() + 0.03)
        calls = [asyncio.create_task(lane.call(lambda: called.append(1))) for _ in range(64)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await lane.call(lambda: called.append(2))
        for call in calls[1:]:
            call.cancel()
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(first, calls[0])
        assert called == [1]


async def test_a_late_call_is_skipped_before_the_event_loop_knows() -> None:
    async with started() as batcher:
        gate, called = Gate(), []
        lane = batcher.open_lane("late call", gate, THREAD, row_shape=(1,))
        first = await gate.closed_behind(lane)
        late = asyncio.create_task(
            lane.call(lambda: called.append(1), deadline=time.monotonic() + 0.01)
        )
        await asyncio.sleep(0)
        time.sleep(0.02)
        gate.open()
        with pytest.raises(DeadlineExceeded):
            await late
        await first
        assert called == []


# On the event loop


async def test_tiny_forwards_run_on_the_event_loop_and_share_a_tick() -> None:
    threads: list[str] = []
    async with started() as batcher:

        def run(batch: Tensor) -> dict[str, Tensor]:
            threads.append(threading.current_thread().name)
            return doubled(batch)

        lane = batcher.open_lane("tiny", run, INLINE, row_shape=(1,))
        await lane.warm_up()
        assert lane.is_inline
        threads.clear()
        answers = await asyncio.gather(*(lane.submit(rows(n)) for n in range(4)))
        assert [numbers(answer) for answer in answers] == [[0], [2], [4], [6]]
        assert [answer.batch_size for answer in answers] == [4, 4, 4, 4]
        assert threads == [threading.current_thread().name]


async def test_a_long_inline_queue_lets_the_event_loop_breathe() -> None:
    async with started() as batcher:

        def run(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(0.002)
            return doubled(batch)

        options = LaneOptions(max_batch_items=1, inline_below_ms=1e6)
        lane = batcher.open_lane("long", run, options, row_shape=(1,))
        for _ in range(3):
            await lane.warm_up()
        assert lane.is_inline
        task, num_ticks = asyncio.create_task(lane.submit(rows(*range(40)))), 0
        while not task.done():
            num_ticks += 1
            await asyncio.sleep(0)
        assert num_ticks > 20


async def test_a_lane_that_grows_slow_leaves_the_event_loop() -> None:
    pause_s = 0.0
    async with started() as batcher:

        def run(batch: Tensor) -> dict[str, Tensor]:
            time.sleep(pause_s)
            return doubled(batch)

        options = LaneOptions(max_batch_items=4, inline_below_ms=4)
        lane = batcher.open_lane("grows", run, options, row_shape=(1,))
        await lane.warm_up()
        assert lane.is_inline
        pause_s = 0.012
        for number in range(24):
            assert numbers(await lane.submit(rows(number))) == [2 * number]
        assert not lane.is_inline


async def test_slow_forwards_never_block_the_event_loop() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("slow", gate, LaneOptions(), row_shape=(1,))
        first = await gate.closed_behind(lane)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not first.done()
        gate.open()
        await first


async def test_a_lane_that_moves_to_and_fro_has_one_runner() -> None:
    inside, most, pause_s, threads = 0, 0, 0.0, set()
    async with started() as batcher:

        def run(batch: Tensor) -> dict[str, Tensor]:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            threads.add(threading.current_thread().name)
            time.sleep(pause_s)
            inside -= 1
            return doubled(batch)

        options = LaneOptions(max_batch_items=4, inline_below_ms=0.5)
        lane = batcher.open_lane("moves", run, options, row_shape=(1,))
        for pause_s in (0.0, 0.002, 0.0, 0.002, 0.0):  # noqa: B007  read by run
            tasks = [asyncio.create_task(lane.submit(rows(n))) for n in range(120)]
            assert [numbers(await task) for task in tasks] == [[2.0 * n] for n in range(120)]
        assert most == 1
        assert len(threads) == 2


# Scale


async def test_idle_lanes_cost_nothing() -> None:
    """A request makes the same calls with one lane open and with five hundred."""

    async def calls_of_a_request(lane: Lane) -> int:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            await lane.submit(rows(1), deadline=time.monotonic() + 30)
        finally:
            sys.setprofile(None)
        return calls

    async with started() as batcher:
        lane = batcher.open_lane("busy", doubled, INLINE, row_shape=(1,))
        await lane.warm_up()
        for _ in range(20):
            await lane.submit(rows(1), deadline=time.monotonic() + 30)
        alone = min([await calls_of_a_request(lane) for _ in range(5)])
        idle = [batcher.open_lane(str(n), doubled, INLINE, row_shape=(1,)) for n in range(500)]
        await asyncio.gather(*(each.submit(rows(1)) for each in idle))
        # A look at every lane would be at least five hundred more.
        assert min([await calls_of_a_request(lane) for _ in range(5)]) < alone + 50


async def test_statistics_add_up() -> None:
    async with started() as batcher:
        gate = Gate()
        lane = batcher.open_lane("counts", gate, THREAD, row_shape=(1,))
        tasks = [await gate.closed_behind(lane), *await submitted(lane, [rows(1, 2), rows(3)])]
        gate.open()
        await asyncio.gather(*tasks)
        statistics = lane.statistics
        assert (statistics.num_requests, statistics.num_rows) == (3, 4)
        assert {rows: count.num_batches for rows, count in statistics.batches.items()} == {
            1: 1,
            3: 1,
        }
        assert statistics.num_padding_rows == 1
        assert sum(statistics.queue_s.counts) == 3
        assert sum(statistics.compute_s.counts) == 2
        assert statistics.success_s >= statistics.queue_s.total
