"""The examples of the pages under docs/: whatever is asked of a server is asked of a real one."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from conftest import ROOT, publish_cnn
from PIL import Image
from test_journey import serving

from models.store import ModelStore
from training.config import TrainConfig
from training.progress import drive
from training.publish import publish
from training.recipes import with_recipe
from training.train import train

pytestmark = pytest.mark.slow
ADDRESS: Final = "http://127.0.0.1:8000"
DEADLINE_S: Final = 300
IDS: Final = {
    **{"dset-...": "dset", "ftjob-...": "ftjob"},
    **{"datasets/ID": "dset", "evaluations/ID": "eval"},
}
PAGES: Final = ("datasets", "explanations", "versions", "evaluations", "fine-tuning", "keys")
"""The pages that ask something over HTTP; the last one makes keys, which all that follow need."""


def blocks(page: str, language: str) -> list[str]:
    """What stands in the blocks of a language on a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page: str) -> Iterator[str]:
    """What the page types, one command after the other; not what starts servers or installs."""
    for block in blocks(page, "sh"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if re.match(r"curl |[A-Z]+=|pytorchlib keys ", line):
                yield line


@dataclass
class Reader:
    """Somebody who types what a page says, and knows what the answers were.

    Attributes:
        folder: where they type.
        address: of the server.
        ids: the last id of each kind that an answer had.
        variables: what they have set.
    """

    folder: Path
    address: str
    ids: dict[str, str] = field(default_factory=dict)
    variables: str = ""

    def types(self, line: str) -> str:
        """The answer, which is none of refusal."""
        line = self.filled(line)
        if name := re.match(r"([A-Z]+)=", line):
            value = self._noted(line, "bash", "-e", "-c", f'{line}; printf %s "${name[1]}"')
            self.variables += f"{name[1]}={shlex.quote(value)}\n"
            return ""
        script = self.variables + line.replace("curl ", "curl -sS --fail-with-body -m 300 ", 1)
        return self._noted(line, "bash", "-e", "-o", "pipefail", "-c", script)

    def runs(self, program: str) -> str:
        """The same for a program in Python."""
        return self._noted(program, sys.executable, "-c", self.filled(program))

    def filled(self, text: str) -> str:
        """With a real address and real ids."""
        text = text.replace(ADDRESS, self.address)
        for shown, kind in IDS.items():
            if shown in text:
                text = text.replace(shown, shown.replace(shown.split("/")[-1], self.ids[kind]))
        return text

    def _noted(self, what: str, *command: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, f"{what}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        for found in re.finditer(r"\b(dset|ftjob|eval)-[0-9a-f]{24}\b", done.stdout):
            self.ids[found[1]] = found[0]
        return done.stdout


def png(seed: int, least: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(least, least + 80, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_pictures(path: Path, *parts: str) -> None:
    """Dark and light ones, under the names that the page about datasets mends."""
    with zipfile.ZipFile(path, "w") as archive:
        for place, part in enumerate(parts):
            for index in range(12):
                seed = 1000 * place + index
                archive.writestr(f"{part}ants/{index}.jpg", png(seed, 0))
                archive.writestr(f"{part}bees/{index}.jpg", png(500 + seed, 170))
                if not part and index < 4:
                    archive.writestr(f"bee/{index}.jpg", png(900 + seed, 170))
        archive.writestr(f"{parts[0]}bees/again.jpg", png(500, 170))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """In a folder with what the pages take for granted: models, pictures, a server."""
    folder = tmp_path_factory.mktemp("reader")
    options = ("--quickstart", "--job-threads", "1", "--threads", "1", "--evaluation-wait-s", "200")
    store = ModelStore(folder / "var" / "models")
    for epochs in (1, 4):  # the second is better, but on no processor perfect: it can be calibrated
        config = with_recipe({"dataset": "digits"}) | {"epochs": epochs, "threads": 1}
        publish(drive(train(TrainConfig.of(**config))), store, "digits")
    with serving(folder, *options) as (_, said):
        [address] = re.findall(r"http://\S+:\d+(?=;)", "".join(said))
        publish_cnn(store, "mobilenet", seed=1)
        for path in store.version("digits", 1).folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "cat.jpg").write_bytes(png(7, 90))
        with zipfile.ZipFile(folder / "digits.zip", "w") as archive:
            for digit in range(10):
                archive.writestr(f"{digit}/one.png", png(digit, 0))
        yield Reader(folder, address)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_asks_is_answered(reader: Reader, page: str) -> None:
    parts = ("",) if page == "datasets" else ("train/", "val/", "test/")
    write_pictures(reader.folder / "pictures.zip", *parts)
    asked = [line for line in commands(page) if "curl " in line]
    assert asked, "the page asks nothing"
    for line in commands(page):
        if line.endswith('/resume"') or "/curves" in line:
            wait_for_job(reader)
        reader.types(line)
        if "keys " in line:
            time.sleep(2.5)  # a running server looks at its keys once a second
    for program in blocks(page, "python"):
        if program.startswith("import openai\n"):
            assert reader.runs(program).strip() in {"queued", "running", "succeeded"}
    for body in blocks(page, "json"):
        if "training_file" in body:
            url = f"{reader.address}/v1/fine_tuning/jobs"
            answer = httpx.post(url, json=json.loads(reader.filled(body)))
            assert answer.json()["promotion"]["status"] == "pending", answer.text


def wait_for_job(reader: Reader) -> None:
    """Until the job does nothing: it is paused, or has ended well."""
    url = f"{reader.address}/v1/fine_tuning/jobs/{reader.ids['ftjob']}"
    deadline = time.monotonic() + DEADLINE_S
    found: dict[str, Any] = {}
    while found.get("status") not in ("paused", "succeeded"):
        assert time.monotonic() < deadline, found
        found = httpx.get(url).json()
        assert found["error"] is None, found
        time.sleep(0.2)
