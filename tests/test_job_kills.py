"""The short form of `python -m benchmarks.kill`: kills, and the same weights in the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "count"), [("worker", 3), ("server", 1), ("stopped", 1), ("operations", 4)]
)
def test_what_is_killed_ends_with_the_same_weights(kind: str, count: int) -> None:
    counts = {"worker": 0, "server": 0, "stopped": 0, "operations": 0, kind: count}
    arguments = [f"--{name}={number}" for name, number in counts.items()]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kill", *arguments, "--epochs", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert [trial for trial in trials if trial.get("faults")] == [], done.stderr
    assert trials[-1]["trials"] == count
