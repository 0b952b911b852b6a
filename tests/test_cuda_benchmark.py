"""The benchmark of GPUs, as far as it goes without one: a typo must not wait for the day."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cuda
from benchmarks.cuda import SCENARIOS, SMOKE, Run, main
from benchmarks.cuda_loops import Curve
from benchmarks.payload import v2_pixels

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(torch.device("cpu"), SMOKE, None, tmp_path, compile_too=False)  # type: ignore[arg-type]


def test_the_plan_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == [f"G{n}" for n in range(8)]


def test_without_a_gpu_it_says_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main([]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_a_line_through_measured_times() -> None:
    curve = Curve("n", "f", {size: 0.002 + 0.0001 * size for size in (1, 2, 4, 8, 16)})
    assert curve.line == pytest.approx((0.002, 0.0001))
    assert curve.best_per_s == pytest.approx(16 / 0.0036)
    assert Curve("n", "f", {1: 0.5}).line == (0.5, 0.0)
    assert Curve("n", "f", {}, "no").best_per_s == 0.0


def test_a_row_says_what_was_to_be_reached(run: Run) -> None:
    run.found("G1", "rate", 3.0, "per s", 2.0)
    run.found("G1", "ratio", 3.0, "", 2.0, at_most=True)
    run.found("G1", "time", 3.0, "ms")
    assert [row[2:] for row in run.rows] == [
        ("3 per s", "at least 2", "met"),
        ("3", "at most 2", "missed"),
        ("3 ms", "", ""),
    ]


def test_a_scenario_that_fails_is_a_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SCENARIOS", {"G6": SCENARIOS["G6"], "G1": lambda _: 1 / 0})
    for name in ("G6", "G1"):
        cuda._measure(run, name, cuda.time.monotonic())
    cuda._measure(run, "G1", cuda.time.monotonic() - 601)
    told = [row[1] for row in run.rows]
    assert told[0] == "there is no MNIST below --data"
    assert told[1].startswith("failed: ZeroDivisionError")
    assert told[2] == "the ten minutes were over"


def test_pixels_are_a_request_of_the_protocol() -> None:
    sent = v2_pixels("m", torch.zeros(2, 3, 4, 4, dtype=torch.uint8).numpy())
    header = int(sent.headers["Inference-Header-Content-Length"])
    document = json.loads(sent.body[:header])
    assert document["inputs"][0]["shape"] == [2, 3, 4, 4]
    assert len(sent.body) - header == 2 * 3 * 4 * 4


@pytest.mark.slow
def test_all_of_it_on_a_processor(real_data: Path) -> None:
    if shutil.which("wrk") is None:
        pytest.skip("wrk is not installed")
    command = [sys.executable, "-m", "benchmarks.cuda", "--device", "cpu", "--smoke"]
    command += ["--data", str(real_data)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "failed: " not in done.stdout
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert {f"G{n}" for n in range(8)} <= figures.keys()
