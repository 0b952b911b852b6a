"""Real data over HTTP: MNIST's test digits and photographs give the figures of offline."""

from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from benchmarks.evaluate import publish_cnn, publish_mobilenet
from models import checkpoint
from models.store import ModelStore
from training.config import DataConfig
from training.measure import measure, whole
from training.progress import drive

pytestmark = pytest.mark.slow
CASES = [("mnist", "mnist", "test"), ("insects", "hymenoptera", "validation")]


@pytest.mark.parametrize(("model", "dataset", "part"), CASES)
def test_over_http_the_figures_are_those_of_offline(
    real_data: Path, tmp_path: Path, model: str, dataset: str, part: str
) -> None:
    store = ModelStore(tmp_path / "models")
    version = (
        publish_cnn(store) if model == "mnist" else publish_mobilenet(store, real_data / "weights")
    )
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "hymenoptera").symlink_to(real_data / "hymenoptera")
    settings = Settings(home=tmp_path, device="cpu", data_root=real_data)
    with TestClient(create_app(settings), "http://127.0.0.1:8000") as client:
        body = {"model": str(version), "dataset": dataset, "part": part, "wait_s": 300}
        served = client.post("/v1/evaluations", json=body).json()
        page = client.get(served["report_url"])
    loaded = checkpoint.load(version.folder)
    config = (
        DataConfig.of(dataset="mnist", data_root=str(real_data))
        if model == "mnist"
        else whole(str(real_data / "hymenoptera"))
    )
    loop = measure(loaded.network, loaded.manifest, config, torch.device("cpu"), part)
    offline = drive(loop).report
    report = served["result"]["report"]
    assert report["confusion"] == [list(row) for row in offline.confusion]
    for name, figure in offline.figures().items():
        if not name.startswith("top_"):
            assert report[name] == pytest.approx(figure, abs=1e-6), name
    assert page.text.count("data:image/") >= 20
