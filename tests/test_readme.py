"""The README's examples: every command is one there is, and does what it says when it is typed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import pytest
import typer
from test_journey import serving

from app.__main__ import commands

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "http://127.0.0.1:8000"
DEADLINE_S = 600
"""For one command: the recipes of MNIST take their time on a machine that is busy."""
NUM_PICTURES = 40
"""Of each class, of the photographs of ants and bees; as many again are sent as a zip."""
NOT_TYPED = {
    "make ": "`.ci/run` types them, and `test_setup` and `test_journey` do what they do",
    "docker ": "no Docker engine may be at hand",
}
"""Commands that begin so are only looked up, and why."""
SAYS = {
    f"curl -F file=@var/sample-digit.png {ADDRESS}": '"label":"3"',
    'curl -F file=@var/sample-digit.png "$URL/predict?top_k=3"': '"label":"3"',
    "curl -H 'Content-Type: image/png'": '"label":"3"',
    "echo": '"label":"3"',
    'curl "$URL"': '"production":1',
    "pytorchlib info": "cpu",
    "pytorchlib predict": "sample-digit.png: 3 ",
    "pytorchlib evaluate": r"accuracy\s+9[89]",
    "pytorchlib export": "digits.pt: the weights of digits:1",
    "pytorchlib train --dataset mnist --num-processes 2": r"test accuracy  9\d\.\d",
    "pytorchlib train --dataset mnist --name mnist": r"test accuracy  99\.\d",
    "pytorchlib train --dataset mnist --network mlp": r"test accuracy  9\d\.\d",
    "pytorchlib train --dataset ./pictures": "published      insects:1",
    "pytorchlib finetune": r"accuracy  9\d.*published      ants-bees:1",
    "pytorchlib quantize": r"agreement .*published +ants-bees-int8:1",
    "pytorchlib import": "published      parts:1",
    'curl -F file=@pictures.zip "$URL/datasets"': '"id":"dset-',
    'curl -H "$JSON" "$URL/fine_tuning/jobs"': '"id":"ftjob-',
    'curl "$URL/fine_tuning/jobs"': '"fine_tuned_model":"ants-bees:2"',
    'curl -H "$JSON" "$URL/evaluations"': '"comparison"',
    'curl "$URL/evaluations"': '"status":"succeeded"',
    'curl -H "$JSON" "$URL/models/ants-bees/aliases/production/promote"': '"version":2',
    'curl -X POST "$URL/models/ants-bees/aliases/production/rollback"': '"version":1',
    "pytorchlib keys create": "ptl_",
}
"""What a command that begins so says; every command that says something stands here."""


def lines() -> Iterator[str]:
    """Each command of the README's shell blocks, on one line; then those within its sentences."""
    text = (ROOT / "README.md").read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from re.sub(r"\\\n\s*|(?<=\|)\n\s*", "", block).splitlines()
    yield from re.findall(r"`(pytorchlib [^`\n]* --[^`\n]*)`", text)


def examples() -> Iterator[list[str]]:
    """The same as words, comments left out."""
    yield from filter(None, (shlex.split(line, comments=True) for line in lines()))


def arguments_of(words: list[str]) -> list[str]:
    """What follows `pytorchlib`: the command, or the image, whose entry point is the command."""
    return words[words.index("pytorchlib") + 1 :]


OURS = [
    arguments_of(words)
    for words in examples()
    if words[0] == "pytorchlib" or words[:2] == ["docker", "run"]
]


@pytest.mark.parametrize("arguments", OURS, ids=" ".join)
def test_an_example_is_a_command_with_options_that_it_takes(arguments: list[str]) -> None:
    command = typer.main.get_command(commands)
    context = command.make_context("pytorchlib", list(arguments))
    name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    assert found is not None
    if isinstance(found, click.Group):
        return
    found.make_context(name, rest, parent=context)  # raises for an option it does not take


def test_every_target_of_make_is_there() -> None:
    targets = {words[1] for words in examples() if words[0] == "make"}
    assert {"serve", "test", "test-slow", "check", "bench"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.fixture
def folder(tmp_path: Path, real_data: Path) -> Path:
    """Where the commands are typed, with the files that only a reader has."""
    import torch

    from models import networks

    (tmp_path / "data").symlink_to(real_data)
    (tmp_path / "mobilenet_v2.pth").symlink_to(real_data / "weights" / "mobilenet_v2.pth")
    network = networks.build("torchvision/resnet50", {"num_classes": 2})
    torch.save(network.state_dict(), tmp_path / "m.pt")
    (tmp_path / "labels.txt").write_text("whole\nbroken\n")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for kind in ("ants", "bees"):
            paths = sorted((real_data / "hymenoptera" / "train" / kind).glob("*.jpg"))
            (tmp_path / "pictures" / kind).mkdir(parents=True)
            for path in paths[:NUM_PICTURES]:
                shutil.copy(path, tmp_path / "pictures" / kind)
            for index, path in enumerate(paths[NUM_PICTURES : 2 * NUM_PICTURES]):
                archive.write(path, f"{'test' if index % 2 else 'train'}/{kind}/{path.name}")
    return tmp_path


@pytest.mark.slow
def test_every_example_says_what_it_should_when_it_is_typed(folder: Path) -> None:
    waiting = dict(SAYS)
    with serving(folder, "--quickstart", "--job-threads", "1") as (_, said):
        [address] = re.findall(r"http://\S+:\d+(?=;)", "".join(said))
        shell, dataset = Shell(folder), ""
        for line in lines():
            if line.startswith(tuple(NOT_TYPED)):
                continue
            if line.startswith('curl "$URL/fine_tuning/jobs"'):
                wait_for_job(address)
            answer = shell.type(line.replace(ADDRESS, address).replace("dset-...", dataset))
            answer = ended(address, answer)
            assert '{"error"' not in answer, f"{line}: {answer}"
            [*expected] = [waiting.pop(start) for start in [*waiting] if line.startswith(start)]
            assert expected or not answer, f"nothing was expected of {line}: {answer}"
            for pattern in expected:
                assert re.search(pattern, answer, re.DOTALL), f"{line}: {answer}"
            dataset = next(iter(re.findall(r"dset-\w+", answer)), dataset)
    assert not waiting, "the README has no such commands"
    assert (folder / "why.png").read_bytes().startswith(b"\x89PNG")


class Shell:
    """A shell that remembers what variables were set in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = ""

    def type(self, line: str) -> str:
        """What the command says; it must succeed."""
        if re.match(r"[A-Z]+=", line):
            self.variables += line + "\n"
            return ""
        script = self.variables + line.replace("curl ", "curl --silent --max-time 120 ", 1)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout


def ended(address: str, answer: str) -> str:
    """What came of an evaluation or a promotion that took longer than its request waits."""
    found = re.match(r'{"id":"((?:eval|promotion)-\w+)"', answer)
    return poll(f"{address}/v1/evaluations/{found[1]}") if found else answer


def wait_for_job(address: str) -> None:
    """Until the newest job of fine-tuning has ended well."""
    [job, *_] = httpx.get(f"{address}/v1/fine_tuning/jobs").json()["data"]
    poll(f"{address}/v1/fine_tuning/jobs/{job['id']}")


def poll(url: str) -> str:
    """What lies at `url` once it says that it has succeeded."""
    until = time.monotonic() + DEADLINE_S
    while (said := httpx.get(url, timeout=60)).json()["status"] != "succeeded":
        assert said.json()["status"] in {"queued", "running"}, said.text
        assert time.monotonic() < until, said.text
        time.sleep(0.2)
    return said.text
