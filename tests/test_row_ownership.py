"""One request never gets another's row, whatever its neighbours do; and this check would notice."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.engine.batcher import LOWEST, Batcher, Lane, LaneOptions
from app.errors import DeadlineExceeded, ForwardFailed, QueueFull

pytestmark = pytest.mark.anyio

NUM_CALLERS = 90
NUM_REQUESTS = 50
Network = Callable[[Tensor], Tensor]


def tripled(batch: Tensor) -> Tensor:
    return 3 * batch[:, 0] + 1


class Customer:
    """Asks with numbered rows, some poisoned, some late, and sometimes leaves before the answer."""

    def __init__(self, lane: Lane, first: int, seed: int) -> None:
        self.lane = lane
        self.first = first
        self.random = random.Random(seed + first)
        self.outcomes: Counter[str] = Counter()

    async def ask_often(self) -> None:
        for number in range(self.first, self.first + NUM_REQUESTS):
            self.outcomes[await self.ask(number)] += 1

    async def ask(self, number: int) -> str:
        inputs = self.inputs(number)
        deadline = time.monotonic() + self.random.choice((0.002, 5, 60))
        priority = self.random.choice((0, 0, LOWEST))
        task = asyncio.create_task(self.lane.submit(inputs, deadline, priority))
        if self.random.random() < 0.2:
            await asyncio.sleep(self.random.choice((0, 0, 0.001, 0.003)))
            task.cancel()
        try:
            answer = await task
        except asyncio.CancelledError:
            return "cancelled"
        except (ForwardFailed, DeadlineExceeded, QueueFull) as error:
            return type(error).__name__
        assert torch.equal(answer.outputs["y"], tripled(inputs)), "another's row"
        return "answered"

    def inputs(self, number: int) -> Tensor:
        """One to eleven rows `[n, 2]`: a number of its own each, and whether it is poisoned."""
        count = self.random.choice((1, 1, 1, 2, 3, 11))
        inputs = torch.zeros(count, 2)
        inputs[:, 0] = number + torch.arange(count) / 16
        inputs[0, 1] = self.random.random() < 0.01
        return inputs


async def outcomes_of(network: Network, seed: int) -> Counter[str]:
    """Thousands of requests through six lanes, three of them on the event loop."""

    def run(batch: Tensor) -> dict[str, Tensor]:
        if (batch[:, 1] > 0).any():
            raise ValueError("a poisoned row")
        return {"y": network(batch)}

    batcher = Batcher(torch.device("cpu"))
    batcher.start()
    lanes = [
        batcher.open_lane(
            f"{largest}, inline below {below_ms} ms",
            run,
            LaneOptions(max_batch_items=largest, inline_below_ms=below_ms),
            row_shape=(2,),
        )
        for largest in (1, 3, 8)
        for below_ms in (0, 5)
    ]
    customers = [Customer(lanes[n % len(lanes)], 100 * n, seed) for n in range(NUM_CALLERS)]
    try:
        await asyncio.gather(*(customer.ask_often() for customer in customers))
    finally:
        await batcher.stop(5)
    return sum((customer.outcomes for customer in customers), Counter())


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_row_comes_home(seed: int) -> None:
    outcomes = await outcomes_of(tripled, seed)
    assert outcomes.total() == NUM_CALLERS * NUM_REQUESTS
    assert outcomes["answered"] > outcomes.total() / 2
    assert outcomes["cancelled"] > 100
    assert outcomes["ForwardFailed"] > 20


@pytest.mark.parametrize("shift", [1, -1])
async def test_a_shift_by_one_row_is_noticed(shift: int) -> None:
    with pytest.raises(AssertionError, match="another's row"):
        await outcomes_of(lambda batch: torch.roll(tripled(batch), shift), seed=1)
