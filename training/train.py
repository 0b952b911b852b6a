"""Training from fresh weights, whole: open the dataset, build the network, fit, measure."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import networks
from models.manifest import NetworkSpec
from models.preprocessing import Preprocessing
from training.config import Config, TrainConfig
from training.datasets import Dataset, open_dataset
from training.evaluate import evaluate
from training.feed import in_batches
from training.fit import FitResult, fit, never, team_of
from training.layout import laid_out, layout_of
from training.progress import Progress
from training.randomness import seed_for, seeded
from training.ranks import Ranks, ranks_for
from training.report import Report

MEASURED_BATCH = 256
SNAPSHOTS = "snapshots"
"""Where in a run's folder its snapshots lie."""


class NetworkUnfit(Exception):
    """The network does not take what the dataset holds."""


@dataclass(frozen=True)
class Trained:
    """A network that has learned, and everything that a checkpoint should say of it.

    Attributes:
        spec: how to build the network again.
        network: the best weights, in `eval()`, on the CPU.
        dataset: what it learned from.
        config: with which settings.
        fitted: how the training went.
        report: measured on the dataset's part `measured_on`, on the CPU in fp32.
        method: `train`, `linear_probe`, `fine_tune` or `from_scratch`.
        parent: the weights it began with, if not fresh ones.
        measured_on: what the report is of, where that is no part of the dataset.
    """

    spec: NetworkSpec
    network: nn.Module
    dataset: Dataset
    config: Config
    fitted: FitResult
    report: Report
    method: str = "train"
    parent: str | None = None
    measured_on: str | None = None


def train(
    config: TrainConfig,
    *,
    run: Path | None = None,
    pairs: Any = None,
    stop: Callable[[], bool] = never,
    ranks: Ranks | None = None,
) -> Generator[Progress, None, Trained]:
    """Train the network that `config` names on the dataset that it names.

    Args:
        config: everything that can be set.
        run: a folder of this run's own; what it holds is gone on with.
        pairs: a dataset from Python instead, as `training.datasets.open_dataset` takes it.
        stop: asked after every step, as `training.fit.fit` takes it.
        ranks: processes that share each step; started as `config` says where there are none.

    Raises:
        training.faults.DatasetError, NetworkUnfit, models.networks.NetworkError,
        training.fit.LossNotFinite, training.snapshot.SnapshotMismatch, training.ranks.RankFailed,
        training.ranks.RankLost, training.task.Unshareable: as their sentences say.
    """
    if config.network != "auto":
        networks.require(config.network)  # before minutes of reading
    with ranks_for(config.num_processes, ranks) as shared:
        dataset = yield from open_dataset(config, _published(config), pairs)
        spec = network_spec(config, dataset)
        with seeded(seed_for(config.seed, "weights")):
            network = networks.build(spec.name, spec.options)
        snapshots, team = run / SNAPSHOTS if run else None, team_of(shared, spec)
        fitted = yield from fit(network, dataset, config, snapshots=snapshots, stop=stop, team=team)
    report = yield from measure(fitted.network, dataset)
    return Trained(spec, fitted.network, dataset, config, fitted, report)


def network_spec(config: TrainConfig, dataset: Dataset) -> NetworkSpec:
    """The network that `config` names, with the options that the dataset decides filled in.

    Raises:
        NetworkUnfit: it takes pictures and the dataset holds none.
    """
    spec = spec_of(config.network, dataset.preprocessing, len(dataset.classes), dataset.name)
    return NetworkSpec(name=spec.name, options={**spec.options, **config.network_options})


def spec_of(name: str, preprocessing: Preprocessing, num_classes: int, dataset: str) -> NetworkSpec:
    """The network `name` for such inputs and so many classes; raises as `network_spec`."""
    shape, takes_pictures = preprocessing.input_shape, preprocessing.accepts_pictures
    if name == "auto":
        name = "cnn" if takes_pictures else "mlp"
    options: dict[str, Any] = {"num_classes": num_classes}
    if name == "mlp":
        options["inputs"] = torch.Size(shape).numel()
    elif name == "cnn":
        if not takes_pictures:
            raise NetworkUnfit(f"cnn takes pictures and {dataset} holds numbers; take mlp")
        options |= {"channels": shape[0], "size": shape[-1]}
    elif name.startswith("torchvision/") and shape[0] != 3:
        options["channels"] = shape[0]
    return NetworkSpec(name=name, options=options)


def measure(network: nn.Module, dataset: Dataset) -> Generator[Progress, None, Report]:
    """Evaluate `network` on the part of `dataset` that figures come from; both on the CPU."""
    part = dataset.parts[dataset.measured_on]
    layout = layout_of(network)
    network.to("cpu").to(memory_format=layout).eval()

    def predict(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(laid_out(inputs, layout))
        return logits

    finish, num_workers = dataset.preprocessing.finish, dataset.num_workers
    batches = in_batches(part, finish, MEASURED_BATCH, num_workers)
    return (yield from evaluate(predict, batches, dataset.classes, len(part)))


def _published(config: TrainConfig) -> Preprocessing | None:
    """What torchvision publishes with its networks, unless another picture size is wanted."""
    if config.picture_size or not config.network.startswith("torchvision/"):
        return None
    from models import backbones  # torchvision takes seconds, and only its own networks need it

    return backbones.published_preprocessing(config.network)
