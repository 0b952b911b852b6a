"""What the machine is, and what else it was doing while something was measured."""

import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import orjson

PROC = Path("/proc")
_SPIN_DOCUMENT = orjson.dumps([number / 7 for number in range(20_000)])


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts that a figure needs beside it; no host name and no path."""

    processor: str
    num_cores: int
    memory_gib: int
    python: str
    torch: str

    def sentence(self) -> str:
        """On one line."""
        return (
            f"{self.processor}, {self.num_cores} cores, {self.memory_gib} GiB, "
            f"Python {self.python}, torch {self.torch}"
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Ticks of all processors together since the machine started."""

    total: int
    steal: int

    def steal_share_since(self, before: "CpuTimes") -> float:
        """Share of the time since `before` that the hypervisor gave to others."""
        return (self.steal - before.steal) / max(1, self.total - before.total)


def this_machine() -> Machine:
    """The facts of this one; torch's version is read without importing torch."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        processor=_processor(),
        num_cores=len(cores()),
        memory_gib=round(pages / 1024**3),
        python=platform.python_version(),
        torch=version("torch"),
    )


def cores() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def cpu_times() -> CpuTimes:
    """Now."""
    ticks = [int(field) for field in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
    # guest time, the 9th and 10th field, is already counted as user time
    return CpuTimes(total=sum(ticks[:8]), steal=ticks[7])


def spin_ms(num_times: int = 30) -> float:
    """Milliseconds of a fixed piece of work, so that a slower moment of the machine shows."""
    began = time.perf_counter()
    for _ in range(num_times):
        orjson.loads(_SPIN_DOCUMENT)
    return (time.perf_counter() - began) * 1000


def _processor() -> str:
    for line in (PROC / "cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
