"""The device that computes and the processors that may be used, read from a kernel's own files."""

import os
from pathlib import Path

import pytest
import torch

from models.device import DeviceUnavailable, choose_device, supports_bf16, thread_count

ALL = len(os.sched_getaffinity(0))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    (tmp_path / "membership").write_text("0::/\n")
    return tmp_path


def threads(kernel: Path) -> int:
    return thread_count(kernel / "cgroup", kernel / "membership")


def limit(kernel: Path, cgroup: str, content: str) -> None:
    """Write a version 2 limit."""
    folder = kernel / "cgroup" / cgroup
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(content)


def limit_v1(kernel: Path, cgroup: str, quota: int, period: int = 100_000) -> None:
    folder = kernel / "cgroup" / cgroup
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (folder / "cpu.cfs_period_us").write_text(f"{period}\n")


def test_without_cgroups_the_affinity_mask_decides(kernel: Path) -> None:
    assert threads(kernel) == ALL
    assert thread_count(kernel / "nothing", kernel / "nowhere") == ALL


def test_the_mask_is_this_process_own(kernel: Path) -> None:
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert threads(kernel) == 1
    finally:
        os.sched_setaffinity(0, everything)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("100000 100000\n", 1),
        ("50000 100000\n", 1),
        ("1 100000\n", 1),
        ("9900000 100000\n", ALL),
        ("max 100000\n", ALL),
        ("0 100000\n", ALL),
        ("100000 0\n", ALL),
        ("many few\n", ALL),
        ("100000\n", ALL),
        ("", ALL),
    ],
)
def test_a_quota_of_version_2_bounds_it(kernel: Path, content: str, expected: int) -> None:
    limit(kernel, "", content)
    assert threads(kernel) == expected


def test_part_of_a_processor_counts_as_one(kernel: Path) -> None:
    limit(kernel, "", "110000 100000\n")
    assert threads(kernel) == min(2, ALL)


@pytest.mark.parametrize("limited", ["", "system.slice", "system.slice/ours.service"])
def test_a_limit_on_any_cgroup_above_holds(kernel: Path, limited: str) -> None:
    (kernel / "membership").write_text("0::/system.slice/ours.service\n")
    limit(kernel, "system.slice/ours.service", "max 100000\n")
    limit(kernel, limited, "100000 100000\n")
    assert threads(kernel) == 1


def test_a_neighbours_limit_does_not(kernel: Path) -> None:
    (kernel / "membership").write_text("0::/ours\n")
    limit(kernel, "theirs", "100000 100000\n")
    assert threads(kernel) == ALL


def test_inside_a_container_the_mount_begins_at_its_own_cgroup(kernel: Path) -> None:
    (kernel / "membership").write_text("0::/docker/0123abc\n")
    limit(kernel, "", "100000 100000\n")
    assert threads(kernel) == 1


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize(("quota", "expected"), [(100_000, 1), (50_000, 1), (-1, ALL)])
def test_version_1(kernel: Path, controllers: str, quota: int, expected: int) -> None:
    (kernel / "membership").write_text(f"7:memory:/x\n4:{controllers}:/docker/abc\n0::/\n")
    limit_v1(kernel, f"{controllers}/docker/abc", quota)
    assert threads(kernel) == expected


def test_version_1_inside_a_container(kernel: Path) -> None:
    (kernel / "membership").write_text("4:cpu:/docker/abc\n")
    limit_v1(kernel, "cpu", 100_000)
    assert threads(kernel) == 1


def test_this_machine_has_a_processor() -> None:
    assert 1 <= thread_count() <= ALL


def test_auto_takes_what_is_there() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device().type == kind
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    "wanted",
    ["", "CPU", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:²", "cuda:0:0", "cpu:0"],
)
def test_a_name_that_is_none_lists_those_that_are(wanted: str) -> None:
    with pytest.raises(DeviceUnavailable, match="is not one of auto, cpu, cuda, cuda:N"):
        choose_device(wanted)


def test_a_device_that_is_not_here_says_how_many_are() -> None:
    with pytest.raises(DeviceUnavailable, match=r"'cuda:99' is wanted and torch sees \d+ CUDA"):
        choose_device("cuda:99")


def test_bf16_is_a_fact_of_the_device() -> None:
    assert supports_bf16(torch.device("cpu")) in (True, False)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    assert choose_device("cuda") == choose_device("cuda:0") == choose_device("auto")
    major, _ = torch.cuda.get_device_capability(0)
    assert supports_bf16(torch.device("cuda", 0)) == (major >= 8)
