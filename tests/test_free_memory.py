"""Memory of what has gone is used again, or given back to whoever it was taken from."""

import asyncio
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from app.engine.batcher import Batcher
from app.engine.device_error import free_cached_memory

MEBIBYTE = 1 << 20


PROCESSOR = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="other C libraries give back by themselves"
)


def test_pages_between_living_tensors_go_back_to_the_system() -> None:
    """A network that is unloaded leaves holes in the heap, since others came after it."""
    living, before = _holes(), _resident_bytes()
    free_cached_memory(PROCESSOR)
    assert before - _resident_bytes() > 50 * MEBIBYTE
    assert all(not tensor.any() for tensor in living)


@pytest.mark.anyio
async def test_a_batcher_of_a_processor_gives_back_what_it_is_told_has_gone() -> None:
    batcher = Batcher(PROCESSOR)
    batcher.start()
    try:
        living, before = _holes(), _resident_bytes()
        batcher.free_soon()
        async with asyncio.timeout(10):
            while before - _resident_bytes() < 50 * MEBIBYTE:
                await asyncio.sleep(0.01)
    finally:
        await batcher.stop(1.0)
    assert all(not tensor.any() for tensor in living)


def _holes() -> list[torch.Tensor]:
    """A few tensors that live between many that have gone; 95 MiB, none large enough for a map."""
    return [torch.zeros(25_000) for _ in range(1000)][::40]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.parametrize("where", ["main", "other"])
def test_freed_blocks_are_used_again_whatever_thread_asks(where: str) -> None:
    """The second 24 MiB of zeros written cost no new page; by default they cost one every 4 KiB."""
    assert _new_pages(where, keeping=True) < 100
    assert _new_pages(where, keeping=False) > 5000


def test_who_sets_the_c_library_up_by_its_environment_is_left_alone() -> None:
    assert _new_pages("main", keeping=True, MALLOC_ARENA_MAX="4") > 5000


def _new_pages(where: str, *, keeping: bool, **environ: str) -> int:
    """Pages that the kernel gave a process for a large block after another was freed."""
    script = f"""
        import ctypes, resource, threading
        from app.engine.heap import keep_freed_memory

        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size

        def written():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(24 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        def run():
            written()
            print(written())

        if {keeping}:
            keep_freed_memory()
        thread = threading.Thread(target=run)
        if {where == "other"}:
            thread.start()
            thread.join()
        else:
            run()
    """
    kept = {key: said for key, said in os.environ.items() if not key.startswith("MALLOC_")}
    kept.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(
        command, env={**kept, **environ}, capture_output=True, check=True, timeout=60
    )
    return int(done.stdout)
