"""Work in Python on a thread beside the event loop, which waits less for its turn meanwhile.

Python lets a thread go on for five milliseconds while others wait for the interpreter: as long as
ten small requests take, and a request may have to wait so long more than once.
"""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Final

SLICE_S: Final = 0.0005
_lock: Final = threading.Lock()
# The interval belongs to the process, and so does what stood there before the first came in.
_before: Final[list[float]] = []


@contextlib.contextmanager
def short_slices() -> Iterator[None]:
    """Inside, no thread goes on for longer than `SLICE_S` while another waits."""
    with _lock:
        _before.append(_before[0] if _before else sys.getswitchinterval())
        sys.setswitchinterval(min(_before[0], SLICE_S))
    try:
        yield
    finally:
        with _lock:
            interval = _before.pop()
            if not _before:
                sys.setswitchinterval(interval)
