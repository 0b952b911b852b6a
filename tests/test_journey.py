"""From a clone to a prediction, as a newcomer does it: real processes, the printed command."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PYTORCHLIB = str(Path(sys.executable).parent / "pytorchlib")
DEADLINE_S = 120


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """`pytorchlib serve` in `folder`, and what it said up to its address."""
    command = [PYTORCHLIB, "serve", "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("Serving on") and "--quickstart" not in options:
                break
            if line.startswith("Try:"):
                break
        yield process, said
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdout.close()


def test_quickstart_trains_once_and_answers_the_printed_command(tmp_path: Path) -> None:
    with serving(tmp_path, "--quickstart") as (process, said):
        [curl] = [line.removeprefix("Try:").strip() for line in said if line.startswith("Try:")]
        answer = json.loads(_shell(curl, tmp_path))
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    assert (answer["model"], answer["version"]) == ("digits", 1)
    assert answer["predictions"][0]["label"] == "3"
    version = tmp_path / "var" / "models" / "digits"
    assert json.loads((version / "1" / "manifest.json").read_text())["metrics"]["accuracy"] >= 0.98

    before = sorted(path.name for path in version.iterdir())
    with serving(tmp_path, "--quickstart") as (process, said):
        assert "training" not in "".join(said)
        assert sorted(path.name for path in version.iterdir()) == before
        [curl] = [line.removeprefix("Try:").strip() for line in said if line.startswith("Try:")]
        assert json.loads(_shell(curl, tmp_path))["version"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0


def test_a_file_of_ones_own_is_imported_once(tmp_path: Path) -> None:
    import torch

    from models import networks

    torch.manual_seed(0)
    network = networks.build("torchvision/squeezenet1_1", {"num_classes": 3})
    torch.save(network.state_dict(), tmp_path / "m.pt")
    (tmp_path / "labels.txt").write_text("red\ngreen\nblue\n")
    options = ("--import", "m.pt", "--network", "torchvision/squeezenet1_1", "--name", "parts")
    with serving(tmp_path, *options, "--labels", "labels.txt") as (_, said):
        assert "m.pt is parts:1 now\n" in said
        address = re.search(r"http://\S+:\d+", said[-1])
        assert address is not None
        picture = tmp_path / "x.png"
        picture.write_bytes(_png())
        _shell(f"curl --fail --retry 50 --retry-delay 1 {address[0]}/readyz", tmp_path)
        model = json.loads(_shell(f"curl {address[0]}/v1/models/parts", tmp_path))
        assert model["production"]["live"], "ready means that the first picture waits for nothing"
        url = f"{address[0]}/v1/models/parts/predict"
        answer = json.loads(_shell(f"curl -sS -F file=@x.png {url}", tmp_path))
        assert answer["predictions"][0]["label"] in {"red", "green", "blue"}
    with serving(tmp_path, *options, "--labels", "labels.txt") as (_, said):
        assert "m.pt is parts:1, imported before\n" in said


def test_a_taken_port_is_told_at_once(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, said):
        port = said[-1].split(";")[0].rpartition(":")[2]
        command = [PYTORCHLIB, "serve", "--port", port]
        second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert "Cannot listen" in second.stderr
    assert "Traceback" not in second.stderr


def _shell(command: str, folder: Path) -> str:
    command = command.replace("curl ", "curl --silent --show-error --max-time 60 ", 1)
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    answer = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, timeout=90, env=environment
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def _png() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (300, 200), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()
