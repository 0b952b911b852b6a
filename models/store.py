"""The model store: folders of versions, atomic publishing, aliases that move by compare-and-set.

    <store>/digits/3/                 a version: complete and verified, or absent
    <store>/digits/aliases.jsonl      every alias move; the last whole line of an alias is its state
    <store>/digits/tombstones.jsonl   deleted versions, whose numbers are never used again
    <store>/digits/.staging-*/        a version being written; swept once its writer is gone

The folders are the truth: any process may publish into them, and nothing here is cached.
"""

import contextlib
import difflib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import EllipsisType
from typing import Any, Final

from models.aliases import WHOLE, Aliases, AliasMove, Split
from models.checkpoint import (
    MANIFEST,
    CheckpointError,
    load,
    parse_manifest,
    read_manifest,
    sync_folder,
    verify,
)
from models.file_lock import locked
from models.journal import append_line, parse_line, read_lines
from models.manifest import Manifest
from models.staging import new_name, staging_folder, sweep
from models.store_error import (
    AliasMoved,
    BadName,
    LocksUnsupported,
    NothingToRollBack,
    RunMismatch,
    StoreBusy,
    StoreDamaged,
    StoreError,
    UnknownModel,
    UnknownVersion,
    VersionInUse,
)

__all__ = [
    "PRODUCTION",
    "AliasMove",
    "AliasMoved",
    "BadName",
    "LocksUnsupported",
    "ModelStore",
    "NothingToRollBack",
    "RunMismatch",
    "StoreBusy",
    "StoreDamaged",
    "StoreError",
    "Traffic",
    "UnknownModel",
    "UnknownVersion",
    "Version",
    "VersionInUse",
]

PRODUCTION: Final = "production"
_ALIASES: Final = "aliases.jsonl"
_GATED: Final = "a gate decides"
_TOMBSTONES: Final = "tombstones.jsonl"
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
# Windows keeps these for devices, whatever follows a dot; a store may lie on a disk it shares.
_DEVICES: Final = r"(?!(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$))"
_NAME: Final = re.compile(rf"{_DEVICES}[a-z0-9](?:[a-z0-9._-]{{0,62}}[a-z0-9_-])?")
_ALIAS: Final = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
_NAME_RULE: Final = (
    "at most 64 of lower-case letters, digits, '.', '_' and '-', beginning with a letter or "
    "digit, not ending in '.', and no name that Windows keeps for a device"
)
_ALIAS_RULE: Final = (
    "at most 64 of lower-case letters, digits, '_' and '-', beginning with a letter"
)


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
class Traffic:
    """Which versions answer what is asked by one reference; see `models.aliases.Split`.

    Attributes:
        alias: that the reference names; None where it names a version.
    """

    holder: Version
    alias: str | None = None
    canary: Version | None = None
    share: float = 0.0
    shadow: Version | None = None


class ModelStore:
    """Models in one folder, which is made when something is first published.

    Args:
        folder: where the models rest.
        lock_timeout_s: how long to wait for another process that changes the same model.
    """

    def __init__(self, folder: Path, *, lock_timeout_s: float = 30.0) -> None:
        self.folder = folder
        self._lock_timeout_s = lock_timeout_s

    def names(self) -> list[str]:
        """Models with at least one version, sorted."""
        return sorted(home.name for home in self._homes() if self.versions(home.name))

    def versions(self, name: str) -> list[int]:
        """Published numbers of `name`, ascending; empty where there are none."""
        try:
            entries = os.listdir(self._home(name))
        except FileNotFoundError:
            return []
        return sorted(int(entry) for entry in entries if _NUMBER.fullmatch(entry))

    def version(self, name: str, number: int) -> Version:
        """One version by its number.

        Raises:
            UnknownModel, UnknownVersion: the sentence lists what there is.
        """
        folder = self._home(name) / str(number)
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
        return self.traffic(reference).holder

    def traffic(self, reference: str) -> Traffic:
        """What `resolve` finds, and what an alias sends elsewhere; raises as that does."""
        name, at, alias = reference.partition("@")
        if at:
            return self._traffic(name, alias)
        name, colon, number = reference.partition(":")
        if not colon:
            return self._traffic(name, PRODUCTION)
        if not _NUMBER.fullmatch(number):
            raise BadName(f"a version is a number from 1: {reference[:80]!r} is none")
        return Traffic(self.version(name, int(number)))

    def stamp(self, name: str) -> tuple[int, ...]:
        """Differs from an earlier one if a version or an alias of `name` has changed since.

        Two looks at the disk; also where nothing is there.
        """
        home = self._home(name)
        return (*_stamp(home), *_stamp(home / _ALIASES))

    def publish(
        self,
        name: str,
        write: Callable[[Path], object],
        *,
        run: str | None = None,
        by: str = "local",
        why: str = "first version",
        is_gated: bool = False,
    ) -> Version:
        """Publish what `write` puts into the folder it is given.

        The same digest, or the same `run`, gives the version that is already there, if its files
        are still what they were. The first version of a model becomes its `production`.

        Args:
            name: lower-case letters, digits, `.`, `_`, `-`; at most 64.
            write: writes a sealed checkpoint (`models.checkpoint.save`) into an empty folder.
            run: what made it, as in its lineage; a second publication of one run changes nothing.
            by: who publishes, for the history.
            why: one sentence for the history, used if an alias moves.
            is_gated: `production`, if nobody ever moved it, holds nothing until a gate moves it.

        Raises:
            BadName: of `name`. StoreBusy: another process holds the model's lock.
            RunMismatch: the lineage names another run.
            models.checkpoint.CheckpointError, models.networks.NetworkError: what was written
                cannot be loaded.
        """
        home = self._home(name)
        home.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.folder.parent):  # either may be new
            sync_folder(folder)
        with staging_folder(home, self._locked(home)) as staging:
            write(staging)
            manifest = load(staging).manifest
            if run not in (None, manifest.lineage.run):
                raise RunMismatch(f"run {run!r} publishes the work of {manifest.lineage.run!r}")
            _make_read_only(staging)
            with self._locked(home):
                version = self._existing(name, manifest, run)
                if version is None:
                    version = self._rename(name, staging)
                self._appoint_first(name, by, _GATED if is_gated else why, is_gated=is_gated)
        return version

    def sweep(self) -> None:
        """Remove what dead writers left behind; publishing does it too, for its own model."""
        for home in self._homes():
            with self._locked(home):
                sweep(home)

    def delete(self, name: str, number: int, *, by: str = "local") -> None:
        """Remove a version that no alias holds; its number stays used.

        Raises:
            VersionInUse: an alias holds it. UnknownModel, UnknownVersion: it is not there.
        """
        home = self._home(name)
        with self._locked(home, name):
            version = self.version(name, number)
            states = self._aliases(name).states()
            held = [alias for alias, move in states.items() if number in move.versions()]
            if held:
                raise VersionInUse(f"{version} is held by {', '.join(held)}; move that first")
            grave = {"version": number, "digest": _digest(version), "by": by, "at": _now()}
            append_line(home / _TOMBSTONES, grave)
            doomed = new_name(home)
            version.folder.rename(doomed)
            sync_folder(home)
        shutil.rmtree(doomed, ignore_errors=True)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias -> number of the version that it holds now.

        Raises:
            UnknownModel: no such model. StoreDamaged: its history cannot be read.
        """
        if not self.versions(name):
            raise self._unknown(name)
        return self._aliases(name).holders()

    def states(self, name: str) -> dict[str, AliasMove]:
        """Alias -> the move that it stands at: its version, what goes elsewhere, since when, why.

        Raises:
            UnknownModel: no such model. StoreDamaged: its history cannot be read.
        """
        if not self.versions(name):
            raise self._unknown(name)
        return self._aliases(name).states()

    def history(self, name: str, alias: str | None = None) -> list[AliasMove]:
        """Every move of `alias`, or of all of the model's aliases, oldest first.

        Raises:
            StoreDamaged: a line of it cannot be read.
        """
        moves = list(self._aliases(name).newest_first())
        return [move for move in reversed(moves) if alias is None or move.alias == alias]

    def move_alias(
        self,
        name: str,
        alias: str,
        to: int | None,
        *,
        expected: int | None | EllipsisType = ...,
        by: str = "local",
        why: str = "",
        evidence: dict[str, Any] | None = None,
        split: Split = WHOLE,
    ) -> AliasMove:
        """Let `alias` hold version `to`, or nothing where `to` is None.

        Args:
            expected: the number that it must hold now, None for nothing; left out, whatever.
            split: what it sends to other versions from now on.

        Raises:
            AliasMoved: it holds another version than expected; nothing is changed.
            BadName, UnknownModel, UnknownVersion: of the names given. StoreBusy: the lock.
            ValueError, TypeError: the evidence cannot be written as JSON, or the split names the
                version that the alias holds, or an alias that holds nothing.
        """
        home = self._home(name)
        _checked(alias, _ALIAS, _ALIAS_RULE)
        if to in (None, *split.versions()) and split != WHOLE:
            raise ValueError("a canary or a shadow is another version than the one that is held")
        with self._locked(home, name):
            wanted = split.versions() if to is None else {to, *split.versions()}
            for number in sorted(wanted):
                self.version(name, number)
            aliases = self._aliases(name)
            _check_holder(name, alias, aliases.holder(alias), expected)
            return aliases.append(alias, to, by=by, why=why, evidence=evidence or {}, split=split)

    def rolls_back_to(
        self, name: str, alias: str, *, expected: int | None | EllipsisType = ...
    ) -> Version:
        """The version that `roll_back` would let `alias` hold now; raises as that does."""
        _checked(alias, _ALIAS, _ALIAS_RULE)
        if not self.versions(name):
            raise self._unknown(name)
        aliases = self._aliases(name)
        state = aliases.states().get(alias)
        _check_holder(name, alias, state.to if state else None, expected)
        if state is not None and state.to is not None and state.canary is not None:
            return self.version(name, state.to)
        kept = set(self.versions(name))
        to = next((one for one in aliases.held_before(alias) if one in kept), None)
        if to is None:
            raise NothingToRollBack(f"{name}@{alias} has held no other version that is still there")
        return self.version(name, to)

    def roll_back(
        self,
        name: str,
        alias: str,
        *,
        expected: int | None | EllipsisType = ...,
        to: int | None = None,
        by: str = "local",
        why: str = "rolled back",
    ) -> AliasMove:
        """Let `alias` hold what it held before, and send nothing elsewhere.

        A canary that runs is what is rolled back: it ends, and the version that is held stays.

        Args:
            to: the version that it was seen to go back to; None for whichever it is.

        Raises:
            NothingToRollBack: it has no canary, and held nothing before that is still there.
            AliasMoved: it holds another version than expected, or would go back to another than
                `to`; nothing is changed.
            BadName, UnknownModel, UnknownVersion, StoreBusy: as `move_alias`.
        """
        with self._locked(self._home(name), name):
            back = self.rolls_back_to(name, alias, expected=expected)
            if to not in (None, back.number):
                raise AliasMoved(f"{name}@{alias} was moved meanwhile: it goes back to {back}")
            return self._aliases(name).append(
                alias, back.number, by=by, why=why, evidence={}, rollback=True
            )

    def _homes(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]

    def _home(self, name: str) -> Path:
        return self.folder / _checked(name, _NAME, _NAME_RULE)

    def _aliases(self, name: str) -> Aliases:
        return Aliases(self._home(name) / _ALIASES)

    def _traffic(self, name: str, alias: str) -> Traffic:
        _checked(alias, _ALIAS, _ALIAS_RULE)
        move = self._aliases(name).last_move(alias)
        if move is not None and move.to is not None:
            holder = self.version(name, move.to)
            canary, shadow = (
                None if number is None else self.version(name, number)
                for number in (move.canary, move.shadow)
            )
            return Traffic(holder, alias, canary, move.share, shadow)
        listed = ", ".join(sorted(self.aliases(name))) or "none"
        raise UnknownVersion(f"{name} has no alias {alias!r}; there are: {listed}")

    def _unknown(self, name: str) -> UnknownModel:
        known = self.names()
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        hint = f"; the nearest are {', '.join(near)}" if near else "; the store is empty"
        return UnknownModel(f"no model is called {name!r}{hint}")

    def _existing(self, name: str, manifest: Manifest, run: str | None) -> Version | None:
        """The version with this digest or of this run, if it is whole.

        A manifest whose text holds neither is not parsed: a thousand versions take milliseconds,
        and there is no index beside the folders that could contradict them.
        """
        wanted = [
            json.dumps(text, ensure_ascii=False).encode()
            for text in (manifest.digest, run)
            if text is not None
        ]
        for number in reversed(self.versions(name)):
            version = Version(name, number, self.folder / name / str(number))
            with contextlib.suppress(OSError, CheckpointError):
                text = (version.folder / MANIFEST).read_bytes()
                if any(value in text for value in wanted):
                    published = parse_manifest(text)
                    same_run = run is not None and published.lineage.run == run
                    if same_run or published.digest == manifest.digest:
                        verify(version.folder, published)
                        return version
        return None

    def _rename(self, name: str, staging: Path) -> Version:
        home = self.folder / name
        number = max([*self.versions(name), *_buried(home / _TOMBSTONES)], default=0) + 1
        version = Version(name, number, home / str(number))
        staging.rename(version.folder)
        sync_folder(home)
        return version

    def _appoint_first(self, name: str, by: str, why: str, *, is_gated: bool) -> None:
        """Let `production`, if nobody ever moved it, hold the first version; none before a gate.

        That is the one just published, or one whose publisher died before it came to this.
        """
        aliases = self._aliases(name)
        if aliases.last_move(PRODUCTION) is None:
            first = None if is_gated else self.versions(name)[0]
            aliases.append(PRODUCTION, first, by=by, why=why, evidence={})

    @contextlib.contextmanager
    def _locked(self, home: Path, name: str | None = None) -> Iterator[None]:
        """Hold the model's lock; `name`, where given, must be a model that exists."""
        if name is not None and not self.versions(name):
            raise self._unknown(name)
        try:
            with locked(home / ".lock", self._lock_timeout_s):
                yield
        except TimeoutError:
            raise StoreBusy(
                f"another process has been changing {home.name} for {self._lock_timeout_s:g} s"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise LocksUnsupported(
                f"the disk of {home.parent} cannot lock files ({error.strerror}); put the store "
                "on one that can"
            ) from None


def _checked(text: str, pattern: re.Pattern[str], rule: str) -> str:
    if pattern.fullmatch(text):
        return text
    raise BadName(f"{text[:80]!r} is no name here; a name is {rule}")


def _check_holder(
    name: str, alias: str, holder: int | None, expected: int | None | EllipsisType
) -> None:
    if expected is not ... and holder != expected:
        raise AliasMoved(f"{name}@{alias} holds {holder or 'nothing'}, not {expected or 'nothing'}")


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _digest(version: Version) -> str | None:
    """None where the manifest is damaged: such a version must be possible to delete."""
    try:
        return version.manifest().digest
    except CheckpointError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _buried(path: Path) -> list[int]:
    """Numbers of deleted versions."""
    numbers = [parse_line(path, line).get("version") for line in read_lines(path)]
    if not all(isinstance(number, int) for number in numbers):
        raise StoreDamaged(f"{path.parent.name}/{path.name} has a line without a version")
    return [number for number in numbers if isinstance(number, int)]


def _make_read_only(folder: Path) -> None:
    """A served network maps these files: an edit in place would change its weights."""
    for path in folder.iterdir():
        path.chmod(0o444)
