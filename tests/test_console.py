"""How a loop looks while it runs, and how it is stopped."""

import json
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from training.console import Bar, follow, stop_requests
from training.progress import Progress


def three_steps(events: list[str], interrupt_in: int = 0) -> Generator[Progress, None, str]:
    """Notes what happens to it; may be hit by a Ctrl-C in the middle of a step."""
    try:
        for step in (1, 2, 3):
            events.append(f"step {step} begins")
            if step == interrupt_in:
                signal.raise_signal(signal.SIGINT)
            events.append(f"step {step} ends")
            yield Progress("train", step, 3, epoch=1, num_epochs=1, loss=1 / step, accuracy=0.5)
        yield Progress("epoch", 3, 3, epoch=1, num_epochs=1, accuracy=0.75)
    except GeneratorExit:
        events.append("closed")
        raise
    return "done"


def test_a_loop_is_driven_to_its_end() -> None:
    events: list[str] = []
    assert follow(three_steps(events)) == "done"
    assert "closed" not in events


def test_ctrl_c_lets_the_step_end_and_then_closes_the_loop() -> None:
    events: list[str] = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        follow(three_steps(events, interrupt_in=2))
    assert events[-3:] == ["step 2 begins", "step 2 ends", "closed"]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_does_not_wait() -> None:
    with stop_requests() as is_asked_to_stop:
        assert not is_asked_to_stop()
        signal.raise_signal(signal.SIGINT)
        assert is_asked_to_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    follow(three_steps([]))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train 1/1, step 1  loss 1.0000  accuracy 50.00%"
    assert lines[-1] == "epoch 1/1, step 3  accuracy 75.00%"


def test_json_lines_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    follow(three_steps([]), as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["phase"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("epoch", 3),
    ]


def test_the_bar_of_a_terminal_shows_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        for progress in three_steps([]):
            bar.show(progress)
    assert "accuracy 75.00%" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_cuts_none_of_the_numbers(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    numbers = "loss 0.1234  accuracy 99.12%  123,456 images/s  1234 s left"
    with Bar() as bar:
        bar.show(
            Progress(
                "cross-validate",
                99_999,
                100_000,
                loss=0.1234,
                accuracy=0.9912,
                images_per_second=123_456,
                seconds_left=1234,
            )
        )
    lines = capsys.readouterr().err.splitlines()
    assert any(line.rstrip() == numbers for line in lines)
    assert any("99999/100000 0:00:00" in line for line in lines)


@pytest.mark.slow
def test_an_interrupted_training_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    train = [sys.executable, "-m", "training", "train", "--home", str(tmp_path), "--json"]
    options = ["--dataset", "digits", "--network", "mlp", "--epochs", "300", "--threads", "1"]
    with subprocess.Popen(
        [*train, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["phase"] in ("train", "epoch")
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with:  pytorchlib train --resume" in words
    run = words.split("--resume ")[1].split()[0]
    done = subprocess.run([*train, "--resume", run], capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert lines[0]["step"] > 1
    assert lines[-2]["epoch"] == 300
    assert lines[-1]["metrics"]["accuracy"] > 0.9
