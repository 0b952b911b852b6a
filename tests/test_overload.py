"""Overload on a clock of our own: the device is kept busy with answers that are still in time."""

import asyncio
import random
import time
from collections import Counter

import pytest
import torch

from app.engine.admission import Admission
from app.engine.arrival_rate import ArrivalRate
from app.engine.batch import Batch
from app.engine.batch_policy import LaneOptions
from app.engine.dispatch import Dispatch
from app.engine.item_queue import Item, ItemQueue
from app.engine.schedule import LOWEST, NORMAL
from app.engine.turns import Turns
from app.errors import DeadlineUnreachable, QueueFull
from benchmarks.evaluate import started
from models.picture import PictureError
from models.store import ModelStore

pytestmark = pytest.mark.anyio

# Seconds that a batch takes in any case, and for each row; its largest size; a request's patience.
FLAT, STEEP, CARD = (0.010, 0.0005, 32, 0.5), (0.002, 0.009, 8, 0.5), (0.002, 0.00005, 64, 0.05)
# ResNet-18 on two cores, asked by callers who wait five times as long as one row takes.
RESNET = (0.003, 0.022, 32, 0.125)
# The same by callers in a hurry: where each is let in at once, batches of two are all there is.
HURRIED = (0.006, 0.020, 32, 0.14)


class Station:
    """One lane before a device whose batches take times of our choice, without any waiting."""

    def __init__(self, device: tuple[float, float, int, float], noise: float) -> None:
        self.start_s, self.per_row_s, self.largest, self.patience_s = device
        self.noise = noise
        self.random = random.Random(3)
        self.outcomes: Counter[str] = Counter()
        self.latencies_s: list[float] = []
        self.free_at = 0.0
        self.num_batches = 0
        self.dispatch = Dispatch(
            asyncio.get_running_loop(),
            torch.device("cpu"),
            num_threads=1,
            stuck_after_s=1e9,
            on_lost=lambda _: None,
        )
        options = LaneOptions(self.largest, max_queue_items=100_000, inline_below_ms=0)
        self.turns = Turns("station", [lambda rows: {"y": rows}], options, self.dispatch)
        self.admission = Admission(self.turns, options)
        for size in self.turns.policy.sizes.sizes * 3:
            self.turns.policy.learn(size, batch_s(self, size), now=0.0)

    @property
    def capacity(self) -> float:
        """Rows a second, in batches of the largest size."""
        return self.largest / batch_s(self, self.largest)

    def run(self, load: float, num_requests: int) -> float:
        """The share of what the device can do that was answered in time, at `load` times it."""
        now = 0.0
        for number in range(num_requests):
            now += self.random.expovariate(load * self.capacity)
            self.serve(until=now)
            self.dispatch.threaded.running_until = self.free_at
            self.arrive(number, now)
        self.dispatch.stop()  # or its sweep would look at the real clock
        return self.outcomes["in time"] / (now * self.capacity)

    def arrive(self, number: int, now: float, priority: int = NORMAL) -> None:
        future = self.dispatch.loop.create_future()
        item = Item(torch.zeros(1, 1), future, now, now + self.patience_s, priority, number)
        try:
            self.admission.admit(item.num_rows, item.key, item.deadline, now)
        except (DeadlineUnreachable, QueueFull) as refusal:
            self.outcomes[type(refusal).__name__] += 1
        else:
            self.turns.push(item, now)

    def serve(self, until: float) -> None:
        while (head := self.turns.items.head()) is not None:
            self.free_at = max(self.free_at, head.submitted_at)
            if self.free_at >= until:
                return
            turn = self.turns.take(self.free_at)
            assert turn is not None
            for _ in turn.late:
                self.settle("skipped")
            for batch in turn.batches:
                self.compute(batch)

    def compute(self, batch: Batch) -> None:
        noise = self.random.uniform(1 - self.noise, 1 + self.noise)
        self.num_batches += 1
        batch.compute_s = batch_s(self, batch.size) * noise
        self.free_at += batch.compute_s
        self.turns.learn([batch], halved=False, now=self.free_at)
        for part in batch.parts:
            self.latencies_s.append(self.free_at - part.item.submitted_at)
            self.settle("in time" if part.item.deadline >= self.free_at else "late")

    def settle(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self.turns.policy.promise(kept=outcome == "in time")

    @property
    def p99_s(self) -> float:
        """Of those that were computed."""
        return sorted(self.latencies_s)[int(0.99 * len(self.latencies_s))]


def batch_s(station: Station, size: int) -> float:
    return station.start_s + station.per_row_s * size


@pytest.mark.parametrize("load", [2, 5])
@pytest.mark.parametrize("device", [FLAT, STEEP, CARD])
async def test_goodput_stays_near_capacity(
    device: tuple[float, float, int, float], load: float
) -> None:
    station = Station(device, noise=0.3)
    assert station.run(load, num_requests=8000) > 0.93
    assert station.outcomes["QueueTooSlow"] > 1000
    assert station.outcomes["late"] + station.outcomes["skipped"] < 0.03 * 8000


@pytest.mark.parametrize("load", [2, 5])
async def test_the_admitted_wait_hardly_longer_and_the_others_are_refused_at_once(
    load: float,
) -> None:
    calm, crowded = Station(RESNET, noise=0.1), Station(RESNET, noise=0.1)
    calm.run(0.8, num_requests=4000)
    goodput = crowded.run(load, num_requests=8000)
    assert goodput > 0.9
    assert crowded.p99_s < 2 * calm.p99_s
    refused = crowded.outcomes["QueueTooSlow"] + crowded.outcomes["DeadlineUnreachable"]
    assert crowded.outcomes["skipped"] < 0.01 * refused, "these hear of it once their time is up"


async def test_where_enough_come_in_time_to_fill_a_batch_nobody_cuts_it_short() -> None:
    station = Station(HURRIED, noise=0.1)
    assert station.run(5, num_requests=8000) > 0.9
    assert len(station.latencies_s) / station.num_batches > 3.0
    assert station.outcomes["skipped"] < 0.01 * station.outcomes["QueueTooSlow"]


async def test_where_few_come_everybody_is_let_in_who_can_be_answered() -> None:
    station = Station(HURRIED, noise=0.0)
    for number in range(200):  # two by two, and nobody else until they are answered
        now = number * 0.2
        station.serve(until=now)
        station.dispatch.threaded.running_until = station.free_at
        station.arrive(2 * number, now)
        station.serve(until=now + 0.001)
        station.dispatch.threaded.running_until = station.free_at
        station.arrive(2 * number + 1, now + 0.001)
    station.serve(until=1e9)
    station.dispatch.stop()
    assert station.outcomes == {"in time": 400}


async def test_who_is_urgent_is_not_refused_for_others_who_would_fill_the_batch() -> None:
    station = Station(HURRIED, noise=0.1)
    station.run(5, num_requests=2000)
    station.turns.items = ItemQueue()
    now = station.free_at
    station.dispatch.threaded.running_until = now + 0.08
    station.outcomes.clear()
    station.arrive(3000, now)
    assert station.outcomes == {"QueueTooSlow": 1}
    station.arrive(3001, now, priority=NORMAL - 1)
    assert station.turns.items.num_rows == 1


@pytest.mark.parametrize(("priority", "is_counted"), [(NORMAL, True), (LOWEST, False)])
async def test_who_gives_way_to_others_fills_no_batch_for_them(
    priority: int, is_counted: bool
) -> None:
    station = Station(HURRIED, noise=0.1)
    for number in range(100):
        station.arrive(number, number * 0.01, priority)
    assert set(station.outcomes) == {"QueueTooSlow"}
    assert (station.turns.arrivals.per_s > 50) is is_counted


async def test_rows_are_counted_whether_they_are_admitted_or_refused() -> None:
    rate = ArrivalRate()
    for number in range(1000):
        rate.count(2, now=100.0 + number * 0.01)
    assert rate.per_s == pytest.approx(200.0, rel=0.05)
    rate.count(2, now=200.0)
    assert rate.per_s < 110.0


@pytest.mark.parametrize("device", [FLAT, STEEP, CARD])
async def test_below_capacity_hardly_anybody_is_refused(
    device: tuple[float, float, int, float],
) -> None:
    station = Station(device, noise=0.3)
    station.run(0.7, num_requests=4000)
    assert station.outcomes["in time"] > 0.99 * 4000


async def test_a_device_that_slows_down_makes_the_promises_careful() -> None:
    station = Station(STEEP, noise=0.0)
    for _ in range(100):
        station.turns.policy.promise(kept=False)
    careful = station.turns.policy.margin
    assert careful > 1.3
    for _ in range(20_000):
        station.turns.policy.promise(kept=True)
    assert 1.0 <= station.turns.policy.margin < careful


async def test_no_picture_is_decoded_for_a_request_that_is_refused(store: ModelStore) -> None:
    async with started(store) as engine:
        predictor = await engine.live.get("digits", None)
        with pytest.raises(PictureError):
            await predictor.decode([b"no picture"], deadline=time.monotonic() + 60)
        with pytest.raises(DeadlineUnreachable):
            await predictor.decode([b"no picture"], deadline=time.monotonic() - 1)
