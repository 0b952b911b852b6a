"""Several devices behind one queue: each takes what is next, and one that fails leaves the others.

Two processors stand for two GPUs: a thread, a forward and a scratch memory each.
"""

import asyncio
import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.errors import DeviceLost
from models.device import choose_devices

pytestmark = pytest.mark.anyio

CPU = torch.device("cpu")
OPTIONS = LaneOptions(max_batch_items=8, max_queue_items=10_000)
Forward = Callable[[Tensor], dict[str, Tensor]]


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1)


class Device:
    """A forward that says who computed, and may be told to wait or to fail."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.threads: set[int] = set()
        self.num_batches = 0
        self.may_go = threading.Event()
        self.may_go.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        self.threads.add(threading.get_ident())
        self.num_batches += 1
        self.entered.set()
        assert self.may_go.wait(10)
        if self.error is not None:
            raise self.error
        return {"y": batch * 2, "by": torch.full((len(batch), 1), self.number)}


async def test_a_busy_device_keeps_nobody_waiting() -> None:
    batcher = Batcher(CPU, CPU)
    batcher.start()
    first, second = Device(0), Device(1)
    lane = batcher.open_lane("two", first, OPTIONS, row_shape=(1,), elsewhere=[second])
    for device in (first, second):
        device.may_go.clear()
    blocked = asyncio.create_task(lane.submit(rows(1)))
    while not (first.entered.is_set() or second.entered.is_set()):
        await asyncio.sleep(0.001)
    busy, free = (first, second) if first.entered.is_set() else (second, first)
    free.may_go.set()
    for number in range(5):
        answer = await lane.submit(rows(number))
        assert answer.outputs["by"].tolist() == [[free.number]]
    busy.may_go.set()
    assert (await blocked).outputs["by"].tolist() == [[busy.number]]
    await batcher.stop(5)


@pytest.mark.parametrize("seed", range(3))
async def test_rows_are_never_mixed(seed: int) -> None:
    batcher = Batcher(CPU, CPU)
    batcher.start()
    devices = Device(0), Device(1)
    lane = batcher.open_lane("two", devices[0], OPTIONS, row_shape=(1,), elsewhere=devices[1:])
    sizes = random.Random(seed).choices(range(1, 30), k=200)
    asked = [rows(*range(start * 100, start * 100 + size)) for start, size in enumerate(sizes)]
    answers = await asyncio.gather(*(lane.submit(one) for one in asked))
    for one, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer.outputs["y"], one * 2)
    assert [len(device.threads) for device in devices] == [1, 1]
    assert devices[0].threads != devices[1].threads
    assert lane.statistics.num_rows == sum(sizes)
    assert not lane.is_inline
    await batcher.stop(5)


async def test_one_that_fails_leaves_the_other_serving() -> None:
    causes: list[BaseException] = []
    batcher = Batcher(CPU, CPU, on_broken=causes.append)
    batcher.start()
    devices = Device(0), Device(1)
    lane = batcher.open_lane("two", devices[0], OPTIONS, row_shape=(1,), elsewhere=devices[1:])
    devices[0].error = torch.AcceleratorError("CUDA error: an illegal memory access")
    results = []
    while not batcher.lost:
        asked = [lane.submit(rows(number)) for number in range(20)]
        results += await asyncio.gather(*asked, return_exceptions=True)
    assert any(isinstance(one, DeviceLost) for one in results)
    assert batcher.lost == {0}
    assert not batcher.broken
    answers = await asyncio.gather(*(lane.submit(rows(number)) for number in range(50)))
    assert {one.outputs["by"].item() for one in answers} == {1}
    assert devices[0].num_batches == 1
    with pytest.raises(DeviceLost):
        await batcher.call(lambda: 1, asyncio.get_running_loop().time() + 5)
    assert await batcher.call(lambda: 1, place=1) == 1
    devices[1].error = torch.AcceleratorError("CUDA error: an illegal memory access")
    with pytest.raises(DeviceLost):
        await lane.submit(rows(1))
    assert batcher.broken
    assert len(causes) == 1
    await batcher.stop(5)


async def test_one_that_hangs_leaves_the_other_serving() -> None:
    batcher = Batcher(CPU, CPU, stuck_after_s=0.1)
    batcher.start()
    devices = Device(0), Device(1)
    lane = batcher.open_lane("two", devices[0], OPTIONS, row_shape=(1,), elsewhere=devices[1:])
    devices[0].may_go.clear()
    results = []
    while not batcher.lost:
        results += await asyncio.gather(
            *(lane.submit(rows(number)) for number in range(4)), return_exceptions=True
        )
    assert [type(one) for one in results if isinstance(one, Exception)] != []
    assert (await lane.submit(rows(3))).outputs["by"].item() == 1
    devices[0].may_go.set()  # it comes back, and nobody is answered twice
    await asyncio.sleep(0.05)
    assert (await lane.submit(rows(3))).outputs["by"].item() == 1
    await batcher.stop(5)


async def test_a_call_runs_on_the_device_it_names() -> None:
    batcher = Batcher(CPU, CPU)
    batcher.start()
    names = [await batcher.call(threading.get_ident, place=place) for place in (0, 1, 0, 1)]
    assert names[0] == names[2] != names[1] == names[3]
    await batcher.stop(5)


async def test_each_device_needs_a_forward() -> None:
    batcher = Batcher(CPU, CPU)
    batcher.start()
    with pytest.raises(ValueError, match="2 devices need a forward each, not 1"):
        batcher.open_lane("one", Device(0), OPTIONS, row_shape=(1,))
    await batcher.stop(5)


def test_a_named_device_is_one() -> None:
    assert choose_devices("cpu") == (CPU,)


@pytest.mark.gpu
def test_auto_takes_every_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    expected = tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    assert choose_devices("auto") == expected
