"""Where one attempt of a job writes: a folder of its own, which begins with the snapshots before.

    <home>/runs/<job>/000002/...    the attempt whose claim has token 2

A worker that was thought dead and goes on writes into its own folder only, so that it cannot
disturb the one that took its place. Snapshots never change, so they are taken over as hard links.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Final

_NAME: Final = re.compile(r"\d{6,}")
_SNAPSHOT: Final = re.compile(r"step-(\d{10})")
_HALF_WRITTEN: Final = ".writing-*"


def open_attempt(run: Path, token: int) -> Path:
    """The folder of the attempt `token`, with whatever the newest earlier attempt had written.

    Raises:
        OSError: the disk is full or fails.
    """
    final = run / f"{token:06d}"
    if final.is_dir():
        return final
    run.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in _attempts(run) if int(path.name) < token]
    staging = run / f"{_HALF_WRITTEN[:-1]}{token:06d}"
    shutil.rmtree(staging, ignore_errors=True)
    if earlier:
        _take_over(earlier[-1], staging)
    staging.mkdir(exist_ok=True)
    staging.rename(final)
    for path in earlier[:-1]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def newest_attempt(run: Path) -> Path | None:
    """The folder of the last attempt that began; None where there was none."""
    return next(iter(reversed(_attempts(run))), None)


def has_attempts(run: Path) -> bool:
    """Whether anything of an attempt lies there."""
    return bool(_attempts(run) or list(run.glob(_HALF_WRITTEN)))


def remove_attempts(run: Path) -> None:
    """Every attempt with its snapshots goes; what the run made as a whole stays."""
    for path in [*run.glob(_HALF_WRITTEN), *_attempts(run)]:
        shutil.rmtree(path, ignore_errors=True)


def steps_saved(attempt: Path) -> int:
    """Steps that lie in snapshots, over all phases of the run; grows with every newer snapshot."""
    newest: dict[Path, int] = {}
    for path in attempt.glob("**/step-*"):
        match = _SNAPSHOT.fullmatch(path.name)
        if match:
            newest[path.parent] = max(newest.get(path.parent, 0), int(match[1]))
    return sum(newest.values())


def _attempts(run: Path) -> list[Path]:
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name))


def _take_over(earlier: Path, staging: Path) -> None:
    """Link every file; what vanishes meanwhile was a snapshot that is no longer the newest."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except FileNotFoundError:
            return
        except OSError:  # a file system without hard links
            shutil.copy2(source, target)

    try:
        ignore = shutil.ignore_patterns(_HALF_WRITTEN)
        shutil.copytree(earlier, staging, copy_function=link, ignore=ignore)
    except shutil.Error:
        return  # a torn snapshot is known by its checksum, and the one before it is used
