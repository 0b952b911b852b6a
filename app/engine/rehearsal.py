"""Before a version serves on an accelerator: its forward is recorded, for each batch size.

One recording is one short call on the device's own thread, behind everybody who predicts.
"""

import logging
import time
from functools import partial
from typing import Final

import torch
from torch import Tensor

from app.engine.execution import repeated
from app.engine.lane import Lane
from app.engine.pipeline import Pipeline
from app.engine.predictor import Predictor
from app.errors import DeadlineExceeded, QueueFull

log = logging.getLogger(__name__)

WITHIN_S: Final = 20.0
"""Sizes that have not been recorded by then run eagerly."""


async def rehearse(predictor: Predictor) -> None:
    """Record what can be recorded, of all lanes and on all devices; nothing on a processor.

    Raises:
        DeviceLost: the device was lost over it.
    """
    deadline = time.monotonic() + WITHIN_S
    for lane in predictor.lanes:
        rows = _rows(predictor, lane)
        for place, run in enumerate(lane.runs):
            if isinstance(run, Pipeline) and run.can_record:
                await _record(lane, place, run, rows, deadline)


async def _record(lane: Lane, place: int, run: Pipeline, rows: Tensor, deadline: float) -> None:
    """The smallest batch first: it is the one that a recording helps most."""
    for size in lane.sizes:
        try:
            record = partial(run.record, repeated(rows, size))
            told = await lane.call(record, deadline, place=place)
        except (DeadlineExceeded, QueueFull) as error:
            log.info("%s from %d rows on is not recorded: %s", lane.name, size, error)
            return
        log.info("%s of %d rows %s", lane.name, size, told)


def _rows(predictor: Predictor, lane: Lane) -> Tensor:
    """Rows as they come in this lane: golden ones, or one of zeros."""
    reference = predictor.loaded.reference
    if lane is predictor.lane:
        return reference.inputs.cpu()
    if reference.sent_bytes is not None:
        return reference.sent_bytes
    return torch.zeros((1, *predictor.manifest.preprocessing.raw_shape), dtype=torch.uint8)
