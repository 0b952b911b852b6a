"""One pass over samples that are not in memory yet: every fault found, fingerprints taken, and
the samples kept where they fit the budget.
"""

import hashlib
import math
from collections.abc import Generator, Mapping, Sequence

from torch import Tensor

from training.faults import DatasetFaults
from training.feed import Piece, pieces
from training.order import in_turn
from training.progress import Progress
from training.samples import InMemory, digest_of
from training.source import Part

READ_BATCH = 64


class Reading:
    """The pass; afterwards it holds the parts as they will be fed, and their fingerprint.

    Args:
        source: what a person calls the dataset.
        parts: prepared with the picture steps of the preprocessing.
        raw_shape: what every sample must then be.
        budget_bytes: up to this much is kept in memory.
        num_workers: processes that read.
    """

    def __init__(
        self,
        source: str,
        parts: Mapping[str, Part],
        raw_shape: tuple[int, ...],
        budget_bytes: int,
        num_workers: int,
    ) -> None:
        self.parts = dict(parts)
        self._source, self._raw_shape, self._num_workers = source, raw_shape, num_workers
        self._unread = {k: part for k, part in parts.items() if not _in_memory(part)}
        self._num_samples = sum(len(part) for part in self._unread.values())
        self._budget_bytes = budget_bytes
        self._faults: list[str] = []
        self._digests: dict[str, Sequence[bytes]] = {
            name: [digest_of(part.samples.data)]
            for name, part in parts.items()
            if isinstance(part.samples, InMemory)
        }

    def run(self) -> Generator[Progress, None, None]:
        """Read what is not in memory yet.

        Raises:
            DatasetFaults: all that is wrong in any part.
        """
        done = 0
        for name, part in self._unread.items():
            digests: list[bytes] = []
            buffer: Tensor | None = None
            for piece in pieces(part.samples, in_turn(len(part), READ_BATCH), self._num_workers):
                buffer = self._take(piece, len(part), len(digests), buffer)
                digests += piece.digests
                done += len(piece.digests) + len(piece.faults)
                yield Progress("read", done, self._num_samples)
            self._digests[name] = digests
            samples = part.samples if buffer is None else InMemory(buffer)
            whole = tuple(digests) if len(digests) == len(part) else ()
            self.parts[name] = Part(samples, part.targets, whole)
        self._check_memory()
        if self._faults:
            raise DatasetFaults(self._source, self._faults)

    def fingerprint(self, classes: Sequence[str]) -> str:
        """Hex sha256 over the sources of all samples, their labels and the names of these."""
        digest = hashlib.sha256("\0".join(classes).encode())
        for name in sorted(self.parts):
            digest.update(name.encode())
            digest.update(self.parts[name].targets.numpy().tobytes())
            for sample in self._digests[name]:
                digest.update(sample)
        return digest.hexdigest()

    def _take(
        self, piece: Piece, num_samples: int, position: int, buffer: Tensor | None
    ) -> Tensor | None:
        """Note the faults of `piece` and put its samples into the buffer, if one is kept."""
        self._faults += piece.faults
        if not len(piece.data) or not self._fits(piece.data):
            return buffer
        if buffer is None:
            buffer = piece.data.new_empty((num_samples, *piece.data.shape[1:]))
        if piece.data.shape[1:] == buffer.shape[1:]:
            buffer[position : position + len(piece.data)] = piece.data
        else:
            self._faults.append(f"samples differ in shape: {_shapes(piece.data, buffer)}")
        return buffer

    def _fits(self, data: Tensor) -> bool:
        bytes_each = math.prod(data.shape[1:]) * data.element_size()
        return self._num_samples * bytes_each <= self._budget_bytes

    def _check_memory(self) -> None:
        for name, part in self.parts.items():
            if isinstance(part.samples, InMemory):
                shape = tuple(part.samples.data.shape[1:])
                if shape != self._raw_shape and not self._faults:
                    self._faults.append(
                        f"{name}: samples have shape {list(shape)} "
                        f"where the preprocessing takes {list(self._raw_shape)}"
                    )


def _in_memory(part: Part) -> bool:
    return isinstance(part.samples, InMemory)


def _shapes(first: Tensor, second: Tensor) -> str:
    return " and ".join(str(list(tensor.shape[1:])) for tensor in (first, second))
