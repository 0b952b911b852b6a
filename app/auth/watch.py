"""Keys change while the service runs: a watcher looks at their files, and a new ring takes over."""

import asyncio
import logging
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import SecretStr

from app.auth.key import Key, KeyFault
from app.auth.outside import environment_key, keys_in
from app.auth.ring import KeyRing
from app.auth.store import KeyStore, KeysUnreadable

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int] | None


class NoKeys(KeyFault):
    """The service would be open, or closed, to everybody."""


@dataclass(frozen=True, slots=True)
class KeySources:
    """Everywhere that keys come from.

    Attributes:
        home: the folder of `keys.json`.
        keys_file: a mounted secret.
        api_key: one key from the environment.
    """

    home: Path
    keys_file: Path | None = None
    api_key: SecretStr | None = None

    def given(self) -> list[tuple[str, Key]]:
        """Every key with where it comes from.

        Raises:
            app.auth.key.KeyFault: a source cannot be read, or `api_key` cannot be a key.
        """
        keys = [("keys.json", key) for key in KeyStore(self.home).read()]
        if self.keys_file is not None:
            try:
                keys += [(self.keys_file.name, key) for key in keys_in(self.keys_file)]
            except FileNotFoundError:
                log.error("%s is not there, and gives no keys", self.keys_file)
        if self.api_key is not None:
            keys.append(("PYTORCHLIB_API_KEY", environment_key(self.api_key.get_secret_value())))
        return keys

    def ring(self) -> KeyRing:
        """The keys as they are now; raises as `given`."""
        keys = [key for _, key in self.given()]
        # A source that is named says that keys are wanted, though all of its lines may be wrong.
        return KeyRing(keys, exists=bool(keys) or self.keys_file is not None)

    def require_one(self, host: str) -> None:
        """Return if somebody could come in at all.

        Raises:
            NoKeys: there is no key, or none that is valid.
            app.auth.key.KeyFault: as `given`.
        """
        now = datetime.now(UTC)
        if not any(key.state(now) == "valid" for _, key in self.given()):
            raise NoKeys(
                f"Others can reach {host}, and there is no valid key: set PYTORCHLIB_API_KEY, make "
                "one with `pytorchlib keys create`, or say --no-auth to let everybody in."
            )

    def stamps(self) -> tuple[Stamp, Stamp]:
        """What is another when a file has changed; one system call a file."""
        mounted = None if self.keys_file is None else _stamp(self.keys_file)
        return _stamp(KeyStore(self.home).path), mounted


class KeyWatch:
    """The ring in use, and the task that replaces it when a file of keys has changed.

    Keys that were asked for once stay asked for: a file that vanishes opens nothing.

    Args:
        sources: where keys come from; read here for the first time.
        interval_s: how often the files are looked at.

    Raises:
        app.auth.key.KeyFault: as `KeySources.given`.
    """

    def __init__(self, sources: KeySources, interval_s: float) -> None:
        self._sources = sources
        self._interval_s = interval_s
        self._stamps = sources.stamps()
        self._complaint = ""
        self._watcher: asyncio.Task[None] | None = None
        self.ring = sources.ring()

    def start(self) -> None:
        """Begin to look, on the running loop."""
        self._watcher = asyncio.create_task(self._watch(), name="watch the keys")

    async def stop(self) -> None:
        """End the watcher."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)

    def watching(self) -> bool:
        """Whether a key that is revoked now will be refused soon."""
        return self._watcher is not None and not self._watcher.done()

    def look(self) -> None:
        """Read the keys again if a file has changed; a file that cannot be read changes nothing."""
        stamps = self._sources.stamps()  # before reading: what changes meanwhile is read next time
        if stamps == self._stamps:
            return
        try:
            ring = self._sources.ring()
        except KeysUnreadable as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("%s; the keys that were read before stay as they are", error)
            return
        ring.exists = ring.exists or self.ring.exists
        self.ring, self._stamps, self._complaint = ring, stamps, ""
        log.info("The keys have changed: %d are not revoked", len(ring))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await asyncio.to_thread(self.look)
            except Exception:  # the watcher is this class's request: it logs, and goes on
                log.exception("looking at the keys failed; they are looked at again")


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
