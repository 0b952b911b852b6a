"""The key ring: which key a text is, and what that key gives."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest

from app.auth.key import MAX_TOKEN_BYTES, Key
from app.auth.scope import Scope


@dataclass(frozen=True, slots=True)
class Grant:
    """What a good key gives.

    Attributes:
        until: Unix time of its end; infinite where it has none.
    """

    name: str
    scopes: frozenset[Scope]
    until: float


class KeyRing:
    """All keys at one moment. It does not change: when keys do, another ring takes its place.

    Args:
        keys: of all sources; revoked ones open nothing.
        exists: whether keys are asked for at all, though none of them may be valid.
    """

    def __init__(self, keys: Iterable[Key] = (), *, exists: bool = True) -> None:
        self.exists = exists
        self._grants = [(bytes.fromhex(key.sha256), _grant(key)) for key in keys if not key.revoked]
        # By the hash of what was sent. Only what was found good is kept: never more than keys.
        self._remembered: dict[bytes, Grant] = {}

    def __len__(self) -> int:
        """How many keys are not revoked."""
        return len(self._grants)

    def remembered(self, token: bytes, now: float) -> Grant | None:
        """What `token` gives, if it was found good before and has not expired since."""
        grant = self._remembered.get(sha256(token).digest())
        return grant if grant is not None and now < grant.until else None

    def find(self, token: bytes, now: float) -> Grant | None:
        """What `token` gives, by comparing it with every key.

        However many keys there are and whichever it is, the same comparisons are made: time says
        nothing, neither of a known key nor of an unknown one.
        """
        if len(token) > MAX_TOKEN_BYTES:
            return None
        digest = sha256(token).digest()
        found = None
        for stored, grant in self._grants:
            if compare_digest(stored, digest):
                found = grant
        if found is None or now >= found.until:
            return None
        self._remembered[digest] = found
        return found


def _grant(key: Key) -> Grant:
    until = math.inf if key.expires is None else key.expires.timestamp()
    return Grant(key.name, frozenset(key.scopes), until)
