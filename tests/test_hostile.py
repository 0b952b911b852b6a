"""A real server among hostile pictures and damaged versions: it answers, stays small, serves on."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from conftest import publish_cnn
from safetensors.torch import load_file, save_file
from test_journey import serving
from test_picture import BOMBS, LARGEST, manifest

from models.store import ModelStore

pytestmark = pytest.mark.slow
MOST_MIB = 256
MOST_SECONDS = 2
TYPES = {".png": "image/png", ".webp": "image/webp"}


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


class Server:
    """A process that serves, and what it costs: as the kernel counts it."""

    def __init__(self, pid: int, address: str) -> None:
        self.process = Path(f"/proc/{pid}")
        self.client = httpx.Client(base_url=address, timeout=120)

    def predict(self, model: str, picture: bytes, kind: str = "image/png") -> httpx.Response:
        url = f"/v1/models/{model}/predict"
        return self.client.post(url, content=picture, headers={"Content-Type": kind})

    def forget_peak(self) -> None:
        (self.process / "clear_refs").write_text("5")

    def mebibytes(self, line: str) -> float:
        """`VmRSS` for what it holds, `VmHWM` for the most since the peak was forgotten."""
        status = (self.process / "status").read_text()
        return int(re.search(rf"{line}:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def seconds(self) -> float:
        """Of processor time so far: what others do on this machine is not this server's fault."""
        fields = (self.process / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """The store of the folder that the server is started in."""
    store = ModelStore(tmp_path / "var" / "models")
    publish_cnn(store, "digits", seed=1)
    return store


@pytest.fixture
def server(store: ModelStore, tmp_path: Path) -> Iterator[Server]:
    assert store.names()
    with serving(tmp_path, "--device", "cpu", "--threads", "1") as (process, said):
        [address] = re.findall(r"http://\S+:\d+(?=;)", said[-1])
        server = Server(process.pid, address)
        yield server
        server.client.close()


def test_no_picture_costs_a_server_more_than_two_seconds_and_256_mib(
    server: Server, real_data: Path, digit_png: bytes
) -> None:
    assert server.predict("digits", digit_png).status_code == 200
    folder = real_data / "images"
    pictures = {row["file"]: (folder / row["file"]).read_bytes() for row in manifest(real_data)}
    pictures |= {name: make() for name, make in {**BOMBS, **LARGEST}.items()}
    for name, picture in pictures.items():
        server.forget_peak()
        held, before = server.mebibytes("VmRSS"), server.seconds()
        answer = server.predict("digits", picture, TYPES.get(Path(name).suffix, "image/jpeg"))
        assert server.seconds() - before < MOST_SECONDS, name
        assert server.mebibytes("VmHWM") - held < MOST_MIB, name
        assert answer.status_code in {200, 413, 415, 422}, (name, answer.text)
        if answer.status_code != 200:
            assert " " in answer.json()["error"]["message"], (name, answer.text)
    assert server.predict("digits", digit_png).status_code == 200


def edited(path: Path, edit: Callable[[Path], None]) -> None:
    """A file of a version, which is read-only, changed all the same."""
    path.parent.chmod(0o755)
    path.chmod(0o644)
    edit(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def drop_labels(path: Path) -> None:
    document = json.loads(path.read_text())
    del document["labels"]
    path.write_text(json.dumps(document))


def reshape(path: Path) -> None:
    state = load_file(path)
    save_file({name: tensor.flatten()[:1].clone() for name, tensor in state.items()}, path)


def test_a_store_with_damaged_versions_serves_the_others(
    store: ModelStore, server: Server, digit_png: bytes, tmp_path: Path
) -> None:
    trap = tmp_path / "sprung"
    damages: dict[str, tuple[str, Callable[[Path], None]]] = {
        "flipped": ("weights.safetensors", flip),
        "lacking": ("manifest.json", drop_labels),
        "misshapen": ("weights.safetensors", reshape),
        "trapped": ("weights.safetensors", lambda path: path.write_bytes(pickle.dumps(Trap(trap)))),
    }
    for name, (file, damage) in damages.items():
        edited(publish_cnn(store, name, seed=2).folder / file, damage)
    for name, (file, _) in damages.items():
        answer = server.predict(name, digit_png)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "load_failed"), name
        assert name in answer.json()["error"]["message"]
        assert file.partition(".")[0] in answer.json()["error"]["message"], answer.text
        assert server.predict("digits", digit_png).status_code == 200
    assert not trap.exists()
    listed = {model["id"] for model in server.client.get("/v1/models").json()["data"]}
    assert {"digits", *damages} <= listed
