"""One batch: rows of several items side by side, through the network, and back to their owners.

It runs on whichever thread computes and knows neither queues nor event loops.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from app.engine.item_queue import Item, Outputs, Part
from app.engine.pictures import Pictures, decoded
from app.engine.pipeline import Accelerator, Flight, Pipeline
from app.engine.scratch import Scratch

# Without the Python around it, which takes as long as the rest.
_split = torch.split_with_sizes
# A forward over [size, ...] rows in host memory; every output has `size` rows.
Run = Callable[[Tensor], Mapping[str, Tensor]]


class WrongOutput(Exception):
    """The network answered something else than named tensors of as many rows as it was asked."""


class Batch:
    """Parts that share a forward: afterwards either `outputs`, one a part, or `error` is set.

    Parts whose pictures cannot be used leave it before the forward, and are in `unusable`.
    """

    __slots__ = (
        "compute_s",
        "decode_s",
        "error",
        "flight",
        "num_rows",
        "outputs",
        "parts",
        "padded",
        "processor_s",
        "size",
        "unusable",
    )

    def __init__(self, parts: Sequence[Part], num_rows: int, padded: Callable[[int], int]) -> None:
        self.parts = parts
        self.num_rows = num_rows
        self.padded = padded
        self.size = padded(num_rows)
        self.unusable: list[tuple[Item, Exception]] = []
        self.outputs: list[Outputs] = []
        self.error: Exception | None = None
        self.flight: Flight | None = None
        self.decode_s = 0.0
        # Elapsed, and what this thread really computed: less when the machine is busy.
        self.compute_s = 0.0
        self.processor_s = 0.0

    def run(self, run: Run, scratch: Scratch) -> None:
        """Compute, on the thread of `scratch`; whatever the network raises is kept in `error`."""
        rows = self._decoded()
        if not rows:
            return
        started, processor_started = time.monotonic(), time.thread_time()
        try:
            with torch.inference_mode():
                self.outputs = self._separate(run(self._together(rows, scratch)), scratch)
        except Exception as error:
            # The edge of a request: a network may raise anything, and its batch alone shall fail.
            self.error = error
        self.compute_s = time.monotonic() - started
        self.processor_s = time.thread_time() - processor_started

    def start(self, pipeline: Pipeline) -> None:
        """Let a device begin with it; `land` waits until it is done."""
        try:
            with torch.inference_mode():
                self.flight = self._begun(pipeline)
        except Exception as error:
            self.error = error

    def land(self, pipeline: Pipeline) -> None:
        """Take what the device answered; whatever it raises is kept in `error`."""
        flight, self.flight = self.flight, None
        try:
            with torch.inference_mode():
                if flight is not None:
                    outputs, self.compute_s = pipeline.land(flight)
                    self.outputs = self._separate(outputs, None)
        except Exception as error:
            self.error = error

    def halves(self) -> list["Batch"]:
        """The same rows as two batches, the first with the larger half; a single row as one."""
        middle = (self.num_rows + 1) // 2
        first: list[Part] = []
        second: list[Part] = []
        num_rows = 0
        for part in self.parts:
            here = min(max(middle - num_rows, 0), part.stop - part.start)
            cut = part.start + here
            if here:
                first.append(Part(part.item, part.rows[:here], part.start, cut))
            if cut < part.stop:
                second.append(Part(part.item, part.rows[here:], cut, part.stop))
            num_rows += part.stop - part.start
        rest = self.num_rows - middle
        halves = ((first, middle), (second, rest))
        return [Batch(parts, num_rows, self.padded) for parts, num_rows in halves if parts]

    def _begun(self, pipeline: Pipeline) -> Flight | None:
        """What flies; None where no picture of it could be used."""
        rows = self._decoded(pipeline.accelerator)
        return pipeline.start(self._filled(rows), self.size) if rows else None

    def _decoded(self, accelerator: Accelerator | None = None) -> list[Tensor]:
        """The rows of every part; parts that turn out to have none leave the batch."""
        waiting = [part.rows for part in self.parts if isinstance(part.rows, Pictures)]
        if not waiting:
            return [part.rows for part in self.parts if isinstance(part.rows, Tensor)]
        began = time.monotonic()
        results = iter(_decoded_by(accelerator, waiting))
        rows, parts = [], []
        for part in self.parts:
            row = part.rows if isinstance(part.rows, Tensor) else next(results)
            if isinstance(row, Exception):
                self.unusable.append((part.item, row))
                self.num_rows -= part.stop - part.start
            else:
                rows.append(row)
                parts.append(part)
        if self.unusable and parts:
            self.size = self.padded(self.num_rows)
        self.parts = parts
        self.decode_s = time.monotonic() - began
        return rows

    def _together(self, rows: list[Tensor], scratch: Scratch) -> Tensor:
        """All rows as one tensor of `size` rows; a lone part that needs no padding as it is."""
        if len(rows) == 1 and self.size == self.num_rows:
            return rows[0]
        return scratch.joined(self._filled(rows), self.size)

    def _filled(self, rows: list[Tensor]) -> list[Tensor]:
        num_missing = self.size - self.num_rows
        if num_missing:
            # Real rows as padding: zeros may be slow (denormals) or NaN in some networks.
            return [*rows, *[rows[-1][-1:]] * num_missing]
        return rows

    def _separate(self, outputs: Mapping[str, Tensor], scratch: Scratch | None) -> list[Outputs]:
        if not isinstance(outputs, Mapping) or not outputs:
            raise WrongOutput(f"the network answered {type(outputs).__name__}, not named tensors")
        pieces = [self._pieces(output, scratch) for output in outputs.values()]
        return [dict(zip(outputs, piece, strict=True)) for piece in zip(*pieces, strict=True)]

    def _pieces(self, output: Tensor, scratch: Scratch | None) -> Sequence[Tensor]:
        if output.ndim == 0 or output.shape[0] != self.size:
            raise WrongOutput(
                f"the network answered a tensor of shape {tuple(output.shape)} to {self.size} rows"
            )
        # One copy a batch, and on the computing thread: it also waits until the device is done.
        if not output.is_cpu:
            output = output.cpu()
        elif scratch is not None and scratch.holds(output):
            output = output.clone()
        if len(self.parts) == 1 and self.size == self.num_rows:
            return (output,)
        lengths = [part.stop - part.start for part in self.parts]
        if self.size == self.num_rows:
            return _split(output, lengths)
        return _split(output, [*lengths, self.size - self.num_rows])[:-1]


def _decoded_by(
    accelerator: Accelerator | None, waiting: Sequence[Pictures]
) -> "list[Tensor | Exception]":
    if accelerator is None:
        return decoded(waiting)
    return accelerator.streams.made("compute", lambda: decoded(waiting, accelerator))


def joined(pieces: Sequence[tuple[int, Outputs]]) -> Outputs:
    """The outputs of one request from its parts: (first row, outputs) in any order."""
    ordered = [outputs for _, outputs in sorted(pieces, key=lambda piece: piece[0])]
    return {name: torch.cat([outputs[name] for outputs in ordered]) for name in ordered[0]}
