"""Samples are read in pieces, on any thread, through every preprocessing that is wanted."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.picture import PictureError
from models.preprocessing import Preprocessing
from models.seen import short_digests
from training.samples import InMemory
from training.source import Part

MAX_PIECE_ROWS, MAX_PIECE_BYTES = 128, 4 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Samples that were read: indices and targets int64 `[n]`, inputs of each preprocessing."""

    indices: Tensor
    targets: Tensor
    digests: Tensor | None
    inputs: tuple[Tensor, ...]
    faults: tuple[str, ...]
    seconds: float

    def rows(self, chosen: Any) -> "Piece":
        """Some of them."""
        inputs = tuple(one[chosen] for one in self.inputs)
        return Piece(self.indices[chosen], self.targets[chosen], None, inputs, (), 0.0)


class Reader:
    """Reads samples of a part through one preprocessing or more; may be called on any thread."""

    def __init__(
        self, part: Part, preprocessings: Sequence[Preprocessing], needs_digests: bool
    ) -> None:
        self._targets, self._digests = part.targets, part.digests
        self._preprocessings, self._needs_digests = preprocessings, needs_digests
        self._samples = [part.samples.prepared(one) for one in preprocessings]
        bytes_each = sum(4 * math.prod(one.input_shape) for one in preprocessings)
        self.max_rows = max(1, min(MAX_PIECE_ROWS, MAX_PIECE_BYTES // max(1, bytes_each)))

    def read(self, chosen: range) -> Piece:
        """These samples, without those that cannot be read, and what ails them."""
        began = time.perf_counter()
        if not self._needs_digests and all(isinstance(one, InMemory) for one in self._samples):
            return self._at_once(chosen, began)
        good: list[int] = []
        digests: list[bytes] = []
        rows: list[list[Tensor]] = [[] for _ in self._samples]
        faults: list[str] = []
        for index in chosen:
            try:
                read = [samples.read(index) for samples in self._samples]
            except (PictureError, ValueError, OSError) as error:
                faults.append(f"{self._samples[0].name(index)}: {error}")
                continue
            good.append(index)
            digests.append(read[0][1])
            for place, (tensor, _) in enumerate(read):
                rows[place].append(tensor)
        indices = torch.tensor(good, dtype=torch.int64)
        return Piece(
            indices,
            self._targets[indices],
            short_digests(digests) if self._needs_digests else None,
            tuple(self._finished(place, torch.stack(one)) for place, one in enumerate(rows))
            if good
            else tuple(torch.empty(0) for _ in rows),
            tuple(faults),
            time.perf_counter() - began,
        )

    def _at_once(self, chosen: range, began: float) -> Piece:
        rows = slice(chosen.start, chosen.stop)
        inputs = tuple(
            self._finished(place, one.data[rows])
            for place, one in enumerate(self._samples)
            if isinstance(one, InMemory)
        )
        indices = torch.arange(chosen.start, chosen.stop)
        seconds = time.perf_counter() - began
        return Piece(indices, self._targets[rows], None, inputs, (), seconds)

    def _finished(self, place: int, raw: Tensor) -> Tensor:
        return self._preprocessings[place].finish(raw)


def joined(pieces: Sequence[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    inputs = tuple(torch.cat(one) for one in zip(*(piece.inputs for piece in pieces), strict=True))
    indices = torch.cat([one.indices for one in pieces])
    return Piece(indices, torch.cat([one.targets for one in pieces]), None, inputs, (), 0.0)
