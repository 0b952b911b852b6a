"""`keys.json` in the home folder: the keys that `pytorchlib keys` makes and revokes."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from app.auth.key import Key, KeyFault, new_key
from app.auth.scope import Scope
from models.file_lock import locked

MAX_KEYS: Final = 1000
MAX_FILE_BYTES: Final = 1024 * 1024
LOCK_TIMEOUT_S: Final = 10.0


class KeysUnreadable(KeyFault):
    """A file of keys cannot be read, or is not what was written."""


class KeyTaken(KeyFault):
    """There is a key of that name."""


class TooManyKeys(KeyFault):
    """There is no room for another key."""


class UnknownKey(KeyFault):
    """There is no such key."""


class KeyFile(BaseModel):
    """What `keys.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()


class KeyStore:
    """The keys of one home folder; each change is written aside and renamed, under a lock."""

    def __init__(self, home: Path) -> None:
        self.path = home / "keys.json"

    def read(self) -> tuple[Key, ...]:
        """Every key there is, revoked and expired ones included, oldest first.

        Raises:
            KeysUnreadable: the file is damaged, too large, or may not be read.
        """
        try:
            with self.path.open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise KeysUnreadable(f"{self.path} cannot be read: {error.strerror}") from error
        if len(text) > MAX_FILE_BYTES:
            raise KeysUnreadable(f"{self.path} is larger than {MAX_FILE_BYTES} bytes")
        try:
            return KeyFile.model_validate_json(text).keys
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise KeysUnreadable(
                f"{self.path} is damaged{where and f' at {where}'}; put it right, or remove it and "
                "make new keys"
            ) from None

    def create(
        self, name: str, scopes: tuple[Scope, ...], expires: datetime | None = None
    ) -> tuple[Key, str]:
        """A new key, and its secret text.

        Raises:
            BadKey: as `new_key`.
            KeyTaken: a valid key has that name.
            TooManyKeys: a thousand are valid.
            KeysUnreadable: as `read`; nothing is changed.
        """
        key, token = new_key(name, scopes, expires)
        with self._locked():
            keys, now = self.read(), datetime.now(UTC)
            if any(one.name == name and one.state(now) == "valid" for one in keys):
                raise KeyTaken(f"there is a key {name!r}; revoke it first, or take another name")
            if len(keys) >= MAX_KEYS:
                keys = tuple(one for one in keys if one.state(now) == "valid")
            if len(keys) >= MAX_KEYS:
                raise TooManyKeys(f"there are {MAX_KEYS} valid keys; revoke one first")
            self._write((*keys, key))
        return key, token

    def revoke(self, which: str) -> Key:
        """Let the key with the id `which`, or the valid one of that name, open nothing more.

        Raises:
            UnknownKey: there is none that is not revoked.
            KeysUnreadable: as `read`; nothing is changed.
        """
        with self._locked():
            keys = list(self.read())
            for index, key in reversed(list(enumerate(keys))):
                if which in (key.id, key.name) and key.revoked is None:
                    keys[index] = key.model_copy(
                        update={"revoked": datetime.now(UTC).replace(microsecond=0)}
                    )
                    self._write(tuple(keys))
                    return keys[index]
        raise UnknownKey(
            f"no key that could be revoked has the id or name {which[:80]!r}; "
            "`pytorchlib keys list` shows them all"
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = self.path.with_name(".keys.lock")
            with locked(lock, LOCK_TIMEOUT_S):
                _give_to_owner_of_folder(lock)
                yield
        except TimeoutError:
            raise KeysUnreadable(f"another process holds the lock of {self.path}") from None

    def _write(self, keys: tuple[Key, ...]) -> None:
        text = KeyFile(keys=keys).model_dump_json(indent=1).encode() + b"\n"
        write_private(self.path, text)


def write_private(path: Path, content: bytes, *, once: bool = False) -> None:
    """Write a file that its owner alone may read: aside, synced, then put in place.

    Args:
        once: leave what is there already, whoever wrote it, and however recently.
    """
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _give_to_owner_of_folder(aside)
        if once:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        else:
            aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _give_to_owner_of_folder(path: Path) -> None:
    """Root writes for the owner of the folder: a server with fewer rights must read it."""
    if os.geteuid() == 0:
        owner = path.parent.stat()
        with contextlib.suppress(OSError):  # not every container may give files away
            os.chown(path, owner.st_uid, owner.st_gid)
