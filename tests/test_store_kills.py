"""A writer of the model store killed, stopped, or raced at every one of its steps."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def trials(kind: str, folder: Path) -> list[dict[str, Any]]:
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "publishing.py"), kind, str(folder)]
    done = subprocess.run(
        command, env=os.environ | single, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_writer_killed_at_any_step_leaves_all_or_nothing(tmp_path: Path) -> None:
    done = trials("kill", tmp_path)
    assert [trial for trial in done if trial["faults"]] == []
    names = [trial["operation"] for trial in done]
    steps = {name: names.count(name) for name in ("publish", "delete", "move")}
    assert steps["publish"] > 60
    assert steps["delete"] > 10
    assert steps["move"] > 4


def test_a_writer_stopped_at_any_step_and_woken_later_publishes_nothing_twice(
    tmp_path: Path,
) -> None:
    done = trials("stop", tmp_path)
    assert [trial for trial in done if trial["faults"]] == []
    assert any(trial["busy"] for trial in done)  # it was stopped with the lock in its hand
    assert not all(trial["busy"] for trial in done)


def test_two_processes_that_publish_at_once_share_the_numbers(tmp_path: Path) -> None:
    (trial,) = trials("race", tmp_path)
    assert trial["faults"] == []
