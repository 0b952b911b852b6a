"""What a version has seen: short digests of the samples that it was trained and selected on.

They lie in the checkpoint as `seen.safetensors`, so that an evaluation can leave out what is no
evidence. Checkpoints without the file, such as imported ones, have seen nothing that is known.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SEEN: Final = "seen.safetensors"
DIGEST_BYTES: Final = 16
MAX_SEEN_BYTES: Final = 1 << 30
"""Sixty-seven million samples."""


class SeenDamaged(Exception):
    """The list of seen samples is not what it should be."""


@dataclass(frozen=True)
class Seen:
    """Samples by the first 16 bytes of the sha256 of what they were read from.

    Attributes:
        train: uint8 `[n, 16]`, sorted, each once: the weights were learned from them.
        validation: the same: the best weights were chosen by them.
    """

    train: Tensor = field(default_factory=lambda: short_digests([]))
    validation: Tensor = field(default_factory=lambda: short_digests([]))

    @classmethod
    def of(cls, train: Tensor, validation: Tensor) -> "Seen":
        """From digests in any order, uint8 `[n, 16]`."""
        return cls(_sorted(train), _sorted(validation))

    def __bool__(self) -> bool:
        return bool(len(self.train) or len(self.validation))

    def with_parent(self, parent: "Seen") -> "Seen":
        """What weights have seen that began as another version's."""
        return Seen.of(
            torch.cat([self.train, parent.train]),
            torch.cat([self.validation, parent.validation]),
        )

    def without(self, digests: Tensor) -> "Seen":
        """The same but for these samples, uint8 `[n, 16]` in any order."""
        known = _sorted(digests)
        return Seen(
            self.train[~_among(self.train, known)], self.validation[~_among(self.validation, known)]
        )

    def tensors(self) -> dict[str, Tensor]:
        """As they lie in the file."""
        return {"train": self.train, "validation": self.validation}

    def was_trained_on(self, digests: Tensor) -> Tensor:
        """bool `[n]`: which of `digests`, uint8 `[n, 16]`, the weights were learned from."""
        return _among(digests, self.train)

    def was_selected_on(self, digests: Tensor) -> Tensor:
        """bool `[n]`: which of `digests` the best weights were chosen by."""
        return _among(digests, self.validation)


def short_digests(digests: Sequence[bytes]) -> Tensor:
    """The first 16 bytes of each, uint8 `[n, 16]`."""
    joined = bytearray(b"".join(digest[:DIGEST_BYTES] for digest in digests))
    if not joined:
        return torch.empty(0, DIGEST_BYTES, dtype=torch.uint8)
    return torch.frombuffer(joined, dtype=torch.uint8).view(-1, DIGEST_BYTES)


def read_seen(folder: Path, files: Iterable[str]) -> Seen:
    """What the checkpoint in `folder` has seen; nothing where `files`, its manifest's, has no list.

    Raises:
        SeenDamaged: the file is not what it should be.
    """
    if SEEN not in files:
        return Seen()
    path = folder / SEEN
    try:
        if path.stat().st_size > MAX_SEEN_BYTES:
            raise SeenDamaged(f"{SEEN} has more than {MAX_SEEN_BYTES} bytes")
        return _checked(load_file(path))
    except (SafetensorError, OSError) as error:
        raise SeenDamaged(f"{SEEN} cannot be read: {error}") from None


def _checked(tensors: Mapping[str, Tensor]) -> Seen:
    if tensors.keys() != {"train", "validation"}:
        raise SeenDamaged(f"{SEEN} must hold exactly train and validation")
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if tensor.dtype != torch.uint8 or tensor.ndim != 2 or shape[1] != DIGEST_BYTES:
            raise SeenDamaged(f"{name} in {SEEN} must be uint8 [n, {DIGEST_BYTES}], not {shape}")
    # Sorted again: a file from elsewhere is not believed to be.
    return Seen.of(tensors["train"], tensors["validation"])


def _sorted(digests: Tensor) -> Tensor:
    keys = np.unique(_keys(digests))
    return torch.from_numpy(keys.view(np.uint8).reshape(-1, DIGEST_BYTES))


def _among(digests: Tensor, known: Tensor) -> Tensor:
    """Which of `digests` are among `known`, which is sorted."""
    if not len(known):
        return torch.zeros(len(digests), dtype=torch.bool)
    keys, wanted = _keys(known), _keys(digests)
    places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return torch.from_numpy(keys[places] == wanted)


def _keys(digests: Tensor) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """One comparable value a row: numpy orders opaque bytes as memory does."""
    rows = np.ascontiguousarray(digests.numpy())
    return rows.view(np.dtype((np.void, DIGEST_BYTES))).reshape(-1)
