"""Which errors are the device's own: memory that ran out, and a device that answers no more."""

import torch

from app.engine.heap import give_freed_memory_back
from app.engine.recording import RECORDING

# What torch's processor allocator says; it raises a plain RuntimeError.
_HOST_MEMORY = "DefaultCPUAllocator: "


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a smaller batch may get through where this one did not."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _HOST_MEMORY in str(error)


def is_device_error(error: BaseException) -> bool:
    """Whether the device itself failed, for the moment or for good."""
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and "CUDA error" in str(error)


def is_device_lost(error: BaseException, device: torch.device) -> bool:
    """Whether `device` can be used no more in this process.

    After some CUDA errors (an assertion in a kernel, an illegal address) every later call fails
    too; after others (a launch that was configured wrongly) the next one succeeds. Asking tells.
    """
    return is_device_error(error) and (device.type == "cpu" or not _answers(device))


def free_cached_memory(device: torch.device) -> None:
    """Give memory that is kept for later back: torch's to a GPU, the C library's to the system."""
    if device.type == "cuda":
        with RECORDING:
            torch.cuda.empty_cache()
    else:
        give_freed_memory_back()


def _answers(device: torch.device) -> bool:
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2.0)
    except RuntimeError:
        return False
