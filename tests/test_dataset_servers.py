"""Datasets on real servers: real photographs, several processes, kills, and clients that leave."""

import io
import socket
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image
from test_key_servers import Address, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
URL = "/v1/datasets"
ZIP = {"content-type": "application/zip"}


def client_of(address: Address) -> httpx.Client:
    return httpx.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=120)


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def many_pictures(count: int, side: int = 64) -> bytes:
    generator = np.random.default_rng(0)
    files = {}
    for index in range(count):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        files[f"{'ants' if index % 2 else 'bees'}/{index}.png"] = file.getvalue()
    return zipped(files)


def send_patiently(address: Address, body: bytes, key: str) -> dict[str, Any]:
    """Send until there is a place; what is over the bound is told to come back."""
    with client_of(address) as client:
        for _ in range(100):
            answer = client.post(URL, content=body, headers={**ZIP, "idempotency-key": key})
            if answer.status_code != 429:
                assert answer.status_code in (200, 201), answer.text
                document: dict[str, Any] = answer.json()
                return document
            assert answer.headers["retry-after"]
            time.sleep(0.2)
    raise AssertionError("there was never a place")


def left_behind(home: Path) -> list[str]:
    return [path.name for path in (home / "datasets").glob(".staging-*")]


def test_photographs_from_upload_to_training(tmp_path: Path, real_data: Path) -> None:
    """Every planted fault is named with its file, mended without a second upload, and learned."""
    root = real_data / "hymenoptera"
    if not root.is_dir():
        pytest.skip("there are no ants and bees among the real data")
    files = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    bee = next(name for name in files if name.startswith("train/bees/"))
    ant = next(name for name in files if name.startswith("val/ants/"))
    files["train/bees/again.jpg"] = files[bee]
    files["train/bees/cut.jpg"] = files[bee][: len(files[bee]) // 2]
    files["train/ants/seen.jpg"] = files[ant]
    files["train/.DS_Store"] = b"litter"
    home = tmp_path / "home"
    with serving(home) as (address, _), client_of(address) as client:
        base = client.post(URL, content=zipped(files), headers=ZIP, params={"name": "a b"}).json()
        found = {fault["kind"]: fault["files"] for fault in base["report"]["faults"]}
        assert found["skipped"] == ["train/ants/imageNotFound.gif"]
        assert found["unreadable"][0].startswith("train/bees/cut.jpg: ")
        assert set(found["exact_duplicates"]) == {bee, "train/bees/again.jpg"}
        assert set(found["exact_leakage"]) == {ant, "train/ants/seen.jpg"}
        assert found["litter"] == ["train/.DS_Store"]
        changes = {"drop_faults": ["exact_duplicates", "exact_leakage", "skipped", "unreadable"]}
        mended = client.post(f"{URL}/{base['id']}/derive", json=changes).json()
        assert mended["num_samples"] == 397
        assert mended["report"]["usable"]
        assert not [one for one in mended["report"]["faults"] if one["severity"] != "note"]
    folder = home / "datasets" / mended["id"]
    options = ["--dataset", str(folder), "--network", "cnn", "--picture-size", "32"]
    subprocess.run(
        [sys.executable, "-m", "training", "train", *options, "--epochs", "2", "--name", "a-b"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTORCHLIB_HOME": str(home), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
        capture_output=True,
    )
    assert list(home.glob("models/a-b/1/manifest.json"))


def test_two_servers_and_one_key_make_one_dataset(tmp_path: Path) -> None:
    body = many_pictures(60)
    with serving(tmp_path) as (one, _), serving(tmp_path) as (other, _):
        with ThreadPoolExecutor(8) as clients:
            asked = [
                clients.submit(send_patiently, (one, other)[i % 2], body, "k") for i in range(8)
            ]
            documents = [future.result() for future in asked]
        assert len({document["id"] for document in documents}) == 1
        with client_of(one) as client:
            assert [entry["id"] for entry in client.get(URL).json()["data"]] == [documents[0]["id"]]
    assert left_behind(tmp_path) == []


def test_a_client_that_leaves_ends_the_check(tmp_path: Path) -> None:
    body = many_pictures(3000)
    with serving(tmp_path) as (address, _):
        for _ in range(3):  # more than there are places
            with socket.create_connection(address) as connection:
                head = (
                    f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\n"
                )
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                deadline = time.monotonic() + 30
                while not list((tmp_path / "datasets").glob(".staging-*/samples/*")):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            deadline = time.monotonic() + 10
            while left_behind(tmp_path):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        with client_of(address) as client:
            assert client.get(URL).json()["data"] == []
            assert client.post(URL, content=many_pictures(20), headers=ZIP).status_code == 201


def test_a_killed_server_leaves_nothing_half_visible(tmp_path: Path) -> None:
    body = many_pictures(3000)
    with serving(tmp_path) as (address, _), socket.create_connection(address) as connection:
        head = f"POST {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 30
        while not list((tmp_path / "datasets").glob(".staging-*/samples/*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (server,) = psutil.Process().children()
        server.kill()
    assert left_behind(tmp_path)
    with serving(tmp_path) as (address, _), client_of(address) as client:
        assert client.get(URL).json()["data"] == []
        assert client.post(URL, content=many_pictures(20), headers=ZIP).status_code == 201
    assert left_behind(tmp_path) == []
