"""Keys that are given from outside: one in the environment, many in a mounted secret."""

import logging
import re
from hashlib import sha256
from pathlib import Path
from typing import Final

from app.auth.key import NAME, BadKey, Key, scopes_from
from app.auth.scope import ALL_SCOPES
from app.auth.store import MAX_FILE_BYTES, MAX_KEYS, KeysUnreadable

log = logging.getLogger(__name__)

ENVIRONMENT: Final = "environment"
TOKEN: Final = re.compile(r"[!-~]{16,512}")
DIGEST: Final = re.compile(r"(?:sha256:)?([0-9A-Fa-f]{64})")


def environment_key(token: str) -> Key:
    """The key that `PYTORCHLIB_API_KEY` holds; it has all scopes.

    Raises:
        BadKey: too short to be a secret, or not to be sent in a header; the text is not told.
    """
    if not TOKEN.fullmatch(token):
        raise BadKey(
            "PYTORCHLIB_API_KEY must be 16 to 512 visible ASCII characters without spaces; "
            "`openssl rand -hex 32` makes one"
        )
    digest = sha256(token.encode()).hexdigest()
    return Key(id=digest[:8], name=ENVIRONMENT, sha256=digest, scopes=ALL_SCOPES)


def keys_in(path: Path) -> tuple[Key, ...]:
    """The keys of a file with `name scopes hash` on each line.

    A line that cannot be read is left out, and told by its number: what stands in it may be
    secret. Empty lines and those that start with `#` say nothing.

    Raises:
        FileNotFoundError: there is no such file.
        KeysUnreadable: it cannot be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeysUnreadable(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise KeysUnreadable(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    lines = text.decode("utf-8", "replace").lstrip("\ufeff").split("\n")
    found = [_key(path, number, line) for number, line in enumerate(lines, 1)]
    keys = tuple(key for key in found if key is not None)
    if len(keys) > MAX_KEYS:
        raise KeysUnreadable(f"{path} holds more than {MAX_KEYS} keys")
    return keys


def line_of(key: Key) -> str:
    """`key` as a line of such a file."""
    return f"{key.name} {','.join(key.scopes)} sha256:{key.sha256}"


def _key(path: Path, number: int, line: str) -> Key | None:
    words = line.split()
    if not words or words[0].startswith("#"):
        return None
    digest = DIGEST.fullmatch(words[-1])
    try:
        scopes = scopes_from(words[1].split(",")) if len(words) == 3 else ()
    except BadKey:
        scopes = ()
    if not scopes or digest is None or not re.fullmatch(NAME, words[0]):
        log.error(
            "line %d of %s is not `name scope,scope sha256:HASH` and gives no key", number, path
        )
        return None
    text = digest[1].lower()
    return Key(id=text[:8], name=words[0], sha256=text, scopes=scopes)
