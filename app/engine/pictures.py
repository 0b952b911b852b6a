"""Pictures that wait for their turn as they came, and are decoded right before their forward.

On a processor both need the same cores: decoding beside a forward tears the forward's threads
apart, lets a batch begin with the one picture that is ready, and is in vain for who is refused.
On a device that decodes, it is worth its while for many pictures at once.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from app.engine.crew import Crew
from app.engine.pipeline import Accelerator
from models.picture import EncodedPicture, PictureError
from models.resizing import Threads


class Reader(Protocol):
    """Makes rows of encoded pictures, on a device's thread."""

    row_shape: tuple[int, ...]
    dtype: torch.dtype

    def read(
        self, pictures: Sequence[EncodedPicture], accelerator: Accelerator | None
    ) -> "list[Tensor | Exception]":
        """A row `[1, *row_shape]` of each, or why there is none.

        Args:
            accelerator: whose thread this is; None for a processor.
        """


class CrewReader:
    """Threads of the processor that decode.

    Args:
        decode: makes `[1, *row_shape]` of one, with the threads that may share in it;
            raises PictureError.
    """

    def __init__(
        self,
        decode: Callable[[EncodedPicture, Threads | None], Tensor],
        row_shape: tuple[int, ...],
        crew: Crew,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.row_shape = row_shape
        self.dtype = dtype
        self._decode = decode
        self._crew = crew

    def read(
        self, pictures: Sequence[EncodedPicture], accelerator: Accelerator | None
    ) -> "list[Tensor | Exception]":
        """In host memory, whoever asks; all share in a picture that comes alone."""
        del accelerator
        if len(pictures) == 1:
            return [self._one(pictures[0], self._crew)]
        return self._crew.map(self._one, pictures)

    def _one(self, picture: EncodedPicture, threads: Threads | None = None) -> "Tensor | Exception":
        try:
            return self._decode(picture, threads)
        except Exception as error:
            # The edge of a request: whatever a decoder raises is this one's alone.
            return error


class Pictures:
    """The rows of one request before they are numbers; it stands where a tensor of them would.

    Args:
        encoded: at least one.
        first, num_all: the place of the first among all of its request, and how many those are.
    """

    is_cpu = True

    def __init__(
        self,
        encoded: Sequence[EncodedPicture],
        reader: Reader,
        first: int = 0,
        num_all: int | None = None,
    ) -> None:
        self.encoded = encoded
        self.reader = reader
        self.dtype = reader.dtype
        self.shape = torch.Size((len(encoded), *reader.row_shape))
        self._first = first
        self._num_all = len(encoded) if num_all is None else num_all

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return torch.device("cpu")

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, rows: slice) -> "Pictures":
        first = self._first + rows.indices(len(self))[0]
        return Pictures(self.encoded[rows], self.reader, first, self._num_all)

    def together(self, rows: "Sequence[Tensor | Exception]") -> "Tensor | Exception":
        """The rows that were read of them as one tensor, or why a picture cannot be used."""
        tensors = []
        for place, row in enumerate(rows):
            if isinstance(row, Exception):
                return self._named(row, place)
            tensors.append(row)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _named(self, error: Exception, place: int) -> Exception:
        """Which picture it was, where there are several."""
        if self._num_all == 1 or not isinstance(error, PictureError):
            return error
        number = self._first + place + 1
        return type(error)(f"picture {number} of {self._num_all}: {error}")


# What a request brings to a lane; a tensor is float32 `[n, *row_shape]`, or uint8 for pixels.
Rows: TypeAlias = Tensor | Pictures


def decoded(
    many: Sequence[Pictures], accelerator: Accelerator | None = None
) -> "list[Tensor | Exception]":
    """The rows of each of them, or why one of its pictures cannot be used; read all together.

    Args:
        many: of one lane, so that any of their readers is theirs.
        accelerator: whose thread this is; None for a processor.
    """
    encoded = [one for pictures in many for one in pictures.encoded]
    rows = iter(many[0].reader.read(encoded, accelerator))
    return [pictures.together([next(rows) for _ in pictures.encoded]) for pictures in many]
