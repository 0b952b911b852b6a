"""Transfer learning on a network of a few hundred weights, and once on a real backbone."""

import json
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import networks
from models.backbones import BackboneError
from models.manifest import NetworkSpec
from training.backbone import Backbone
from training.config import FinetuneConfig, TrainConfig
from training.datasets import Dataset, open_dataset
from training.features import HeadUnseparable, features_of, separate_head
from training.fine_tune import fine_tune
from training.methods import request_of
from training.outcome import FineTuned
from training.progress import Progress, drive
from training.train import Trained, measure, train
from training.transfer import scale_by_depth, train_but_norms

CPU = torch.device("cpu")
Pairs = list[tuple[Tensor, str]]


def stripes(num: int, *, upright: bool) -> Pairs:
    """Noise with bars in one of two places."""
    generator, found = torch.Generator().manual_seed(num), []
    for index in range(num):
        pixels = torch.randint(0, 90, (1, 8, 8), dtype=torch.uint8, generator=generator)
        bar = slice(1, 3) if index % 2 else slice(5, 7)
        pixels[(0, slice(None), bar) if upright else (0, bar)] += 120
        found.append((pixels, "first" if index % 2 else "second"))
    return found


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = TrainConfig.of(
        network="cnn", network_options={"width": 4}, epochs=3, batch_size=8, learning_rate=0.01
    )
    trained = drive(train(config, pairs=stripes(40, upright=True)))
    state = {name: tensor.clone() for name, tensor in trained.network.state_dict().items()}
    return Backbone(trained.spec, state, trained.dataset.preprocessing, "stripes:1")


def config(**changes: Any) -> FinetuneConfig:
    plain = {"epochs": 20, "batch_size": 8, "learning_rate": 0.01, "test_fraction": 0.0}
    return FinetuneConfig.of(**{**plain, "validation_fraction": 0.3, **changes})


def tuning(
    backbone: Backbone, folder: Path, settings: FinetuneConfig
) -> Generator[Progress, None, FineTuned]:
    request = request_of(settings, validation="split")
    pairs = stripes(40, upright=False)
    return fine_tune(request, folder, folder, backbone=backbone, pairs=pairs)


def tuned(backbone: Backbone, folder: Path | None = None, **changes: Any) -> Trained:
    with TemporaryDirectory() as other:
        return drive(tuning(backbone, folder or Path(other), config(**changes))).trained


def body(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a checkpoint of the backbone decides: all but the head and a counter of batches."""
    return {k: v for k, v in state.items() if "head." not in k and "num_batches" not in k}


def test_a_linear_probe_learns_and_leaves_the_backbone_to_the_bit(backbone: Backbone) -> None:
    trained = tuned(backbone)
    after = body(trained.network.state_dict())
    assert trained.report.accuracy >= 0.9
    assert trained.method == "linear_probe"
    assert trained.parent == "stripes:1"
    for name, before in body(dict(backbone.state)).items():
        assert torch.equal(after[name], before), name


def test_the_probe_measured_on_features_is_the_network_measured_on_pictures(
    backbone: Backbone,
) -> None:
    trained = tuned(backbone)
    whole = drive(measure(trained.network, trained.dataset))
    assert whole.accuracy == trained.report.accuracy == trained.fitted.best.validation_accuracy


def test_all_layers_may_learn_after_the_head(backbone: Backbone) -> None:
    trained = tuned(backbone, epochs=1, unfreeze_epochs=4, augment="none")
    after = body(trained.network.state_dict())
    assert trained.method == "fine_tune"
    assert not torch.equal(after["body.0.weight"], backbone.state["body.0.weight"])
    running = "body.1.running_mean"
    assert torch.equal(after[running], backbone.state[running])


def test_all_layers_are_given_up_where_the_head_alone_was_better(
    backbone: Backbone, tmp_path: Path
) -> None:
    # A decay that takes the weights away, once all layers learn at this rate.
    decay = {"optimizer": "sgd", "weight_decay": 1.0, "unfreeze_learning_rate": 0.1}
    settings = config(unfreeze_epochs=3, unfreeze_factor=1.0, **decay)
    done = drive(tuning(backbone, tmp_path, settings))
    trained = done.trained
    assert "the last layer alone did better, so all others are as before" in done.notes
    for name, tensor in body(trained.network.state_dict()).items():
        assert torch.equal(tensor, backbone.state[name]), name
    whole = drive(measure(trained.network, trained.dataset))
    assert whole.accuracy == trained.report.accuracy == trained.fitted.best.validation_accuracy


def test_steps_and_epochs_count_on_over_both_phases(backbone: Backbone, tmp_path: Path) -> None:
    loop = tuning(backbone, tmp_path, config(epochs=2, unfreeze_epochs=2))
    ends = [(p.epoch, p.num_epochs, p.step) for p in loop if p.phase == "epoch"]
    assert [epoch for epoch, _, _ in ends] == [1, 2, 3, 4]
    assert [step for *_, step in ends] == sorted(step for *_, step in ends)


def closed_after(loop: Iterator[Progress], phase: str, number: int) -> None:
    for progress in loop:
        if progress.phase == phase and progress.step >= number:
            break
    loop.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("phase", "number"), [("features", 1), ("train", 9), ("epoch", 20)])
def test_a_stopped_fine_tuning_ends_with_the_bits_of_one_never_stopped(
    phase: str, number: int, backbone: Backbone, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"epochs": 4, "unfreeze_epochs": 2, "report_every": 1}
    whole = tuned(backbone, **changes).network.state_dict()
    closed_after(tuning(backbone, tmp_path, config(**changes)), phase, number)
    resumed = tuned(backbone, tmp_path, **changes).network.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def opened(backbone: Backbone, num: int = 24) -> Dataset:
    pairs = stripes(num, upright=False)
    return drive(open_dataset(config(), backbone.preprocessing, pairs))


def network_of(backbone: Backbone) -> nn.Module:
    network = networks.build(backbone.spec.name, backbone.spec.options)
    network.load_state_dict(dict(backbone.state))
    return network


def test_features_are_computed_once_and_kept(backbone: Backbone, tmp_path: Path) -> None:
    dataset, network = opened(backbone), network_of(backbone)
    first = list(features_of(network, dataset, CPU, tmp_path))
    assert [progress.phase for progress in first] == ["features", "features"]
    assert list(features_of(network, dataset, CPU, tmp_path)) == []
    network.get_parameter("body.0.weight").data.add_(0.1)
    assert list(features_of(network, dataset, CPU, tmp_path)) != []
    assert list(features_of(network, opened(backbone, 26), CPU, tmp_path)) != []


def test_stored_features_are_the_computed_ones(backbone: Backbone, tmp_path: Path) -> None:
    dataset, network = opened(backbone), network_of(backbone)
    computed, stored = (drive(features_of(network, dataset, CPU, tmp_path)) for _ in range(2))
    samples = [one.train.samples.read(3)[0] for one in (computed, stored)]
    assert torch.equal(samples[0], samples[1])


def test_a_head_may_be_a_convolution_with_layers_behind_it() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        nn.Flatten(),
    )
    path, head = separate_head(network)
    assert path == "2.1"
    names = [type(part).__name__ for part in head]
    assert names == ["Conv2d", "ReLU", "AdaptiveAvgPool2d", "Flatten"], "and no dropout before it"


class Halved(nn.Module):
    """Does something behind its last layer that its modules do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1)) / 2
        return logits


def test_a_head_that_cannot_stand_alone_is_refused(backbone: Backbone) -> None:
    with pytest.raises(HeadUnseparable, match="train the network whole"):
        drive(features_of(Halved(), opened(backbone), CPU))


def test_weights_of_another_network_are_refused(backbone: Backbone) -> None:
    wider = replace(
        backbone, spec=NetworkSpec(name="cnn", options={**backbone.spec.options, "width": 8})
    )
    with pytest.raises(BackboneError, match="another network"):
        tuned(wider)


def test_lower_layers_learn_by_smaller_steps(backbone: Backbone) -> None:
    network = network_of(backbone)
    scale_of = scale_by_depth(network, factor=16.0)
    scales = [scale_of(name) for name, _ in network.named_parameters()]
    assert scales == sorted(scales)
    assert scales[0] == pytest.approx(1 / 16)
    assert scale_of("head.weight") == scale_of("head.bias") == 1.0


def test_batch_norms_stay_as_they_were_while_all_else_trains() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    train_but_norms(network)
    assert [part.training for part in network] == [True, False, True]


@pytest.mark.slow
def test_ants_and_bees_are_told_apart_on_a_real_backbone(real_data: Path, tmp_path: Path) -> None:
    from models import backbones
    from models.state_dicts import read_state_dict

    weights = real_data / "weights" / "mobilenet_v2.pth"
    if not weights.is_file():
        pytest.skip(f"no weights at {weights}")
    mobilenet = Backbone(
        NetworkSpec(name="torchvision/mobilenet_v2"),
        read_state_dict(weights),
        backbones.published_preprocessing("mobilenet_v2"),
        weights.name,
    )
    settings = FinetuneConfig.of(dataset=str(real_data / "hymenoptera"))
    request = request_of(settings)
    trained = drive(fine_tune(request, tmp_path, tmp_path / "run", backbone=mobilenet)).trained
    assert trained.dataset.notes == (
        "train/ants/imageNotFound.gif: skipped; JPEG, PNG and WebP are read",
    )
    assert trained.report.accuracy >= 0.95


@pytest.mark.parametrize("unfreeze_epochs", [0, 2])
def test_a_run_that_goes_on_asks_for_what_it_began_with(unfreeze_epochs: int) -> None:
    asked = FinetuneConfig.of(dataset="pictures", unfreeze_epochs=unfreeze_epochs)
    kept = json.loads(asked.model_dump_json())
    assert request_of(FinetuneConfig.of(**kept)) == request_of(asked)
