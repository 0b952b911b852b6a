"""Pictures that wait for their turn as they came, and are decoded right before their forward.

On a processor both need the same cores: decoding beside a forward tears the forward's threads
apart, lets a batch begin with the one picture that is ready, and is in vain for who is refused.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from app.engine.crew import Crew
from models.picture import PictureError

Read: TypeAlias = Callable[[bytes], Tensor]


class Pictures:
    """The rows of one request before they are numbers; it stands where a tensor of them would.

    Args:
        encoded: at least one.
        read: makes float32 `[1, *row_shape]` of one; raises PictureError.
        row_shape: of one row.
        crew: who decodes.
        first, num_all: the place of the first among all of its request, and how many those are.
    """

    is_cpu = True
    dtype = torch.float32

    def __init__(
        self,
        encoded: Sequence[bytes],
        read: Read,
        row_shape: tuple[int, ...],
        crew: Crew,
        first: int = 0,
        num_all: int | None = None,
    ) -> None:
        self.encoded = encoded
        self.crew = crew
        self.shape = torch.Size((len(encoded), *row_shape))
        self._read = read
        self._first = first
        self._num_all = len(encoded) if num_all is None else num_all

    @property
    def device(self) -> torch.device:
        """Where its rows will be."""
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, rows: slice) -> "Pictures":
        first = self._first + rows.indices(len(self))[0]
        row_shape = tuple(self.shape[1:])
        return Pictures(self.encoded[rows], self._read, row_shape, self.crew, first, self._num_all)

    def read(self, place: int) -> "Tensor | Exception":
        """The row at `place`, or why there is none."""
        try:
            return self._read(self.encoded[place])
        except PictureError as error:
            if self._num_all == 1:
                return error
            number = self._first + place + 1
            return type(error)(f"picture {number} of {self._num_all}: {error}")
        except Exception as error:
            # The edge of a request: whatever a decoder raises is this one's alone.
            return error


# What a request brings to a lane; a tensor is float32 `[n, *row_shape]`.
Rows: TypeAlias = Tensor | Pictures


def decoded(many: Sequence[Pictures]) -> "list[Tensor | Exception]":
    """The rows of each of them, or why one of its pictures cannot be used; by a crew of theirs."""
    pieces = [(pictures, place) for pictures in many for place in range(len(pictures))]
    rows = iter(many[0].crew.map(lambda piece: piece[0].read(piece[1]), pieces))
    return [_together([next(rows) for _ in range(len(pictures))]) for pictures in many]


def _together(rows: "Sequence[Tensor | Exception]") -> "Tensor | Exception":
    tensors = []
    for row in rows:
        if isinstance(row, Exception):
            return row
        tensors.append(row)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
