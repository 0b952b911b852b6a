"""A run that is killed at any moment and begun again ends with the weights of one that was not."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.store import ModelStore

CODE = """
import json, sys
from pathlib import Path
from training.fine_tune import work
from training.progress import drive
home, folder = Path(sys.argv[1]), Path(sys.argv[2])
drive(work(json.loads(sys.argv[3]), home=home, folder=folder, run=folder.name))
"""
OPTIONS = {
    "base": "digits:1",
    "dataset": "digits",
    "method": "fine_tune",
    "name": "tuned",
    "hyperparameters": {"head_epochs": 3, "epochs": 2, "batch_size": 64, "folds": 2},
    "compute": {"threads": 1, "snapshot_seconds": 0.1, "report_every": 1},
}


def begin(home: Path, folder: Path, **changes: object) -> subprocess.Popen[bytes]:
    options = json.dumps({**OPTIONS, **changes})
    return subprocess.Popen([sys.executable, "-c", CODE, str(home), str(folder), options])


@pytest.mark.slow
def test_kills_change_no_bit_and_publish_once(store: ModelStore, tmp_path: Path) -> None:
    whole = begin(tmp_path, tmp_path / "whole", name="whole")
    assert whole.wait(300) == 0
    for moment in range(12):
        killed = begin(tmp_path, tmp_path / "killed")
        started = time.monotonic()
        while not (tmp_path / "killed" / "begun.json").exists():
            assert time.monotonic() - started < 120
            time.sleep(0.02)
        time.sleep(2.5 + 0.35 * moment)
        killed.kill()
        killed.wait(10)
    assert begin(tmp_path, tmp_path / "killed").wait(300) == 0
    assert store.versions("tuned") == [1]
    digests = {store.resolve(name).manifest().digest for name in ("whole", "tuned")}
    assert len(digests) == 1
