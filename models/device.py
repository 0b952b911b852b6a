"""Which device computes, what it can do, and how many threads this process may really use."""

import math
import os
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


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
    kind, _, index = wanted.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise DeviceUnavailable(f"device {wanted!r} is not one of auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise DeviceUnavailable(f"device {wanted!r} is wanted and torch sees {count} CUDA devices")
    return torch.device(f"cuda:{index or 0}")


def thread_count() -> int:
    """Processors that this process may use: the affinity mask, bounded by the cgroup's quota."""
    return max(1, min(_affinity(), _quota(CGROUP)))


def supports_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware; elsewhere it is emulated and slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # The only stable road to this fact is torch's own private probe; without it, say no.
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe()) if probe is not None else False


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(cgroup: Path) -> int:
    """Whole processors that the cgroup's quota pays for; unbounded without one."""
    unbounded = 1 << 20
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return _quota_v1(cgroup) or unbounded
    return unbounded if quota == "max" else max(1, math.ceil(int(quota) / int(period)))


def _quota_v1(cgroup: Path) -> int | None:
    try:
        quota = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        period = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return max(1, math.ceil(quota / period)) if quota > 0 else None
