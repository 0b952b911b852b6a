"""Which device computes, what it can do, and how many threads this process may really use."""

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


class DeviceUnavailable(Exception):
    """The wanted device is not on this machine."""


def choose_device(wanted: str = "auto") -> torch.device:
    """The device called `wanted`: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.

    Raises:
        DeviceUnavailable: the name is unknown or the device is not here.
    """
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?", wanted):
        raise DeviceUnavailable(f"device {wanted!r} is not one of auto, cpu, cuda, cuda:N")
    index = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        built = "" if torch.version.cuda or torch.version.hip else ", being built for CPUs only"
        raise DeviceUnavailable(
            f"device {wanted!r} is wanted and torch sees {count} CUDA devices{built}"
        )
    return torch.device("cuda", index)


def choose_devices(wanted: str = "auto") -> tuple[torch.device, ...]:
    """All that `wanted` means: every GPU for `auto` where there are any, else the one it names.

    Raises:
        DeviceUnavailable: as `choose_device`.
    """
    if wanted == "auto" and torch.cuda.is_available():
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return (choose_device(wanted),)


def thread_count(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Processors that this process may use: the affinity mask, bounded by its cgroups' quotas.

    Args:
        cgroups: where the cgroup file system is mounted, of version 1 or 2.
        membership: the file that names the process's cgroups.
    """
    return max(1, min([_affinity(), *_quotas(cgroups, membership)]))


def memory_bytes(
    device: torch.device, cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP
) -> int:
    """Memory of `device`; on a processor what this process may use, bounded by its cgroups."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (_memory_limit(folder) for folder in _own_cgroups(cgroups, membership, "memory"))
    return min([whole, *(limit for limit in limits if limit is not None)])


def processor_type(device: torch.device) -> str:
    """The name of what computes, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        # Line by line: the first processor's name is enough, and there may be hundreds of them.
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def supports_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware; elsewhere it is emulated and slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # The only stable road to this fact is torch's own private probe; without it, say no.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe()) if probe is not None else False


def supports_fp16(device: torch.device) -> bool:
    """Whether `device` multiplies float16 in hardware, as GPUs since Volta do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(cgroups: Path, membership: Path) -> list[int]:
    """Processors that each cgroup around this process pays for, rounded up; none without limit."""
    found = (_quota(folder) for folder in _own_cgroups(cgroups, membership, "cpu"))
    return [quota for quota in found if quota is not None]


def _own_cgroups(cgroups: Path, membership: Path, controller: str) -> Iterator[Path]:
    """From the process's own cgroup up to the root, since a limit above holds below.

    Inside a container the mount often begins at the container's own cgroup, and the path in
    `membership` leads nowhere below it; then the root alone has the limit.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", f"0:{controller}:/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroups / controllers
        inside = root / path.lstrip("/")
        yield inside
        yield from (above for above in inside.parents if above.is_relative_to(root))


def _quota(cgroup: Path) -> int | None:
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota = (cgroup / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu.cfs_period_us").read_text()
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no such file, `max`, or nothing that a kernel writes


def _memory_limit(cgroup: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((cgroup / name).read_text())
        except (OSError, ValueError):
            continue  # no such file, or `max`
    return None


def multiplies_bytes(device: torch.device) -> bool:
    """Whether oneDNN sums products of bytes in hardware there, without overflow in between."""
    return (
        device.type == "cpu"
        and torch.cpu._is_vnni_supported()
        and hasattr(torch.ops.onednn, "qconv2d_pointwise")
    )
