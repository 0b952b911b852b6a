"""Names inside zip files: plain relative paths that differ from each other on every disk."""

import re
import unicodedata
from typing import Final

_DRIVE: Final = re.compile(r"[A-Za-z]:")
_HARMLESS_FORMATS: Final = frozenset("\u200c\u200d")
"""Joiners of letters, without which Persian and Hindi words cannot be written."""
_UNPRINTABLE: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

NameFault = tuple[str, str]
"""A kind and a sentence."""


class NameRegister:
    """The names of one archive as they are met, so that the second of a kind is noticed."""

    def __init__(self, max_bytes: int, max_depth: int) -> None:
        self._max_bytes, self._max_depth = max_bytes, max_depth
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def add(self, raw: bytes, is_utf8: bool) -> tuple[str, bool, list[NameFault]]:
        """Read one name.

        Args:
            raw: as the archive has it.
            is_utf8: whether the archive says so; without that, many tools write it all the same,
                and what cannot be UTF-8 is IBM's code page 437, as the format has it.

        Returns:
            The name in NFC, whether it is a folder's, and what is wrong with it.
        """
        faults: list[NameFault] = []
        if len(raw) > self._max_bytes:
            limit = f"the limit is {self._max_bytes}"
            faults.append(("name_length", f"its name has {len(raw)} bytes; {limit}"))
            raw = raw[: self._max_bytes]
        try:
            text = raw.decode("utf-8", "strict")
        except UnicodeDecodeError:
            text = raw.decode("cp437")
            if is_utf8:
                faults.append(("name_encoding", "its name says that it is UTF-8, and is not"))
        name = unicodedata.normalize("NFC", text)
        is_folder = name.endswith("/")
        name = name.removesuffix("/")
        faults += self._faults(name)
        if not faults:
            faults += self._twins(name, is_folder)
        return name, is_folder, faults

    def _faults(self, name: str) -> list[NameFault]:
        faults: list[NameFault] = []
        parts = name.split("/")
        if not name:
            return [("name_empty", "it has no name")]
        if name.startswith("/"):
            faults.append(("name_absolute", "its name is an absolute path"))
        elif _DRIVE.match(name):
            faults.append(("name_drive", "its name begins with a drive"))
        elif any(part in ("", ".", "..") for part in parts):
            faults.append(("name_traversal", "its name has an empty part, '.' or '..'"))
        if "\\" in name:
            faults.append(("name_backslash", "its name has a backslash; '/' divides folders"))
        if not name.isascii() or not name.isprintable():
            faults += _unprintable(name)
        if len(parts) - 1 > self._max_depth:
            limit = f"the limit is {self._max_depth}"
            faults.append(("name_depth", f"it lies {len(parts) - 1} folders deep; {limit}"))
        return faults

    def _twins(self, name: str, is_folder: bool) -> list[NameFault]:
        """Names that a disk which ignores case, or composes letters, could not tell apart."""
        key = _key(name)
        parents = [key[:at] for at, letter in enumerate(key) if letter == "/"]
        twin = key in self._files or (not is_folder and key in self._folders)
        if twin or not self._files.isdisjoint(parents):
            return [("duplicate", "there is another of this name, but for case or composition")]
        self._folders.update(parents)
        (self._folders if is_folder else self._files).add(key)
        return []


def _key(name: str) -> str:
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", name.casefold())


def _unprintable(name: str) -> list[NameFault]:
    for letter in name:
        if unicodedata.category(letter) in _UNPRINTABLE and letter not in _HARMLESS_FORMATS:
            return [("name_control", f"its name holds the character U+{ord(letter):04X}")]
    return []
