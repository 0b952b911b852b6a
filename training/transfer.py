"""Transfer learning: a new head on a backbone, learned on features that are computed once; then,
if wanted, all layers, the lower ones by smaller steps.
"""

import copy
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from models import networks
from models.backbones import load_backbone
from models.device import choose_device
from models.heads import last_layer
from training.backbone import Backbone
from training.config import FinetuneConfig
from training.datasets import Dataset, open_dataset
from training.features import features_of, separate_head
from training.fit import FitResult, fit
from training.progress import Progress, mapped
from training.randomness import seed_for, seeded
from training.train import Trained, measure

NUM_STAGES = 4
"""Into so many stages the layers below the head are cut, each with its own learning rate."""
PROBE, FINE_TUNE = "linear probe", "fine-tune"
HEAD, ALL_LAYERS = "head", "all-layers"
"""Where in a run's folder the snapshots of the two phases lie."""


def finetune(
    config: FinetuneConfig,
    backbone: Backbone,
    *,
    run: Path | None = None,
    cache: Path | None = None,
    pairs: Any = None,
) -> Generator[Progress, None, Trained]:
    """Fine-tune `backbone` on the dataset that `config` names.

    Args:
        config: everything that can be set.
        backbone: the network and weights to begin with.
        run: a folder of this run's own; what it holds is gone on with.
        cache: a folder for features, which runs on the same backbone and dataset share.
        pairs: a dataset from Python instead, as `training.datasets.open_dataset` takes it.

    Yields:
        Phases `read`, `features`, `train`, `validate`, `epoch`, `evaluate`; steps and epochs
        count on from the head's to those of all layers.

    Raises:
        models.backbones.BackboneError, training.faults.DatasetError,
        training.features.HeadUnseparable, training.fit.LossNotFinite,
        training.snapshot.SnapshotMismatch: as their sentences say.
    """
    dataset = yield from open_dataset(config, backbone.preprocessing, pairs)
    spec = backbone.spec_for(len(dataset.classes))
    with seeded(seed_for(config.seed, "weights")):
        network = networks.build(spec.name, spec.options)
    load_backbone(network, backbone.state)
    features = yield from features_of(network, dataset, choose_device(config.device), cache)
    head_config = config.model_copy(update={"augment": "none"})
    head, snapshots = separate_head(network)[1], run / HEAD if run else None
    probe = yield from fit(head, features, head_config, snapshots=snapshots)
    fitted = probe
    if config.unfreeze_epochs:
        fitted = yield from _all_layers(network, dataset, config, probe, run)
    if fitted is probe:
        method, report = PROBE, (yield from measure(head, features))
    else:
        method, report = FINE_TUNE, (yield from measure(network, dataset))
    network.to("cpu").eval()
    return Trained(spec, network, dataset, config, fitted, report, method, backbone.parent)


def _all_layers(
    network: nn.Module,
    dataset: Dataset,
    config: FinetuneConfig,
    head: FitResult,
    run: Path | None,
) -> Generator[Progress, None, FitResult]:
    """Let all layers learn; if that made it worse, go back to the head alone.

    Returns:
        How it went, or `head` itself where the head alone was better on the validation part.
    """
    before = copy.deepcopy(network.state_dict())
    changes = {
        "epochs": config.unfreeze_epochs,
        "batch_size": config.unfreeze_batch_size,
        "learning_rate": config.unfreeze_learning_rate,
    }
    loop = fit(
        network,
        dataset,
        config.model_copy(update=changes),
        snapshots=run / ALL_LAYERS if run else None,
        train_mode=train_but_norms,
        scale_of=scale_by_depth(network, config.unfreeze_factor),
    )
    result = yield from mapped(loop, _counted_from(head, config))
    if dataset.validation and head.best.merit >= result.best.merit:
        network.load_state_dict(before)
        return head
    return replace(result, seconds=head.seconds + result.seconds)


def train_but_norms(network: nn.Module) -> None:
    """Training mode but for batch norms: a few pictures must not move what millions have set."""
    network.train()
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def scale_by_depth(network: nn.Module, factor: float) -> Callable[[str], float]:
    """The factor of a parameter's learning rate: 1 for the head, 1/`factor` for the lowest stage,
    in equal ratios between (Howard and Ruder, 2018).
    """
    head = last_layer(network) + "."
    names = [name for name, _ in network.named_parameters() if not name.startswith(head)]
    stages = {name: index * NUM_STAGES // len(names) for index, name in enumerate(names)}

    def scale_of(name: str) -> float:
        height = stages.get(name, NUM_STAGES) / NUM_STAGES
        return float(factor ** (height - 1))

    return scale_of


def _counted_from(head: FitResult, config: FinetuneConfig) -> Callable[[Progress], Progress]:
    """Steps and epochs of a second loop as those of one run that began with the head."""
    steps, epochs = head.history[-1].step, len(head.history)

    def counted(progress: Progress) -> Progress:
        if progress.phase not in ("train", "epoch"):
            return progress
        return replace(
            progress,
            step=progress.step + steps,
            num_steps=progress.num_steps + steps,
            epoch=progress.epoch + epochs,
            num_epochs=config.unfreeze_epochs + epochs,
        )

    return counted
