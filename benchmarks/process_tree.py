"""A process and everything it started: its processor time, its memory, and signals to all of it.

Members are found by a variable in their environment, which children inherit. So are those that
leave their parent, as the workers of some systems do.
"""

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
VARIABLE = "PYTORCHLIB_BENCHMARK_TREE"
US_PER_TICK = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessTree:
    """All processes that were started with `VARIABLE` set to `token`."""

    token: str

    def pids(self) -> list[int]:
        """Those alive now, oldest first."""
        wanted = f"{VARIABLE}={self.token}".encode()
        found = []
        for entry in PROC.iterdir():
            if entry.name.isdigit():
                # it may end at any moment, or belong to another user
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return sorted(found)

    def cpu_us(self) -> int:
        """Microseconds on processors so far, those of ended and awaited children included."""
        return sum(_cpu_ticks(pid) for pid in self.pids()) * US_PER_TICK

    def memory_bytes(self) -> int:
        """Proportional set size: memory that several processes map is shared out among them."""
        return sum(_pss_bytes(pid) for pid in self.pids())

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every member."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _cpu_ticks(pid: int) -> int:
    try:
        # the name, in parentheses, may hold spaces; utime, stime, cutime, cstime are 14 to 17
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))


def _pss_bytes(pid: int) -> int:
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
