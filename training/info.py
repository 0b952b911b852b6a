"""Whether an installation works: versions, devices, what they can do, and a number from each."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from models.device import processor_type, supports_bf16, thread_count
from models.pairing import TorchvisionMismatch, import_torchvision, installed

PACKAGES = ("pytorchlib", "numpy", "pillow", "safetensors", "fastapi", "uvicorn", "pydantic")


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device.

    Attributes:
        device: `cpu` or `cuda:N`.
        name: of the processor or card.
        memory_bytes: in all; None where it is unknown.
        precisions: in which it multiplies in hardware.
        sample: a small random tensor computed there, or what went wrong.
    """

    device: str
    name: str
    memory_bytes: int | None
    precisions: tuple[str, ...]
    sample: list[float] | str


@dataclass(frozen=True, slots=True)
class Info:
    """What is installed and what it runs on; `fault` says what does not work."""

    python: str
    system: str
    versions: dict[str, str]
    cuda: str | None
    num_threads: int
    devices: tuple[DeviceInfo, ...]
    fault: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain lists, texts and numbers."""
        return asdict(self)


def gather() -> Info:
    """Look at packages and devices; takes seconds, because torchvision is really imported."""
    return Info(
        python=platform.python_version(),
        system=platform.platform(),
        versions=_versions(),
        cuda=torch.version.cuda,
        num_threads=thread_count(),
        devices=tuple(_device(one) for one in _devices()),
        fault=_fault(),
    )


def _versions() -> dict[str, str]:
    found = {name: installed(name) or "absent" for name in ("torch", "torchvision")}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device(f"cuda:{index}") for index in range(count))]


def _device(device: torch.device) -> DeviceInfo:
    memory_bytes = _memory_bytes()
    if device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
    precisions = ("fp32", *(("bf16",) if supports_bf16(device) else ()))
    name = processor_type(device)
    return DeviceInfo(str(device), name, memory_bytes, precisions, _sample(device))


def _sample(device: torch.device) -> list[float] | str:
    """Three numbers out of a matrix product, which is what networks are made of."""
    try:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(3, 3, generator=generator, device=device)
        values: list[float] = (x @ x).diagonal().cpu().tolist()
        return values
    except RuntimeError as error:
        return str(error).partition("\n")[0]


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _fault() -> str | None:
    try:
        import_torchvision("torchvision")
    except TorchvisionMismatch as error:
        return str(error)
    return None
