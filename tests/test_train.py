"""Training whole, publishing with lineage, and the events of a run."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load
from models.store import ModelStore
from training.config import TrainConfig
from training.events import recorded
from training.measure import measure, whole
from training.progress import drive
from training.publish import publish
from training.train import NetworkUnfit, Trained, train


def config(**changes: Any) -> TrainConfig:
    plain = {"dataset": "digits", "network": "mlp", "epochs": 2, "learning_rate": 0.01}
    return TrainConfig.of(**{**plain, **changes})


@pytest.fixture(scope="module")
def digits() -> Trained:
    return drive(train(config(epochs=4, network_options={"hidden": [32]})))


def test_digits_are_learned_measured_and_described(digits: Trained) -> None:
    assert digits.report.accuracy > 0.9
    assert digits.report.num_samples == 179
    assert digits.spec.options == {"num_classes": 10, "inputs": 64, "hidden": [32]}
    assert digits.dataset.measured_on == "test"


def test_the_network_suits_the_dataset() -> None:
    table = [(torch.tensor([i / 10, -i / 10]), "odd" if i % 2 else "even") for i in range(30)]
    assert drive(train(config(network="auto"), pairs=table)).spec.name == "mlp"
    assert drive(train(config(network="auto", epochs=1))).spec.name == "cnn"
    with pytest.raises(NetworkUnfit, match="cnn takes pictures and pairs holds numbers"):
        drive(train(config(network="cnn"), pairs=table))


def test_what_is_published_answers_as_what_was_trained(digits: Trained, tmp_path: Path) -> None:
    version = publish(digits, ModelStore(tmp_path), "digits", run="r1")
    loaded = load(version.folder)
    sample = digits.dataset.parts["test"].samples.read(0)[0].unsqueeze(0)
    x = loaded.manifest.preprocessing.finish(sample)
    with torch.inference_mode():
        assert torch.allclose(loaded.network(x), digits.network(x), atol=1e-5)
    assert loaded.golden is not None
    assert loaded.golden.inputs.shape == (64, 1, 8, 8)


def test_a_version_says_where_it_comes_from(digits: Trained, tmp_path: Path) -> None:
    manifest = load(publish(digits, ModelStore(tmp_path), "digits", run="r1").folder).manifest
    lineage = manifest.lineage
    assert (lineage.dataset, lineage.method, lineage.run, lineage.seed) == (
        "digits",
        "train",
        "r1",
        0,
    )
    assert lineage.dataset_fingerprint == digits.dataset.fingerprint
    assert lineage.options["learning_rate"] == 0.01
    assert lineage.environment["torch"] == torch.__version__
    assert manifest.metrics["accuracy"] == digits.report.accuracy
    assert manifest.metrics["measured_on"] == "test"
    assert manifest.labels == digits.dataset.classes


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_version_is_measured_on_what_was_held_out_of_its_training(
    part: str, tmp_path: Path
) -> None:
    changes = {"test_fraction": 0.3, "validation_fraction": 0.2, "split_seed": 5, "epochs": 1}
    trained = drive(train(config(**changes)))
    version = load(publish(trained, ModelStore(tmp_path), "digits").folder)
    loop = measure(version.network, version.manifest, whole("digits"), torch.device("cpu"), part)
    measured = drive(loop)
    assert measured.where == f"the {part} part of digits, split as in its training"
    assert measured.report.num_samples == len(trained.dataset.parts[part])
    if part == "test":
        assert measured.report.accuracy == trained.report.accuracy


def test_a_dataset_that_has_grown_since_is_doubted(tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    rows = [f"{i % 7},{i % 2},{'odd' if i % 2 else 'even'}" for i in range(60)]
    table.write_text("\n".join(["a,b,label", *rows[:40]]))
    trained = drive(train(config(dataset=str(table), epochs=1)))
    version = load(publish(trained, ModelStore(tmp_path / "models"), "points").folder)
    table.write_text("\n".join(["a,b,label", *rows]))
    loop = measure(version.network, version.manifest, whole(str(table)), torch.device("cpu"))
    measured = drive(loop)
    assert measured.report.num_samples == 60
    assert "it may have seen some of these" in measured.notes[-1]


def test_a_run_is_published_once(digits: Trained, tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    versions = {str(publish(digits, store, "digits", run="r1")) for _ in range(2)}
    assert versions == {"digits:1"}


def test_a_run_leaves_events_for_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained = drive(recorded(train(config(report_every=4)), tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    validation = events.Scalars("validation/accuracy")
    assert [event.step for event in validation] == [epoch.step for epoch in trained.fitted.history]
    assert len(events.Scalars("train/loss")) >= 6
    assert {"learning_rate", "images_per_second", "train_loss"} <= set(events.Tags()["scalars"])


def test_closing_a_recorded_loop_closes_the_loop_in_it(tmp_path: Path) -> None:
    loop = recorded(train(config(report_every=1), run=tmp_path), tmp_path / "events")
    next(progress for progress in loop if progress.phase == "train")
    loop.close()
    assert (tmp_path / "snapshots").is_dir()


@pytest.mark.slow
def test_training_digits_imports_neither_compiler_nor_torchvision() -> None:
    """Each would take longer than the training."""
    import subprocess

    code = (
        "import sys\n"
        "from training.config import TrainConfig\n"
        "from training.progress import drive\n"
        "from training.train import train\n"
        "drive(train(TrainConfig.of(epochs=1)))\n"
        "heavy = ('torch._dynamo', 'torchvision', 'sklearn', 'tensorboard', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
