"""Links that open one page for a while without a key: no browser sends a header with a link."""

import hmac
import logging
import re
import secrets
import time
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Final

from app.auth.store import write_private

log = logging.getLogger(__name__)

SECRET_BYTES: Final = 32
QUERY: Final = re.compile(rb"expires=([0-9]{1,12})&signature=([0-9a-f]{64})")


class LinkSigner:
    """Signs paths with a secret that rests beside the keys; removing that file ends every link.

    Args:
        home: the folder of the secret, `links.secret`, which is made at the first use.
        lifetime_s: how long a link opens its page.
    """

    def __init__(self, home: Path, lifetime_s: float) -> None:
        self._path = home / "links.secret"
        self._lifetime_s = lifetime_s

    def sign(self, path: str) -> str:
        """`path` with the query that opens it."""
        expires = int(time.time() + self._lifetime_s)
        return f"{path}?expires={expires}&signature={self._signature(path, expires)}"

    def holds(self, path: str, query: bytes) -> bool:
        """Whether `query`, all of it, opens `path` now."""
        parts = QUERY.fullmatch(query)
        if parts is None:
            return False
        expected = self._signature(path, int(parts[1])).encode()
        return hmac.compare_digest(expected, parts[2]) and time.time() < int(parts[1])

    def _signature(self, path: str, expires: int) -> str:
        return hmac.new(self._secret, f"{expires} {path}".encode(), sha256).hexdigest()

    @cached_property
    def _secret(self) -> bytes:
        """Read, or made, once in a process; of several processes all get the same."""
        try:
            if not self._path.exists():
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_private(self._path, secrets.token_bytes(SECRET_BYTES), once=True)
            found = self._path.read_bytes()
        except OSError as error:
            log.warning("%s: %s; signed links end with this process", self._path, error)
            return secrets.token_bytes(SECRET_BYTES)
        # An empty file is no secret: anybody could sign with it.
        return found if len(found) >= SECRET_BYTES else secrets.token_bytes(SECRET_BYTES)
