"""A timer of the kernel that can be waited for together with sockets.

epoll, and with it asyncio, knows whole milliseconds only. At thousands of requests a second they
would be sent in clumps, and half a millisecond added to every latency.
"""

import contextlib
import ctypes
import os
from typing import Final

CLOCK_MONOTONIC: Final = 1
TIMER_ABSTIME: Final = 1


class _Moment(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Moment), ("value", _Moment))


class Alarm:
    """One timerfd (Linux). Its descriptor turns readable at the moment that was set."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self._libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, moment: float) -> None:
        """Ring at `moment` of `time.monotonic`, at once if it has passed."""
        seconds, fraction = divmod(max(moment, 1e-6), 1.0)
        value = _Moment(int(seconds), int(fraction * 1e9))
        setting = _Setting(_Moment(0, 0), value)
        if self._libc.timerfd_settime(self.descriptor, TIMER_ABSTIME, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        """Make the descriptor wait again."""
        with contextlib.suppress(BlockingIOError):  # it was set anew before it was read
            os.read(self.descriptor, 8)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.descriptor)
