"""What one reference leads to: a predictor, or two that share its requests, and maybe a shadow."""

import random
from dataclasses import dataclass
from hashlib import blake2b

from app.engine.predictor import Predictor
from app.engine.shadow import Mirror
from models.store import Traffic


@dataclass(frozen=True, slots=True)
class Route:
    """Who answers a reference now.

    Attributes:
        traffic: what the store said.
        holder: answers; all requests, or those that the canary does not.
        canary: answers a share of them.
        mirror: gets a copy of all of them.
        faults: why a canary or a shadow that the store names is left out.
    """

    traffic: Traffic
    holder: Predictor
    canary: Predictor | None = None
    mirror: Mirror | None = None
    faults: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether there is nothing to choose."""
        return self.canary is None

    def choose(self, key: str | None = None) -> Predictor:
        """Who answers this request; the same for every request with the same `key`."""
        if self.canary is None:
            return self.holder
        point = random.random() if key is None else point_of(str(self.traffic.canary), key)
        return self.canary if point < self.traffic.share else self.holder

    def predictors(self) -> list[Predictor]:
        """All that it needs, as they were loaded."""
        shadow = None if self.mirror is None else self.mirror.predictor
        found = (self.holder, self.canary, shadow)
        return [one.loaded_as for one in found if one is not None]


def point_of(canary: str, key: str) -> float:
    """A number from 0 to 1 for `key`; a growing share only ever adds keys to a canary.

    The canary's name is mixed in, so that it is not always the same clients who try the new one.
    """
    digest = blake2b(f"{canary}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
