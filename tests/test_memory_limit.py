"""A job that takes too much is told so, before its container is killed."""

from pathlib import Path

import pytest

from app.jobs.memory_limit import MEBIBYTE, MemoryLimit

LIMIT = 100 * MEBIBYTE


def cgroup(folder: Path, version: int, used: int, droppable: int) -> Path:
    names = {
        1: ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "total_inactive_file"),
        2: ("memory.current", "memory.max", "inactive_file"),
    }
    usage, limit, inactive = names[version]
    (folder / usage).parent.mkdir(exist_ok=True)
    (folder / usage).write_text(f"{used}\n")
    (folder / limit).write_text(f"{LIMIT}\n")
    (folder / usage).with_name("memory.stat").write_text(f"anon 1\n{inactive} {droppable}\n")
    return folder


def test_a_job_has_a_limit_of_its_own(tmp_path: Path) -> None:
    limit = MemoryLimit(LIMIT, tmp_path)
    assert limit.reason(LIMIT) is None
    assert "101 MiB of memory, and 100 MiB is its limit" in str(limit.reason(LIMIT + MEBIBYTE))


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_ends_before_its_container_does(tmp_path: Path, version: int) -> None:
    limit = MemoryLimit(0, cgroup(tmp_path, version, int(0.95 * LIMIT), 0))
    assert "came near its 100 MiB" in str(limit.reason(LIMIT // 2))
    assert limit.reason(LIMIT // 100) is None  # the server's own memory is not its fault
    cgroup(tmp_path, version, int(0.95 * LIMIT), LIMIT // 2)
    assert limit.reason(LIMIT // 2) is None


def test_without_limits_there_is_no_reason(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert MemoryLimit(0, tmp_path).reason(LIMIT) is None
