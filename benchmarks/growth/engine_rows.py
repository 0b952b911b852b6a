"""What a batch costs the engine as it grows, without HTTP."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from app.engine.batcher import Batcher, Lane, LaneOptions
from benchmarks.batcher import forward_of, large
from benchmarks.growth.row import Curve, Measure, Row
from benchmarks.rounds import Sample

SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
SHAPE: Final = (3, 96, 96)
LEAST_S: Final = 0.2


def rows() -> list[Row]:
    """All of this file."""
    curves = [
        Curve("cpu_us", "engine's CPU us a batch", 1.0),
        Curve("cpu_us_a_row", "engine's CPU us a row", 0.0),
    ]
    return [Row("batch", "rows of a batch", SIZES, curves, _batches)]


@contextmanager
def _batches(_: Path) -> Iterator[Measure]:
    """Convolutions, on the device thread with one thread."""
    batcher = Batcher(torch.device("cpu"))

    async def open_lane() -> Lane:
        batcher.start()
        options = LaneOptions(max_batch_items=SIZES[-1])
        lane = batcher.open_lane("rows", forward_of(large()), options, row_shape=SHAPE)
        await lane.warm_up()
        return lane

    async def submit(size: int) -> Sample:
        rows, count = torch.zeros(size, *SHAPE), 0
        cpu, began = time.process_time(), time.monotonic()
        while time.monotonic() < began + LEAST_S:
            await lane.submit(rows)
            count += 1
        cpu_us = (time.process_time() - cpu) * 1e6 / count
        return {"cpu_us": cpu_us, "cpu_us_a_row": cpu_us / size}

    with asyncio.Runner() as runner:
        lane = runner.run(open_lane())
        yield lambda size: runner.run(submit(size))
        runner.run(batcher.stop(5))
