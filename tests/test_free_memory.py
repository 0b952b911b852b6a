"""Memory of what has gone is given back to whoever it was taken from."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from app.engine.device_error import free_cached_memory

MEBIBYTE = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries give back by themselves")
def test_pages_between_living_tensors_go_back_to_the_system() -> None:
    """A network that is unloaded leaves holes in the heap, since others came after it."""
    tensors = [torch.zeros(25_000) for _ in range(1000)]  # 95 MiB, each below the limit for a map
    living = tensors[::40]
    del tensors
    before = _resident_bytes()
    free_cached_memory(torch.device("cpu"))
    assert before - _resident_bytes() > 50 * MEBIBYTE
    assert all(not tensor.any() for tensor in living)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
