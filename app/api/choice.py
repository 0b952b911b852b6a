"""Which version answers a request: what the path names, unless a header pins another.

`X-Model-Version: 3` asks for version 3 of the model in the path; `X-Canary-Key: anna` always leads
to the same of two versions that share an alias.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

from app.errors import BadRequest

PIN: Final = b"x-model-version"
KEY: Final = b"x-canary-key"
MAX_DIGITS: Final = 9
MAX_KEY_BYTES: Final = 256


class Asked(NamedTuple):
    """What a request asks `LiveModels.get` for."""

    name: str
    version: str | None
    canary_key: str | None


def asked(headers: Mapping[bytes, bytes], name: str, version: str | None) -> Asked:
    """What path and headers ask for.

    Raises:
        BadRequest: a header that names nothing, or contradicts the path.
    """
    pin = headers.get(PIN)
    if pin is not None:
        version = _pinned(pin, version)
    key = headers.get(KEY)
    if key is None:
        return Asked(name, version, None)
    if len(key) > MAX_KEY_BYTES:
        raise BadRequest(f"X-Canary-Key has more than {MAX_KEY_BYTES} bytes", param="X-Canary-Key")
    return Asked(name, version, key.decode("latin-1"))


def _pinned(pin: bytes, version: str | None) -> str:
    """The pin wins over an alias; two different numbers contradict each other."""
    number = pin.decode("latin-1").strip()
    if not (number.isascii() and number.isdecimal() and len(number) <= MAX_DIGITS):
        raise BadRequest(
            f"X-Model-Version is {number[:40]!r}; it must be the number of a version",
            param="X-Model-Version",
        )
    number = str(int(number))
    if version is not None and version.isdecimal() and version != number:
        raise BadRequest(
            f"the path asks for version {version[:20]}, and X-Model-Version for {number}",
            param="X-Model-Version",
        )
    return number
