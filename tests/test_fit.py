"""The training loop, on networks of a few hundred weights."""

import hashlib
from collections.abc import Callable, Generator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from models import networks
from models.device import DeviceUnavailable
from training.config import TrainConfig
from training.datasets import Dataset, open_dataset
from training.fit import FitResult, LossNotFinite, fit
from training.progress import Progress, drive
from training.snapshot import SnapshotMismatch

SMALL = {"batch_size": 8, "epochs": 3, "learning_rate": 0.01, "test_fraction": 0.0}


def pairs(num: int = 40, side: int = 8) -> list[tuple[torch.Tensor, str]]:
    """Noise that is brighter in one half: a class can be told from a few of them."""
    generator = torch.Generator().manual_seed(num)
    found = []
    for index in range(num):
        pixels = torch.randint(0, 120, (1, side, side), dtype=torch.uint8, generator=generator)
        half = slice(0, side // 2) if index % 2 else slice(side // 2, side)
        pixels[:, half] += 100
        found.append((pixels, "top" if index % 2 else "bottom"))
    return found


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.of(**{**SMALL, **changes})


def opened(settings: TrainConfig, num: int = 40) -> Dataset:
    return drive(open_dataset(settings, pairs=pairs(num)))


def fresh(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    options = {"inputs": 64, "hidden": [16], "num_classes": 2, "dropout": dropout}
    return networks.build("mlp", options)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    options = {"channels": 1, "size": 8, "num_classes": 2, "width": 4}
    return networks.build("cnn", options)


def digest(network: nn.Module) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def stop_at(loop: Generator[Progress, None, FitResult], step: int) -> None:
    for progress in loop:
        if progress.phase == "train" and progress.step >= step:
            loop.close()
            return
    raise AssertionError(f"the run ended before step {step}")


def test_a_tiny_network_learns_thirty_two_pictures() -> None:
    settings = config(epochs=15, validation_fraction=0)
    result = drive(fit(fresh(), opened(settings, 32), settings))
    assert result.history[-1].loss < 0.05 < result.history[0].loss
    assert result.best.step == 15 * 4
    assert not result.network.training


RUNS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "sgd": (fresh, {"optimizer": "sgd", "momentum": 0.9, "nesterov": True}),
    "everything": (
        lambda: fresh(dropout=0.3),
        {
            "ema_decay": 0.9,
            "augment": "digits",
            "schedule": "one-cycle",
            "label_smoothing": 0.1,
            "gradient_clip": 1.0,
            "weight_decay": 0.05,
        },
    ),
    "cnn": (small_cnn, {"augment": "shift", "schedule": "cosine", "warmup": 0.2}),
}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("step", [1, 7, 9, 14])
def test_stopping_and_resuming_gives_the_bits_of_never_stopping(
    kind: str, step: int, tmp_path: Path
) -> None:
    build, changes = RUNS[kind]
    settings = config(report_every=1, **changes)
    dataset = opened(settings)
    whole = drive(fit(build(), dataset, settings))
    stop_at(fit(build(), dataset, settings, snapshots=tmp_path), step)
    resumed = drive(fit(build(), dataset, settings, snapshots=tmp_path))
    assert digest(resumed.network) == digest(whole.network)
    assert resumed.history == whole.history
    assert resumed.notes == ()


def test_stopping_in_a_validation_validates_again(tmp_path: Path) -> None:
    settings = config()
    dataset = opened(settings)
    loop = fit(fresh(), dataset, settings, snapshots=tmp_path)
    next(progress for progress in loop if progress.phase == "validate")
    loop.close()
    resumed = drive(fit(fresh(), dataset, settings, snapshots=tmp_path))
    assert resumed.history == drive(fit(fresh(), dataset, settings)).history


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    settings = config()
    dataset = opened(settings)
    first = drive(fit(fresh(), dataset, settings, snapshots=tmp_path))
    again = fit(fresh(), dataset, settings, snapshots=tmp_path)
    assert not list(islice(again, 1))
    second = drive(fit(fresh(), dataset, settings, snapshots=tmp_path))
    assert digest(second.network) == digest(first.network)


def test_closing_the_loop_leaves_a_snapshot(tmp_path: Path) -> None:
    settings = config(report_every=1)
    stop_at(fit(fresh(), opened(settings), settings, snapshots=tmp_path), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000003"]


def test_snapshots_are_written_while_a_run_goes_on(tmp_path: Path) -> None:
    settings = config(report_every=1, snapshot_seconds=0)
    loop = fit(fresh(), opened(settings), settings, snapshots=tmp_path)
    list(islice(loop, 6))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [({"learning_rate": 0.02}, "--lr was 0.01 and is 0.02"), ({"seed": 5}, "--seed was 0")],
)
def test_another_runs_snapshot_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    settings = config()
    drive(fit(fresh(), opened(settings), settings, snapshots=tmp_path))
    other = config(**change)
    with pytest.raises(SnapshotMismatch, match=words):
        next(fit(fresh(), opened(other), other, snapshots=tmp_path))


def test_other_data_or_another_network_is_refused(tmp_path: Path) -> None:
    settings = config()
    drive(fit(fresh(), opened(settings), settings, snapshots=tmp_path))
    with pytest.raises(SnapshotMismatch, match="other data"):
        next(fit(fresh(), opened(settings, 44), settings, snapshots=tmp_path))
    with pytest.raises(SnapshotMismatch, match="another network"):
        next(fit(small_cnn(), opened(settings), settings, snapshots=tmp_path))


def test_the_seed_decides_everything() -> None:
    def digest_for(seed: int) -> str:
        settings = config(seed=seed, augment="shift")
        return digest(drive(fit(fresh(dropout=0.5), opened(settings), settings)).network)

    assert digest_for(1) == digest_for(1) != digest_for(2)


@pytest.mark.parametrize(("num_workers", "augment"), [(0, "natural"), (2, "natural"), (0, "none")])
def test_streamed_pictures_train_to_the_same_bits_as_resident_ones(
    num_workers: int, augment: str, tmp_path: Path
) -> None:
    for index, (pixels, label) in enumerate(pairs(24, side=16)):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(tmp_path / label / f"{index:02}.png")

    def digest_with(**feeding: Any) -> str:
        settings = config(dataset=str(tmp_path), picture_size=8, augment=augment, **feeding)
        dataset = drive(open_dataset(settings))
        return digest(drive(fit(fresh(), dataset, settings)).network)

    resident = digest_with(num_workers=0)
    assert digest_with(memory_budget_mb=0, num_workers=num_workers) == resident


class Turned(nn.Linear):
    """A linear layer whose weight gets its gradient as the transposed one lies."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight.t().contiguous() + self.bias


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gradient_changes_its_own_weights_however_it_lies(optimizer: str) -> None:
    settings = config(optimizer=optimizer)
    found = []
    for kind in (Turned, nn.Linear):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), kind(64, 2))
        found.append(drive(fit(network, opened(settings), settings)).network.state_dict())
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("determinism", "fills"), [("exact", True), ("auto", False)])
def test_memory_is_only_written_beforehand_where_that_is_asked_for(
    determinism: str, fills: bool
) -> None:
    settings = config(epochs=1, determinism=determinism)
    loop = fit(fresh(), opened(settings), settings)
    next(loop)
    assert torch.utils.deterministic.fill_uninitialized_memory is fills  # type: ignore[attr-defined]
    loop.close()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]


def test_a_diverging_run_names_the_step() -> None:
    settings = config(optimizer="sgd", learning_rate=1e30, report_every=2)
    with pytest.raises(LossNotFinite, match=r"the loss of step 2 \(epoch 1\).*lower --lr"):
        drive(fit(fresh(), opened(settings), settings))


def test_a_diverging_run_leaves_no_snapshot_of_it(tmp_path: Path) -> None:
    settings = config(optimizer="sgd", learning_rate=1e30, snapshot_seconds=0)
    with pytest.raises(LossNotFinite):
        drive(fit(fresh(), opened(settings), settings, snapshots=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_run_that_no_longer_improves_ends_early_with_its_best_weights() -> None:
    settings = config(epochs=60, early_stopping=3, learning_rate=0.05, validation_fraction=0.3)
    dataset = opened(settings)
    result = drive(fit(fresh(), dataset, settings))
    assert result.stopped_early
    assert len(result.history) == result.best.epoch + 3 < 60
    part = dataset.validation
    assert part is not None
    pixels = torch.stack([part.samples.read(index)[0] for index in range(len(part))])
    right = result.network(dataset.preprocessing.finish(pixels)).argmax(1) == part.targets
    assert right.float().mean().item() == pytest.approx(result.best.validation_accuracy)


def test_the_loss_is_reported_every_so_many_steps_and_at_each_end() -> None:
    settings = config(report_every=3)
    progress = list(fit(fresh(), opened(settings), settings))
    # On a slow machine the loop also speaks in between, before it has a loss to tell.
    losses = {p.step: p.loss for p in progress if p.phase == "train" and p.loss is not None}
    ends = [p.step for p in progress if p.phase == "epoch"]
    assert set(losses) >= {3, 5, 6, 9, 10, 12, 15}
    assert ends == [5, 10, 15]


def test_bf16_on_request_trains_too() -> None:
    settings = config(precision="bf16", epochs=6)
    assert drive(fit(fresh(), opened(settings), settings)).best.validation_accuracy == 1.0


def test_an_absent_device_is_named() -> None:
    settings = config(device="cuda:7")
    with pytest.raises(DeviceUnavailable, match="cuda:7"):
        next(fit(fresh(), opened(settings), settings))
