"""A key: what it may do and until when. Only the hash of it is kept, so it is shown once.

A key made here holds 256 random bits, and a fast hash is enough for it: there is nothing to guess.
"""

import re
import secrets
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from app.auth.scope import ALL_SCOPES, Scope

ALL: Final = "all"
NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MADE_HERE: Final = re.compile(rb"ptl_[0-9a-f]{8}_[A-Za-z0-9_-]{43}")
MAX_TOKEN_BYTES: Final = 512


class KeyFault(Exception):
    """What keys are refused for."""


class BadKey(KeyFault):
    """A name, a scope or a key from outside that cannot be one."""


class Key(BaseModel):
    """One key, without the key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    name: str = Field(pattern=NAME)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """What has become of it."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


def new_key(name: str, scopes: tuple[Scope, ...], expires: datetime | None) -> tuple[Key, str]:
    """A key and its secret text, which nobody can be told a second time.

    Raises:
        BadKey: the name is not one, or there is no scope.
    """
    identifier = secrets.token_hex(4)
    token = f"ptl_{identifier}_{secrets.token_urlsafe(32)}"
    if not re.fullmatch(NAME, name):
        raise BadKey(
            f"{name[:80]!r} cannot be the name of a key: 1 to 64 letters, digits, '.', '_' and '-'"
        )
    if not scopes:
        raise BadKey(f"a key needs at least one scope of {', '.join(ALL_SCOPES)}")
    key = Key(
        id=identifier,
        name=name,
        sha256=sha256(token.encode()).hexdigest(),
        scopes=scopes,
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
    )
    return key, token


def scopes_from(words: list[str]) -> tuple[Scope, ...]:
    """Scopes by their names, each once, in the order of the list; `all` means every one.

    Raises:
        BadKey: a word is no scope.
    """
    unknown = [word for word in words if word != ALL and word not in ALL_SCOPES]
    if unknown:
        known = ", ".join((*ALL_SCOPES, ALL))
        raise BadKey(f"{unknown[0][:80]!r} is no scope; the scopes are {known}")
    return tuple(scope for scope in ALL_SCOPES if ALL in words or scope in words)
