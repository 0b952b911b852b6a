"""The C library's heap: what is freed is kept for the next request, or given back when told to.

glibc asks the kernel for each large block and returns it at once, so every large body, picture and
activation begins on pages that the kernel has to find and clear first. On a virtual machine that
costs more than to write them: half of what a form of eight megabytes takes.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Final

KEPT_BYTES: Final = 512 * 1024 * 1024
LARGEST_BYTES: Final = 32 * 1024 * 1024
"""The most that glibc allows."""
# Of malloc.h; glibc's mallopt(3) tells what they do.
TRIM_THRESHOLD: Final = -1
MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> None:
    """Let freed blocks be used again: up to `LARGEST_BYTES` each, `KEPT_BYTES` at a heap's end.

    For the whole process. Whoever has set the C library up by its environment knows better, and
    other libraries than glibc have no such options.
    """
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    set_option = _of_glibc("mallopt")
    if set_option is not None:
        set_option(MMAP_THRESHOLD, LARGEST_BYTES)
        set_option(TRIM_THRESHOLD, KEPT_BYTES)


def give_freed_memory_back() -> None:
    """To the system, pages between living blocks included."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    return function
