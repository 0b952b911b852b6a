"""Locks between processes: `flock` on a file or a folder, let go of by the system at death.

Two holders in one process exclude each other as well, because each opens the path for itself.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

POLL_S = 0.02


@contextlib.contextmanager
def locked(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the lock of the file `path`, which is made where it is absent.

    Raises:
        TimeoutError: somebody else held it for `timeout_s` seconds.
        OSError: the path cannot be opened, or its file system has no locks (`ENOLCK` and kin).
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, time.monotonic() + timeout_s)
        yield
    finally:
        os.close(descriptor)


def lock_folder(path: Path) -> int:
    """Lock a folder of one's own; returns the descriptor whose closing lets go of it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # where folders have no locks, `is_locked` says None
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def is_locked(path: Path) -> bool | None:
    """Whether somebody holds the folder's lock; None where the file system cannot tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _acquire(descriptor: int, deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(POLL_S)
