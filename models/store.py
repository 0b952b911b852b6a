"""The model store: folders of versions, atomic publishing, aliases that move by compare-and-set.

    <store>/digits/3/                 a version: complete and verified, or absent
    <store>/digits/aliases.jsonl      every alias move; the last whole line of an alias is its state
    <store>/digits/tombstones.jsonl   deleted versions, whose numbers are never used again
    <store>/digits/.staging-*/        a version being written; swept once its writer is gone

The folders are the truth: any process may publish into them, and nothing here is cached.
"""

import contextlib
import difflib
import fcntl
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.checkpoint import MANIFEST, read_manifest, sync_folder, verify
from models.manifest import Manifest

PRODUCTION = "production"
LOCK_DEADLINE_S = 30.0
STAGING_KEPT_S = 24 * 3600.0
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,63}")


class StoreError(Exception):
    """The store cannot do what was asked."""


class BadName(StoreError):
    """A model or alias name is not one."""


class UnknownModel(StoreError):
    """No model goes by this name."""


class UnknownVersion(StoreError):
    """The model has no such version or alias."""


class AliasMoved(StoreError):
    """The alias does not hold the version that the caller expected."""


class VersionInUse(StoreError):
    """An alias holds the version that was to be deleted."""


class StoreBusy(StoreError):
    """Another process has held the model's lock for too long."""


@dataclass(frozen=True, slots=True)
class Version:
    """One published version."""

    name: str
    number: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"

    def manifest(self) -> Manifest:
        """Read from disk at each call; see `models.checkpoint.read_manifest` for its errors."""
        return read_manifest(self.folder)


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One line of an alias's history; `to` is None where the alias was removed."""

    alias: str
    to: int | None
    previous: int | None
    at: str
    by: str
    why: str
    evidence: dict[str, Any] = field(default_factory=dict)


class ModelStore:
    """Models in one folder, which is made when something is first published.

    Args:
        folder: where the models rest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Models with at least one version, sorted."""
        if not self.folder.is_dir():
            return []
        found = (path.name for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return sorted(name for name in found if self.versions(name))

    def versions(self, name: str) -> list[int]:
        """Published numbers of `name`, ascending; empty where there are none."""
        try:
            entries = os.listdir(self.folder / _checked(name, _NAME, "model"))
        except FileNotFoundError:
            return []
        return sorted(int(entry) for entry in entries if entry.isdecimal() and entry != "0")

    def version(self, name: str, number: int) -> Version:
        """One version by its number.

        Raises:
            UnknownModel, UnknownVersion: the sentence lists what there is.
        """
        folder = self.folder / _checked(name, _NAME, "model") / str(number)
        if (folder / MANIFEST).is_file():
            return Version(name, number, folder)
        numbers = self.versions(name)
        if not numbers:
            raise self._unknown(name)
        listed = ", ".join(map(str, numbers[-10:]))
        raise UnknownVersion(f"{name} has no version {number}; there are {listed}")

    def resolve(self, reference: str) -> Version:
        """`digits` (its production), `digits@alias` or `digits:3`.

        Raises:
            BadName, UnknownModel, UnknownVersion: the sentence lists what there is.
        """
        name, at, alias = reference.partition("@")
        if at:
            return self._holder(name, alias)
        name, colon, number = reference.partition(":")
        if not colon:
            return self._holder(name, PRODUCTION)
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise BadName(f"a version is a number: {reference!r} has {number!r}")
        return self.version(name, int(number))

    def publish(
        self,
        name: str,
        write: Callable[[Path], object],
        *,
        run: str | None = None,
        by: str = "local",
        why: str = "first version",
    ) -> Version:
        """Publish what `write` puts into the folder it is given.

        The same digest, or the same `run`, gives the version that is already there. The first
        version of a model becomes its `production`.

        Args:
            name: lower-case letters, digits, `.`, `_`, `-`; at most 64.
            write: writes a sealed checkpoint (`models.checkpoint.save`) into an empty folder.
            run: what made it; a second publication of one run changes nothing.
            by: who publishes, for the history.
            why: one sentence for the history, used if an alias moves.

        Raises:
            BadName: of `name`. StoreBusy: the lock was not to be had in 30 seconds.
            models.checkpoint.CheckpointError: what was written does not verify.
        """
        home = self.folder / _checked(name, _NAME, "model")
        home.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder)
        _sweep(home)
        staging = home / f".staging-{uuid.uuid4().hex}"
        staging.mkdir()
        try:
            write(staging)
            manifest = read_manifest(staging)
            verify(staging, manifest)
            _make_read_only(staging)
            with self._locked(home):
                version = self._existing(name, manifest, run)
                if version is None:
                    version = self._rename(name, staging)
                if self._state(name).get(PRODUCTION) is None and len(self.versions(name)) == 1:
                    self._append_move(name, PRODUCTION, version.number, None, by, why, {})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return version

    def delete(self, name: str, number: int, *, by: str = "local") -> None:
        """Remove a version that no alias holds; its number stays used.

        Raises:
            VersionInUse: an alias holds it. UnknownModel, UnknownVersion: it is not there.
        """
        home = self.folder / _checked(name, _NAME, "model")
        with self._locked(home, name):
            version = self.version(name, number)
            held = [alias for alias, holder in self._state(name).items() if holder == number]
            if held:
                raise VersionInUse(f"{version} is held by {', '.join(held)}; move that first")
            grave = {"version": number, "digest": version.manifest().digest, "by": by, "at": _now()}
            _append_line(home / "tombstones.jsonl", grave)
            doomed = home / f".staging-{uuid.uuid4().hex}"
            version.folder.rename(doomed)
            sync_folder(home)
        shutil.rmtree(doomed, ignore_errors=True)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> number of the version that it holds now.

        Raises:
            UnknownModel: no such model.
        """
        if not self.versions(name):
            raise self._unknown(name)
        return {alias: number for alias, number in self._state(name).items() if number is not None}

    def history(self, name: str, alias: str | None = None) -> list[AliasMove]:
        """Every move of `alias`, or of all of the model's aliases, oldest first."""
        path = self.folder / _checked(name, _NAME, "model") / "aliases.jsonl"
        moves = [AliasMove(**line) for line in _read_lines(path)]
        return [move for move in moves if alias is None or move.alias == alias]

    def move_alias(
        self,
        name: str,
        alias: str,
        to: int | None,
        *,
        expected: int | None | type[Any] = Any,
        by: str = "local",
        why: str = "",
        evidence: dict[str, Any] | None = None,
    ) -> AliasMove:
        """Let `alias` hold version `to`, or nothing where `to` is None.

        Args:
            expected: the number that it must hold now (None for nothing); `Any` asks nothing.

        Raises:
            AliasMoved: it holds another version than expected; nothing is changed.
            BadName, UnknownModel, UnknownVersion: of the names given. StoreBusy: the lock.
        """
        home = self.folder / _checked(name, _NAME, "model")
        _checked(alias, _ALIAS, "alias")
        with self._locked(home, name):
            if to is not None:
                self.version(name, to)
            holder = self._state(name).get(alias)
            if expected is not Any and holder != expected:
                raise AliasMoved(f"{name}@{alias} holds {holder}, not {expected}")
            return self._append_move(name, alias, to, holder, by, why, evidence or {})

    def _holder(self, name: str, alias: str) -> Version:
        _checked(alias, _ALIAS, "alias")
        state = self.aliases(name)
        if alias in state:
            return self.version(name, state[alias])
        listed = ", ".join(sorted(state)) or "none"
        raise UnknownVersion(f"{name} has no alias {alias!r}; there are: {listed}")

    def _unknown(self, name: str) -> UnknownModel:
        known = self.names()
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        hint = f"; the nearest are {', '.join(near)}" if near else "; the store is empty"
        return UnknownModel(f"no model is called {name!r}{hint}")

    def _state(self, name: str) -> dict[str, int | None]:
        return {move.alias: move.to for move in self.history(name)}

    def _existing(self, name: str, manifest: Manifest, run: str | None) -> Version | None:
        for number in reversed(self.versions(name)):
            version = self.version(name, number)
            published = version.manifest()
            same_run = run is not None and published.lineage.run == run
            if same_run or published.digest == manifest.digest:
                return version
        return None

    def _rename(self, name: str, staging: Path) -> Version:
        home = self.folder / name
        used = [*self.versions(name), 0]
        used += [int(line["version"]) for line in _read_lines(home / "tombstones.jsonl")]
        version = Version(name, max(used) + 1, home / str(max(used) + 1))
        staging.rename(version.folder)
        sync_folder(home)
        return version

    def _append_move(
        self,
        name: str,
        alias: str,
        to: int | None,
        previous: int | None,
        by: str,
        why: str,
        evidence: dict[str, Any],
    ) -> AliasMove:
        move = AliasMove(alias, to, previous, _now(), by, why, evidence)
        _append_line(self.folder / name / "aliases.jsonl", asdict(move))
        return move

    @contextlib.contextmanager
    def _locked(self, home: Path, name: str | None = None) -> Iterator[None]:
        """Hold the model's lock; `name`, where given, must be a model that exists."""
        if name is not None and not self.versions(name):
            raise self._unknown(name)
        descriptor = os.open(home / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _flock(descriptor, home)
            yield
        finally:
            os.close(descriptor)


def _flock(descriptor: int, home: Path) -> None:
    deadline = time.monotonic() + LOCK_DEADLINE_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreBusy(
                    f"{home.name} has been locked by another process for {LOCK_DEADLINE_S:.0f} s"
                ) from None
            time.sleep(0.02)


def _checked(text: str, pattern: re.Pattern[str], kind: str) -> str:
    if pattern.fullmatch(text):
        return text
    raise BadName(f"{text[:80]!r} is no {kind} name: it must match {pattern.pattern}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: one without its newline was never finished."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line]


def _append_line(path: Path, line: dict[str, Any]) -> None:
    """Append under the caller's lock, over a torn last line if there is one, and sync."""
    existed = path.exists()
    with path.open("ab") as file:
        size = file.tell()
        if size:
            whole = path.read_bytes().rfind(b"\n") + 1
            file.truncate(whole)
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if not existed:
        sync_folder(path.parent)


def _make_read_only(folder: Path) -> None:
    """A served network maps these files: an edit in place would change its weights."""
    for path in folder.iterdir():
        path.chmod(0o444)


def _sweep(home: Path) -> None:
    """Remove what a writer left behind that died more than a day ago."""
    for path in home.glob(".staging-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STAGING_KEPT_S:
                shutil.rmtree(path, ignore_errors=True)
