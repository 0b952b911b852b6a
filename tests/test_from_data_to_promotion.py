"""The whole way over HTTP: send pictures, measure two versions on them, promote the better one."""

import io
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from starlette.testclient import TestClient

from models.store import ModelStore
from training.config import TrainConfig
from training.progress import drive
from training.publish import publish
from training.recipes import with_recipe
from training.train import train

ZIP = {"content-type": "application/zip"}


def pictures_of(pixels: np.ndarray, targets: np.ndarray) -> bytes:
    """A zip of class folders."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for index, (picture, target) in enumerate(zip(pixels, targets, strict=True)):
            png = io.BytesIO()
            Image.fromarray((picture * 15.9375).astype(np.uint8)).save(png, "PNG")
            archive.writestr(f"{target}/{index}.png", png.getvalue())
    return file.getvalue()


@pytest.fixture
def dataset(client: TestClient) -> dict[str, Any]:
    """Three hundred real handwritten digits, sent as pictures."""
    digits = load_digits()
    body = pictures_of(digits.images[:300], digits.target[:300])
    answer = client.post("/v1/datasets", content=body, headers=ZIP, params={"name": "written"})
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    return document


@pytest.fixture
def better(store: ModelStore) -> int:
    """A second version of `digits`, which has learned something."""
    config = TrainConfig.of(**with_recipe({"dataset": "digits"}) | {"epochs": 4, "threads": 1})
    return publish(drive(train(config)), store, "digits").number


def test_a_version_is_measured_on_pictures_that_were_sent(
    client: TestClient, dataset: dict[str, Any], better: int
) -> None:
    wanted = {"model": f"digits:{better}", "compare_to": "digits:1", "dataset": dataset["id"]}
    answer = client.post("/v1/evaluations", json=wanted)
    assert answer.status_code == 200, answer.text
    result = answer.json()["result"]
    assert result["report"]["num_samples"] == 300
    assert result["report"]["accuracy"] > 0.9
    assert result["comparison"]["num_gained"] > result["comparison"]["num_lost"]
    page = client.get(answer.json()["report_url"])
    assert page.status_code == 200
    assert "<script" not in page.text


def test_the_better_version_is_promoted_and_rolled_back(
    client: TestClient, dataset: dict[str, Any], better: int
) -> None:
    url = "/v1/models/digits/aliases/production"
    rule = {"threshold": 0.9, "min_absolute_change": 0.05}
    wanted = {"version": better, "dataset": dataset["id"], "rule": rule}
    answer = client.post(f"{url}/promote", json=wanted)
    assert answer.status_code == 200, answer.text
    assert client.get("/v1/models/digits").json()["aliases"]["production"] == better
    back = client.post(f"{url}/rollback", json={})
    assert back.status_code == 200, back.text
    assert client.get("/v1/models/digits").json()["aliases"]["production"] == 1


def test_a_refused_dataset_is_no_evidence(client: TestClient) -> None:
    digits = load_digits()
    answer = client.post(
        "/v1/datasets", content=pictures_of(digits.images[:3], np.zeros(3, int)), headers=ZIP
    )
    assert answer.status_code == 422
    wanted = {"model": "digits", "dataset": answer.json()["dataset"]["id"]}
    refused = client.post("/v1/evaluations", json=wanted)
    assert 400 <= refused.status_code < 500, refused.text
    assert "two classes or more" in refused.text
