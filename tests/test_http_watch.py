"""The sweep over connections: one, however they come and go; fair when the loop stood still."""

import asyncio
import math
import time

import pytest

from app.http.watch import Watch


class Counted:
    """Counts how often it is looked at, and when it was told that its time is up."""

    def __init__(self, limit: float = math.inf) -> None:
        self.num_looks = 0
        self.num_expired = 0
        self._limit = limit

    @property
    def deadline(self) -> float:
        self.num_looks += 1
        return self._limit

    @deadline.setter
    def deadline(self, limit: float) -> None:
        self._limit = limit

    def expire(self) -> None:
        self.num_expired += 1
        self.deadline = math.inf


@pytest.mark.anyio
async def test_one_sweep_runs_however_often_connections_come_and_go() -> None:
    watch, loop = Watch(tick_s=0.01), asyncio.get_running_loop()
    for _ in range(100):
        brief = Counted()
        watch.add(brief, loop)
        watch.remove(brief)
    last = Counted()
    watch.add(last, loop)
    await asyncio.sleep(0.2)
    watch.remove(last)
    assert 0 < last.num_looks <= 21


@pytest.mark.anyio
async def test_sweep_ends_with_the_last_connection_and_starts_again() -> None:
    watch, loop = Watch(tick_s=0.01), asyncio.get_running_loop()
    for _ in range(2):
        connection = Counted()
        watch.add(connection, loop)
        await asyncio.sleep(0.05)
        watch.remove(connection)
        await asyncio.sleep(0.05)
        num_looks = connection.num_looks
        await asyncio.sleep(0.05)
        assert connection.num_looks == num_looks > 0


@pytest.mark.anyio
async def test_many_deadlines_at_once_all_pass_and_each_once() -> None:
    watch, loop = Watch(tick_s=0.01), asyncio.get_running_loop()
    connections = [Counted(0.02) for _ in range(100)]
    for each in connections:
        watch.add(each, loop)
    await asyncio.sleep(0.2)
    assert [each.num_expired for each in connections] == [1] * 100


@pytest.mark.anyio
async def test_time_in_which_the_loop_stood_still_is_not_counted() -> None:
    watch, loop = Watch(tick_s=0.01), asyncio.get_running_loop()
    watch.add(Counted(), loop)
    await asyncio.sleep(0.03)
    before = watch.now
    time.sleep(0.3)
    await asyncio.sleep(0)
    assert watch.now - before < 0.1
