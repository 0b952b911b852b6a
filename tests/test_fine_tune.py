"""Fine-tuning whole, on a network of a few hundred weights."""

import json
from collections.abc import Generator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.checkpoint import load
from models.seen import read_seen, short_digests
from models.store import ModelStore
from tests.test_fine_tuning_client import shaded
from tests.test_transfer import stripes
from training.answers import Answers
from training.backbone import Backbone, BaseUnknown, find_backbone
from training.begun import RunMismatch
from training.config import ConfigError, TrainConfig
from training.fine_tune import fine_tune, work
from training.methods import METHODS, FineTuneRequest, schemas
from training.multiply_adds import multiply_adds
from training.outcome import FineTuned
from training.progress import Progress, drive
from training.publish import publish
from training.train import train

PLAIN: dict[str, dict[str, Any]] = {
    "linear_probe": {"epochs": 6, "batch_size": 8, "learning_rate": 0.01},
    "fine_tune": {
        "head_epochs": 3,
        "head_batch_size": 8,
        "epochs": 2,
        "batch_size": 8,
        "mixup": 0.2,
        "cutmix": 0.5,
        "ema_decay": 0.9,
        "class_weights": "balanced",
        "folds": 2,
    },
    "from_scratch": {"epochs": 2, "batch_size": 8, "folds": 2, "mixup": 0.3},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder whose store holds `stripes`, for upright bars."""
    config = TrainConfig.of(
        network="cnn", network_options={"width": 4}, epochs=3, batch_size=8, learning_rate=0.01
    )
    home = tmp_path_factory.mktemp("home")
    trained = drive(train(config, pairs=stripes(40, upright=True)))
    publish(trained, ModelStore(home / "models"), "stripes")
    return home


def request_for(method: str, **changes: Any) -> FineTuneRequest:
    compute = {"report_every": 1}
    given = {"base": "stripes", "dataset": "pairs", "method": method, "compute": compute}
    return FineTuneRequest.of(**{**given, "hyperparameters": PLAIN[method], **changes})


def loop(home: Path, folder: Path, method: str) -> Generator[Progress, None, FineTuned]:
    return fine_tune(request_for(method), home, folder, pairs=stripes(40, upright=False))


def weights(done: FineTuned) -> dict[str, Tensor]:
    return done.trained.network.state_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_ends_with_the_same_bits_wherever_it_is_stopped(
    method: str, home: Path, tmp_path: Path
) -> None:
    whole = drive(loop(home, tmp_path / "whole", method))
    ends = sum(1 for _ in loop(home, tmp_path / "counted", method))
    for stopped_at in range(1, ends, max(1, ends // 4)):
        folder = tmp_path / str(stopped_at)
        begun = loop(home, folder, method)
        for _ in range(stopped_at):
            next(begun)
        begun.close()
        again = drive(loop(home, folder, method))
        assert all(torch.equal(weights(again)[k], v) for k, v in weights(whole).items()), stopped_at
        assert again.answers is not None
        assert whole.answers is not None
        assert torch.equal(again.answers.logits, whole.answers.logits)


def test_multiplications_are_counted_by_the_places_of_each_weight() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 10))
    before = torch.get_rng_state()
    by_hand = 36 * 8 * 3 * 9 + 8 * 36 * 10
    assert multiply_adds(network, torch.zeros(1, 3, 6, 6)) == by_hand
    assert multiply_adds(network, torch.zeros(2, 3, 6, 6)) == 2 * by_hand
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("short_step", "said", "used"), [(10**8, 0, "1"), (0, 0, "2"), (10**8, 2, "2")]
)
@pytest.mark.parametrize("method", METHODS)
def test_short_steps_take_one_thread_unless_somebody_says_how_many(
    method: str,
    short_step: int,
    said: int,
    used: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.learner.SHORT_STEP", short_step)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        given = {**PLAIN[method], "validation": "none"}
        request = request_for(method, hyperparameters=given, compute={"threads": said})
        done = drive(fine_tune(request, home, tmp_path, pairs=stripes(40, upright=False)))
    finally:
        torch.set_num_threads(before)
    assert done.trained.fitted.environment["threads"] == used


def test_out_of_fold_answers_are_kept_for_comparisons(home: Path, tmp_path: Path) -> None:
    done = drive(loop(home, tmp_path, "linear_probe"))
    kept = Answers.load(tmp_path)
    assert done.trained.measured_on == "out-of-fold"
    assert kept.logits.shape == (40, 2)
    assert kept.digests.shape == (40, 32)
    assert kept.report() == done.trained.report
    assert "5 stratified folds" in done.validation
    assert done.choices["validation"].value == "cross_validation"
    assert "40 samples, below 2000" in done.choices["validation"].reason


def digits(**changes: Any) -> dict[str, Any]:
    given = {"base": "cnn", "dataset": "digits", "method": "from_scratch", "name": "figures"}
    settings = {"epochs": 1, "validation": "split", **changes.pop("hyperparameters", {})}
    return {**given, "hyperparameters": settings, **changes}


def test_work_publishes_and_tells_everything_as_json(tmp_path: Path) -> None:
    first = drive(work(digits(), home=tmp_path, folder=tmp_path / "run", run="job-1"))
    again = drive(work(digits(), home=tmp_path, folder=tmp_path / "run", run="job-1"))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == again
    assert first["version"] == again["version"] == "figures:1"
    assert first["measured_on"] == "test"
    assert first["resolved"]["augment"]["value"] == "digits"
    lineage = load(ModelStore(tmp_path / "models").resolve("figures").folder).manifest.lineage
    assert (lineage.method, lineage.run, lineage.dataset) == ("from_scratch", "job-1", "digits")
    assert lineage.options["hyperparameters"]["augment"] == "digits"


def test_a_version_of_ours_is_a_base_and_its_classes_keep_its_head(tmp_path: Path) -> None:
    drive(work(digits(), home=tmp_path, folder=tmp_path / "a", run="a"))
    probe = {"base": "figures:1", "dataset": "digits", "name": "figures", "hyperparameters": {}}
    done = drive(work(probe, home=tmp_path, folder=tmp_path / "b", run="b"))
    assert (done["version"], done["parent"]) == ("figures:2", "figures:1")
    assert done["resolved"]["head"]["value"] == "keep"
    assert "the last layer begins as the base has it" in done["notes"]


@pytest.fixture(scope="module")
def shades(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light pictures, 28 to learn from and 8 in a validation part."""
    folder = tmp_path_factory.mktemp("shades")
    for part, first, count in (("train", 0, 14), ("val", 100, 4)):
        for name, least in (("dark", 0), ("light", 170)):
            (folder / part / name).mkdir(parents=True)
            for seed in range(first, first + count):
                path = folder / part / name / f"{seed}.png"
                path.write_bytes(shaded(seed + least, least))
    return folder


def test_a_validation_part_that_is_given_chooses_nothing_and_stays_evidence(
    shades: Path, tmp_path: Path
) -> None:
    fresh: dict[str, Any] = {"base": "cnn", "dataset": str(shades), "method": "from_scratch"}
    settings = {"epochs": 3, "batch_size": 8}
    run = {"home": tmp_path, "run": "a"}
    first = drive(
        work({**fresh, "hyperparameters": settings, "name": "s"}, folder=tmp_path / "a", **run)
    )
    assert (first["measured_on"], first["resolved"]["validation"]["value"]) == (
        *("validation", "split"),
    )
    assert "were chosen by 2 samples that were held out" in first["validation"]
    probe = {"base": "s:1", "dataset": str(shades), "name": "s"}
    second = drive(work(probe, folder=tmp_path / "b", home=tmp_path, run="b"))
    assert second["measured_on"] == "validation"
    assert "was chosen by 5 folds of the training part" in second["validation"]
    assert len(second["history"]) == second["best"]["epoch"] <= 100
    for version in ("s:1", "s:2"):
        found = ModelStore(tmp_path / "models").resolve(version)
        seen = read_seen(found.folder, found.manifest().files)
        assert (len(seen.train), len(seen.validation)) in ((26, 2), (28, 2))
        digests = [sha256(path.read_bytes()).digest() for path in shades.glob("val/*/*.png")]
        assert not seen.was_trained_on(short_digests(digests)).any()
        assert not seen.was_selected_on(short_digests(digests)).any()


def test_a_validation_part_chooses_where_that_is_said(shades: Path, tmp_path: Path) -> None:
    settings = {"epochs": 2, "batch_size": 8, "validation": "given"}
    options = {"base": "cnn", "dataset": str(shades), "method": "from_scratch"}
    asked = {**options, "hyperparameters": settings, "name": "s"}
    done = drive(work(asked, folder=tmp_path / "a", home=tmp_path, run="a"))
    assert "which also chose the weights, so this flatters" in done["validation"]


def test_a_base_that_saw_the_samples_is_told(shades: Path, tmp_path: Path) -> None:
    options = {"base": "cnn", "dataset": str(shades / "train"), "method": "from_scratch"}
    settings = {"epochs": 1, "batch_size": 8, "folds": 2}
    asked = {**options, "hyperparameters": settings, "name": "s"}
    first = drive(work(asked, folder=tmp_path / "a", home=tmp_path, run="a"))
    assert first["measured_on"] == "out-of-fold"
    assert "flatters" not in first["validation"]
    again = {"base": "s:1", "dataset": str(shades / "train"), "name": "s"}
    second = drive(work(again, folder=tmp_path / "b", home=tmp_path, run="b"))
    assert "The base had seen all of these samples before" in second["validation"]
    assert Answers.load(tmp_path / "b").num_evidence == 0


def test_a_run_that_is_stopped_ends_soon_with_what_it_has(home: Path, tmp_path: Path) -> None:
    asked: list[bool] = []
    request = request_for("from_scratch", hyperparameters={"epochs": 1000, "validation": "none"})
    run = fine_tune(
        request, home, tmp_path, stop=lambda: bool(asked), pairs=stripes(40, upright=False)
    )
    next(progress for progress in run if progress.phase == "train")
    asked.append(True)
    assert len(drive(run).trained.fitted.history) == 1


def test_another_runs_folder_is_refused(home: Path, tmp_path: Path) -> None:
    next(loop(home, tmp_path, "linear_probe"))
    with pytest.raises(RunMismatch, match="other settings"):
        drive(loop(home, tmp_path, "fine_tune"))


@pytest.mark.parametrize("base", ["nothing", "torchvision/resnet18", "cnn"])
def test_what_is_no_base_is_refused_with_what_to_do(base: str, home: Path) -> None:
    with pytest.raises(BaseUnknown, match=r"import them|a base is|from_scratch"):
        find_backbone(base, home)


def test_options_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="epochs: it should be .* or 'auto'") as caught:
        request_for("linear_probe", hyperparameters={"epochs": 0, "colour": 1})
    assert "colour is not a setting here" in str(caught.value)
    for schema in schemas().values():
        assert all("description" in field for field in schema["properties"].values())


def test_methods_import_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, training.methods; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_a_backbone_by_name_has_no_weights() -> None:
    assert Backbone.of_name("mlp").state == {}
