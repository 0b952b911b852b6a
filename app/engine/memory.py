"""How many bytes of weights are live: those that serve, and those on their way in and out."""

import contextlib
import weakref
from collections.abc import Iterator

import torch

from app.engine.predictor import Predictor
from models.device import memory_bytes

MEBIBYTE = 1024 * 1024
# Of all memory; the rest is for activations, pictures, and whatever else runs.
DEVICE_SHARE, HOST_SHARE = 0.8, 0.5


def budget_bytes(budget_mb: int, device: torch.device) -> int:
    """The budget that a setting names; where it names none, a share of the memory there is."""
    if budget_mb:
        return budget_mb * MEBIBYTE
    share = HOST_SHARE if device.type == "cpu" else DEVICE_SHARE
    return int(memory_bytes(device) * share)


class Memory:
    """An account against a budget; it evicts nobody itself. Belongs to the event loop.

    Args:
        budget_bytes: for the weights of all that is live; None for no bound.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        # Weak: a predictor counts until the last request that holds it has gone.
        self._open: weakref.WeakSet[Predictor] = weakref.WeakSet()
        self._coming_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Of all predictors that somebody holds, and of those that are being loaded."""
        return self._coming_bytes + sum(one.memory_bytes for one in self._open)

    def count(self, predictor: Predictor) -> None:
        """It is live from now on, until nobody holds it."""
        self._open.add(predictor)

    def lacks(self, size_bytes: int) -> bool:
        """Whether so many more bytes would be too many."""
        return self.budget_bytes is not None and self.used_bytes + size_bytes > self.budget_bytes

    @contextlib.contextmanager
    def coming(self, size_bytes: int) -> Iterator[None]:
        """So many bytes are on their way in."""
        self._coming_bytes += size_bytes
        try:
            yield
        finally:
            self._coming_bytes -= size_bytes
