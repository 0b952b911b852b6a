"""What dropout draws for one rank's piece of a batch: what a single process would draw for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from training.order import Batch

DROPOUTS: Final = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class DrawnForAll(TorchFunctionMode):
    """In the block, dropout and stochastic depth draw for the whole batch and keep a piece's rows.

    So what is drawn for a sample does not depend on the rank that it falls to, nor on how many
    there are. All ranks must begin with the same seed. What a network draws in another way, or not
    by rows, is the same in every piece.

    Args:
        piece: of this rank.
        num_rows: that the network sees of it.
    """

    def __init__(self, piece: Batch, num_rows: int) -> None:
        super().__init__()
        self._rows = slice(piece.first, piece.first + num_rows)
        self._num_rows, self._num_whole = num_rows, piece.size

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every function of torch, outside of itself."""
        given = kwargs or {}
        if func in DROPOUTS:
            return self._dropped(func, *args, **given)
        if func is Tensor.bernoulli_ and self._has_rows(args[0]):
            whole = func(self._ones(args[0]), *args[1:], **given)
            return args[0].copy_(whole[self._rows])
        return func(*args, **given)

    def _dropped(
        self,
        dropout: Callable[..., Tensor],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or not self._has_rows(input):
            return dropout(input, p, training, inplace)
        factors = dropout(self._ones(input), p)[self._rows]
        return input.mul_(factors) if inplace else input * factors

    def _has_rows(self, tensor: Tensor) -> bool:
        return tensor.dim() > 1 and len(tensor) == self._num_rows

    def _ones(self, piece: Tensor) -> Tensor:
        """For all rows of the batch; they lie in memory as the piece's do, and are drawn so."""
        ones = piece.new_ones(self._num_whole, *piece.shape[1:])
        is_last = piece.dim() == 4 and not piece.is_contiguous()
        return ones.to(memory_format=torch.channels_last) if is_last else ones
