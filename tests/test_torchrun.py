"""Training in several processes from the command line: by an option, and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from models.store import ModelStore, Version

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
RENDEZVOUS = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
"""A port that is free, instead of torchrun's fixed one."""
TRAIN = ["-m", "training", "train", "--dataset", "digits", "--network", "mlp", "--batch-size", "64"]
pytestmark = pytest.mark.slow


def begin(home: Path, *options: str, torchrun: bool = False) -> "subprocess.Popen[str]":
    start = [*TORCHRUN, *RENDEZVOUS] if torchrun else [sys.executable]
    command = [*start, *TRAIN, "--home", str(home), "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=environment)


def published(process: "subprocess.Popen[str]", home: Path) -> Version:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert [line for line in out.splitlines() if '"version"' in line] == [out.splitlines()[-1]]
    return ModelStore(home / "models").resolve(json.loads(out.splitlines()[-1])["version"])


def test_an_option_and_torchrun_give_the_same_weights_once(tmp_path: Path) -> None:
    options = ["--epochs", "3", "--name", "two"]
    first = published(begin(tmp_path / "a", *options, "--num-processes", "2"), tmp_path / "a")
    second = published(begin(tmp_path / "b", *options, torchrun=True), tmp_path / "b")
    assert first.manifest().digest == second.manifest().digest
    assert first.manifest().lineage.environment["processes"] == "2"
    assert second.manifest().lineage.options["num_processes"] == 2
    for home in (tmp_path / "a", tmp_path / "b"):
        (run,) = (home / "runs").iterdir()
        assert len(list((run / "events").iterdir())) == 1
        assert ModelStore(home / "models").versions("two") == [1]


def steps(process: "subprocess.Popen[str]") -> int:
    """Wait until a loss was reported."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=60)[1]
    return int(json.loads(line)["step"])


def helpers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("torchrun", [False, True])
def test_an_interrupt_saves_once_and_leaves_nobody(torchrun: bool, tmp_path: Path) -> None:
    options = ["--epochs", "100000", "--report-every", "1"]
    options += [] if torchrun else ["--num-processes", "2"]
    process = begin(tmp_path, *options, torchrun=torchrun)
    steps(process)
    others = helpers(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "stopped; go on with:  pytorchlib train --resume" in errors
    assert torchrun or process.returncode == 130
    assert not psutil.wait_procs(others, timeout=10)[1]
    (run,) = (tmp_path / "runs").iterdir()
    assert len(list((run / "snapshots").iterdir())) == 1


def test_a_killed_rank_under_torchrun_ends_all_and_resuming_gives_the_same_bits(
    tmp_path: Path,
) -> None:
    options = ["--epochs", "10", "--name", "two", "--snapshot-seconds", "0.05"]
    options += ["--report-every", "1"]
    whole = published(begin(tmp_path / "a", *options, "--num-processes", "2"), tmp_path / "a")
    process = begin(tmp_path / "b", *options, torchrun=True)
    while steps(process) < 30:
        pass
    everybody = helpers(process)
    victim = max(everybody, key=lambda one: one.pid)
    victim.kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - began < 30
    assert not psutil.wait_procs(everybody, timeout=10)[1]
    (run,) = (tmp_path / "b" / "runs").iterdir()
    resumed = published(
        begin(tmp_path / "b", "--resume", str(run), "--num-processes", "2"), tmp_path / "b"
    )
    assert resumed.manifest().digest == whole.manifest().digest


def test_the_command_that_starts_its_ranks_names_the_one_that_died(tmp_path: Path) -> None:
    options = ["--epochs", "100000", "--report-every", "1", "--num-processes", "2"]
    process = begin(tmp_path, *options)
    steps(process)
    (helper,) = helpers(process)
    helper.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("rank 1 was killed by SIGKILL")


def test_more_processes_for_a_linear_probe_are_refused_in_words(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training", "finetune", "--num-processes", "2"]
    done = subprocess.run(
        [*command, "--home", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("a linear probe learns one layer")
