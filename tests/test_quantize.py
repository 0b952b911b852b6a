"""`quantize`: a version becomes one with eight bits, with what it costs; it is served as such."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from starlette.testclient import TestClient
from test_commands import run

from app.engine.execution import choose_form, chosen_before
from app.engine.loading import load_version
from app.errors import LoadFailed
from models import checkpoint
from models.int8_network import layers_of
from models.seen import read_seen
from models.store import ModelStore

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with `digits`: version 1 trained, version 2 the same with eight bits."""
    home = tmp_path_factory.mktemp("home")
    torch.set_num_threads(1)
    done = run("train", "--dataset", "digits", "--name", "digits", home=home)
    assert done.exit_code == 0, done.output
    done = run("quantize", "--model", "digits", "--dataset", "digits", "--json", home=home)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.output.splitlines()[-1])
    assert facts["version"] == 2
    assert facts["parent"] == "digits:1"
    return home


def test_what_it_costs_is_published_with_it(trained: Path) -> None:
    store = ModelStore(trained / "models")
    parent, manifest = store.version("digits", 1).manifest(), store.version("digits", 2).manifest()
    assert manifest.network.name == f"int8/{parent.network.name}"
    cost = manifest.metrics["quantization"]
    assert cost["parent_accuracy"] == pytest.approx(parent.metrics["accuracy"])
    assert cost["agreement"] >= 0.98
    assert cost["agreement_interval"][0] < cost["agreement"]
    assert manifest.lineage.parent == "digits:1"
    assert manifest.lineage.dataset_fingerprint == parent.lineage.dataset_fingerprint
    assert manifest.lineage.options == {"num_calibration_samples": 256}
    assert store.resolve("digits").number == 1, "production moves by a person or a gate only"


def test_what_was_looked_at_is_no_evidence(trained: Path) -> None:
    store = ModelStore(trained / "models")
    parent, small = store.version("digits", 1), store.version("digits", 2)
    seen = read_seen(small.folder, small.manifest().files)
    before = read_seen(parent.folder, parent.manifest().files)
    assert torch.equal(seen.train, before.train)
    assert len(seen.validation) > len(before.validation)


def test_it_is_served_as_what_it_is(trained: Path) -> None:
    version = ModelStore(trained / "models").version("digits", 2)
    for wanted in ("auto", "fp32", "int8"):
        loaded = load_version(version, CPU, wanted)
        assert loaded.execution.form.precision == "int8"
        assert loaded.execution.trials[0].verdict == "chosen: what was published"
    again = chosen_before(loaded.network, loaded.reference, loaded.execution.choice)
    assert again is not None
    assert again.form.precision == "int8"


def test_int8_is_not_made_at_load(trained: Path) -> None:
    loaded = load_version(ModelStore(trained / "models").version("digits", 1), CPU, "int8")
    assert loaded.execution.form.precision == "fp32"
    assert "pytorchlib quantize" in loaded.execution.trials[0].verdict
    assert choose_form(loaded.network, loaded.reference, "auto").form.precision != "int8"


def digit_pictures() -> list[bytes]:
    """Twenty pictures of handwritten digits, as a browser would send them."""
    files = [io.BytesIO() for _ in range(20)]
    for file, pixels in zip(files, load_digits().images, strict=False):
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(file, "PNG")
    return [file.getvalue() for file in files]


def labels_of(client: TestClient, name: str) -> list[str]:
    sent = [("file", picture) for picture in digit_pictures()]
    answer = client.post(f"/v1/models/{name}/predict", files=sent)
    assert answer.status_code == 200, answer.text
    return [prediction["label"] for prediction in answer.json()["predictions"]]


def test_over_http(trained: Path) -> None:
    from app.main import create_app
    from app.settings import Settings

    made = ["--model", "digits:1", "--dataset", "digits", "--name", "small", "--samples", 64]
    assert "agreement" in run("quantize", *made, home=trained).output
    app = create_app(Settings(home=trained, device="cpu", threads=1, precision="int8"))
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        of_digits, of_small = (labels_of(client, name) for name in ("digits", "small"))
        same = sum(one == other for one, other in zip(of_digits, of_small, strict=True))
        assert same >= 19, "two of a hundred may differ, and do on one processor or another"
        production = client.get("/v1/models/small").json()["production"]
        assert production["execution"]["form"] == "int8, channels last"
        assert production["metrics"]["quantization"]["agreement"] >= 0.98
        refused = client.post("/v1/models/small/explain", files={"file": digit_pictures()[0]})
        assert refused.status_code == 409
        assert "ask digits:1 to explain" in refused.json()["error"]["message"]
        archive = client.get("/v1/models/small/versions/1/download").content
        sent = client.post(
            "/v1/models/sent/versions",
            content=archive,
            headers={"Content-Type": "application/zip"},
        )
        assert sent.status_code == 200, sent.text
        assert sent.json()["digest"] == production["digest"]


@pytest.mark.parametrize("bounds", [(float("nan"), 1.0), (float("-inf"), 1.0)])
def test_bounds_that_mean_nothing_are_refused(
    trained: Path, tmp_path: Path, bounds: tuple[float, float]
) -> None:
    version = ModelStore(trained / "models").version("digits", 2)
    loaded = checkpoint.load(version.folder)
    first = next(layer for _, layer in layers_of(loaded.network))
    first.get_buffer("input_bounds").copy_(torch.tensor(bounds))
    checkpoint.save(tmp_path / "a", loaded.network, loaded.manifest)
    with pytest.raises(LoadFailed, match="fails on an input: cannot convert"):
        load_version(replace(version, folder=tmp_path / "a"), CPU)


def test_twice_is_refused(trained: Path) -> None:
    done = run("quantize", "--model", "digits:2", "--dataset", "digits", home=trained)
    assert done.exit_code == 1
    assert "digits:2 computes with eight bits already" in done.output


def test_it_is_no_base_to_tune(trained: Path) -> None:
    from training.backbone import BaseUnknown, find_backbone

    with pytest.raises(BaseUnknown, match="tune digits:1"):
        find_backbone("digits:2", trained)


def test_one_that_answers_differently_is_not_published(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import int8

    monkeypatch.setattr(int8, "LARGEST_WEIGHT", 1)
    done = run("quantize", "--model", "digits:1", "--dataset", "digits", home=trained)
    assert done.exit_code == 1
    assert "98% are needed, so nothing was published" in done.output
    assert ModelStore(trained / "models").versions("digits") == [1, 2]
