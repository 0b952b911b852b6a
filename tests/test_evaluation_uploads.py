"""Evaluations of samples that come with the request: checked like datasets, and gone afterwards."""

import io
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from starlette.testclient import TestClient
from test_archive import DAMAGED, HOSTILE, NO_ARCHIVE
from test_dataset_api import picture
from test_evaluation import trained_store
from test_evaluations import client

from app.auth.store import KeyStore
from app.evaluation.uploads import ARRIVING_S, Uploads
from app.main import create_app
from app.settings import Settings
from models.store import ModelStore

__all__ = ["client", "trained_store"]
URL = "/v1/evaluations"


@pytest.fixture(scope="module")
def pictures() -> bytes:
    """Three hundred real digits as a zip of class folders."""
    digits = load_digits()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for index in range(300):
            pixels = (digits.images[index] * 255 / 16).round().astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            archive.writestr(f"{digits.target[index]}/{index}.png", png.getvalue())
    return file.getvalue()


@pytest.fixture(autouse=True)
def nothing_left(trained_store: ModelStore) -> Iterator[None]:
    """Whatever a test does, no upload and no half of one stays."""
    yield
    home = trained_store.folder.parent
    until = time.monotonic() + 5
    while list((home / "evaluations" / "uploads").glob("*")):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert not list((home / "datasets").glob(".staging-*"))


def sent(client: TestClient, body: bytes, headers: dict[str, str] | None = None, **fields: Any):
    files = {"file": ("digits.zip", body, "application/zip")}
    return client.post(URL, files=files, data={"model": "digits:2", **fields}, headers=headers)


def test_an_upload_is_answered_at_once_and_not_kept(client: TestClient, pictures: bytes) -> None:
    answer = sent(client, pictures, compare_to="digits:1", top_k="1,3", wait_s="60")
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["status"] == "succeeded"
    assert found["result"]["dataset"]["name"] == "digits.zip"
    report = found["result"]["report"]
    assert (report["num_samples"], report["top_k"].keys()) == (300, {"1", "3"})
    assert report["accuracy"] > 0.9
    assert found["result"]["comparison"]["num_gained"] > 50
    assert found["result"]["worst_mistakes"][0]["name"].endswith(".png")
    assert client.get("/v1/datasets").json()["data"] == []
    assert "digits:2 on digits.zip" in client.get(found["report_url"]).text


@pytest.mark.slow
def test_what_is_to_be_kept_is_a_dataset_and_gives_the_same_figures(
    client: TestClient, pictures: bytes
) -> None:
    first = sent(client, pictures, keep="true", name="mine", wait_s="60").json()
    (kept,) = client.get("/v1/datasets").json()["data"]
    assert (kept["id"], kept["name"]) == (first["dataset"], "mine")
    body = {"model": "digits:2", "dataset": kept["id"], "wait_s": 60}
    second = client.post(URL, json=body).json()
    one, other = (answer["result"]["report"] for answer in (first, second))
    for name in ("num_samples", "accuracy", "confusion", "top_k"):
        assert other[name] == one[name], name
    # Batches differ, and with them the last bits of the logits.
    loss = "negative_log_likelihood"
    assert other[loss] == pytest.approx(one[loss], rel=1e-6)
    assert client.delete(f"/v1/datasets/{kept['id']}").status_code == 200


@pytest.mark.slow
def test_a_large_one_is_a_job_that_can_be_cancelled(client: TestClient, pictures: bytes) -> None:
    answers = [sent(client, pictures, wait_s="0") for _ in range(3)]
    assert {one.status_code for one in answers} == {202}
    last = client.post(f"{answers[-1].headers['location']}/cancel").json()
    assert last["status"] == "cancelled"
    until = time.monotonic() + 60
    while (first := client.get(answers[0].headers["location"]).json())["status"] != "succeeded":
        assert time.monotonic() < until
        time.sleep(0.05)
    assert first["progress"]["total"] == 300


@pytest.mark.slow
def test_the_same_key_and_samples_are_the_same_evaluation(
    client: TestClient, pictures: bytes
) -> None:
    key = {"idempotency-key": "sent twice"}
    first, second = (sent(client, pictures, key, wait_s="60").json() for _ in range(2))
    assert first["id"] == second["id"]
    other = sent(client, pictures, key, top_k="1")
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


@pytest.mark.parametrize("corpus", [HOSTILE, NO_ARCHIVE, DAMAGED])
@pytest.mark.slow
def test_what_datasets_refuse_is_refused_here_in_the_same_words(
    client: TestClient, corpus: dict[str, Any]
) -> None:
    for name, build in corpus.items():
        body = (build[0] if isinstance(build, tuple) else build)()
        wanted = client.post("/v1/datasets", files={"file": ("digits.zip", body)})
        found = sent(client, body)
        assert 400 <= found.status_code == wanted.status_code < 500, (name, found.text)
        assert found.json()["error"]["code"] == wanted.json()["error"]["code"], name
        assert found.json()["error"]["message"] == wanted.json()["error"]["message"], name


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "digitz"}, 404),
        ({"compare_to": "digits:99"}, 404),
        ({"top_k": "1,x"}, 422),
        ({"colour": "red"}, 422),
        ({"dataset": "digits"}, 422),
        ({"wait_s": "-1"}, 422),
        ({"part": "all"}, 422),
    ],
)
def test_fields_that_make_no_sense(
    client: TestClient, pictures: bytes, fields: dict[str, str], status: int
) -> None:
    answer = sent(client, pictures, **fields)
    assert answer.status_code == status, answer.text


def test_bodies_that_make_no_sense(client: TestClient, pictures: bytes) -> None:
    bare = client.post(URL, content=pictures, headers={"content-type": "application/zip"})
    assert (bare.status_code, "beside `model`" in bare.text) == (415, True)
    no_file = client.post(URL, data={"model": "digits"}, files={"other": b"x"})
    assert no_file.status_code == 422
    assert client.post(URL, content=b"{").status_code == 422
    assert client.post(URL, json={"model": "x" * 100_000}).status_code == 413
    words = sent(client, b"a,b\n1,2\n")
    assert words.status_code == 422
    one_class = io.BytesIO()
    with zipfile.ZipFile(one_class, "w") as archive:
        archive.writestr("9/a.png", picture(1))
        archive.writestr("8/b.png", b"no picture")
    assert sent(client, one_class.getvalue()).json()["error"]["param"] == "file"


def test_keeping_takes_another_scope_and_evaluating_does_not(
    store: ModelStore, pictures: bytes
) -> None:
    home = store.folder.parent
    token = KeyStore(home).create("examiner", ("evaluate",))[1]
    settings = Settings(home=home, device="cpu", threads=1)
    headers = {"authorization": f"Bearer {token}"}
    with TestClient(create_app(settings), "http://127.0.0.1:8000", headers=headers) as client:
        kept = sent(client, pictures, model="digits", keep="true")
        assert (kept.status_code, "data:write" in kept.text) == (403, True)
        assert sent(client, pictures, model="digits", wait_s="60").status_code == 200


def test_what_a_killed_server_left_is_swept_unless_it_is_needed(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads")
    needed, left, arriving = (uploads.new() / "dset-1" for _ in range(3))
    for dataset in (needed, left, arriving):
        dataset.mkdir(parents=True)
    for dataset in (needed, left):
        os.utime(dataset.parent, (0, time.time() - 2 * ARRIVING_S))
    uploads.sweep([str(needed)])
    assert [one.exists() for one in (needed, left, arriving)] == [True, False, True]
    uploads.remove(tmp_path / "uploads")
    uploads.remove(needed)
    assert not needed.exists()
    assert arriving.exists()
