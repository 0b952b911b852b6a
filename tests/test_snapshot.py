"""Snapshots: whole or absent, and the newest sound one is used."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.snapshot import Snapshot, Snapshots


def snapshot(number: int) -> Snapshot:
    grid = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    tensors = {"weights": {"grid": grid * number, "count": torch.tensor(number)}, "average": {}}
    return Snapshot(tensors, {"step": number, "loss": 0.1 * number})


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    Snapshots(tmp_path).save(3, snapshot(3))
    found = Snapshots(tmp_path).newest()
    assert found is not None
    assert found.state == {"step": 3, "loss": 0.1 * 3}
    assert torch.equal(found.tensors["weights"]["grid"], snapshot(3).tensors["weights"]["grid"])
    assert found.tensors["weights"]["count"].item() == 3
    assert found.tensors["average"] == {}


def test_the_two_newest_are_kept_and_what_a_dead_writer_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".writing-dead").mkdir()
    store = Snapshots(tmp_path)
    for step in (1, 2, 10):
        store.save(step, snapshot(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-0000000002",
        "step-0000000010",
    ]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert Snapshots(tmp_path / "absent").newest() is None


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_snapshot_gives_way_to_the_one_before(
    name: str, damage: str, tmp_path: Path
) -> None:
    store = Snapshots(tmp_path)
    store.save(1, snapshot(1))
    path = store.save(2, snapshot(2)) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        # In the state, the first digit of the step: still JSON, and another number.
        position = data.index(b'"step": 2') + 8 if name == "state.json" else len(data) - 1
        data[position] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    found = store.newest()
    assert found is not None
    assert found.state["step"] == 1


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = Snapshots(tmp_path)
    (store.save(5, snapshot(5)) / "state.json").write_text("{}")
    store.save(5, snapshot(5))
    found = store.newest()
    assert found is not None
    assert found.state["step"] == 5


KILLED = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, "tests")
from test_fit import config, digest, fresh, opened
from training.fit import fit
from training.progress import drive

settings = config(report_every=1, snapshot_seconds=0, epochs=20, ema_decay=0.9, augment="digits",
                  num_workers=0)
result = drive(fit(fresh(dropout=0.2), opened(settings), settings, snapshots=Path(sys.argv[1])))
print(digest(result.network))
"""


def run(folder: Path, kill_after_s: float | None = None) -> str:
    """Train in another process; kill it so long after its first snapshot, or let it end."""
    command = [sys.executable, "-c", KILLED, str(folder)]
    before, deadline = set(folder.glob("step-*")), time.monotonic() + 60
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if kill_after_s is not None:
            while not set(folder.glob("step-*")) - before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(kill_after_s)
            process.send_signal(signal.SIGKILL)
        return process.communicate(timeout=120)[0].strip()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_never_killed(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    assert len(whole) == 64
    for kill_after_s in (0.05, 0.2, 0.4):
        assert run(tmp_path / "killed", kill_after_s) == ""
    assert run(tmp_path / "killed") == whole
