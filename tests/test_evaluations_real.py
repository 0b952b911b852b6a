"""Real data over HTTP: digits, MNIST's and photographs give the figures of offline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from starlette.testclient import TestClient
from test_train import config

from app.main import create_app
from app.settings import Settings
from benchmarks.evaluate import publish_cnn, publish_mobilenet
from models import checkpoint
from models.store import ModelStore, Version
from training.measure import as_trained, measure, whole
from training.progress import drive
from training.publish import publish
from training.train import train

pytestmark = pytest.mark.slow
CASES = [
    ("digits", "digits", "test"),
    ("mnist", "mnist", "test"),
    ("insects", "hymenoptera", "validation"),
]


def published(store: ModelStore, model: str, real_data: Path) -> Version:
    """The model of a case; that of `digits` is trained."""
    if model == "digits":
        return publish(drive(train(config())), store, model)
    if model == "mnist":
        return publish_cnn(store)
    return publish_mobilenet(store, real_data / "weights")


@pytest.mark.parametrize(("model", "dataset", "part"), CASES)
def test_over_http_the_figures_are_those_of_offline(
    real_data: Path, tmp_path: Path, model: str, dataset: str, part: str
) -> None:
    store = ModelStore(tmp_path / "models")
    version = published(store, model, real_data)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "hymenoptera").symlink_to(real_data / "hymenoptera")
    settings = Settings(home=tmp_path, device="cpu", data_root=real_data, precision="fp32")
    with TestClient(create_app(settings), "http://127.0.0.1:8000") as client:
        body = {"model": str(version), "dataset": dataset, "part": part, "wait_s": 300}
        served = client.post("/v1/evaluations", json=body).json()
        page = client.get(served["report_url"])
    loaded = checkpoint.load(version.folder)
    data = (
        whole(str(real_data / "hymenoptera"))
        if dataset == "hymenoptera"
        else as_trained(loaded.manifest, dataset, data_root=str(real_data))
    )
    loop = measure(loaded.network, loaded.manifest, data, torch.device("cpu"), part)
    offline = drive(loop).report
    report = served["result"]["report"]
    assert report["confusion"] == [list(row) for row in offline.confusion]
    for name, figure in offline.figures().items():
        if not name.startswith("top_"):
            assert report[name] == pytest.approx(figure, abs=1e-6), name
    assert page.text.count("data:image/") >= (3 if model == "digits" else 20)


def test_memory_does_not_grow_with_the_dataset(real_data: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evaluate", "--only", "memory"],
        cwd=ROOT,
        env={**os.environ, "PYTORCHLIB_TEST_DATA": str(real_data)},
        capture_output=True,
        text=True,
        timeout=400,
        check=True,
    )
    few, many = map(int, re.findall(r"(\d+) MiB", done.stdout))
    assert 100 < few < many + 1 < 1.05 * few
