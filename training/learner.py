"""How a network is made from samples: the same for each fold and for the whole."""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from models import networks
from models.backbones import load_backbone
from models.device import choose_device
from models.manifest import NetworkSpec
from training.backbone import Backbone
from training.config import FitConfig, TrainConfig
from training.datasets import Dataset
from training.features import separate_head
from training.fit import FitResult, fit, never, team_of
from training.methods import FROM_SCRATCH, LINEAR_PROBE, FineTuneRequest
from training.multiply_adds import multiply_adds
from training.progress import Progress, mapped
from training.randomness import seed_for, seeded
from training.ranks import Ranks
from training.samples import InMemory, Samples
from training.train import network_spec
from training.transfer import scale_by_depth, train_but_norms

HEAD: Final = "head"
ALL_LAYERS: Final = "all-layers"
"""Where in a run's folder the snapshots of these two loops lie."""
SHORT_STEP: Final = 100_000_000
"""Multiplications of a forward, of the whole batch. Two threads take shorter steps hardly quicker
than one, and slower where one of them has to give its processor up (docs/log.md)."""
PHASE: Final = ("epochs", "batch_size", "learning_rate", "optimizer", "weight_decay")
"""Settings that the head alone has of its own."""
FEATURE_NORM: Final = 27.0
"""The norm of a sample's features for which the rates and decays of sgd are meant; that of
mobilenet_v2, with which they were found."""


@dataclass
class Learner:
    """How a network is made from samples: the same for each fold and for the whole."""

    request: FineTuneRequest
    settings: Any
    backbone: Backbone
    dataset: Dataset
    home: Path
    stop: Callable[[], bool]
    ranks: Ranks | None = None
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> NetworkSpec:
        """The network with as many outputs as the dataset has classes."""
        if not self.backbone.state and self.request.method == FROM_SCRATCH:
            config = TrainConfig.of(network=self.backbone.spec.name)
            return network_spec(config, self.dataset)
        if self._keeps_head:
            return self.backbone.spec
        return self.backbone.spec_for(len(self.dataset.classes))

    def network(self) -> nn.Module:
        """Before any step."""
        spec = self.spec
        with seeded(seed_for(self.request.seed, "weights")):
            network = networks.build(spec.name, spec.options)
        if self.request.method == FROM_SCRATCH:
            return network
        if self._keeps_head:
            network.load_state_dict(dict(self.backbone.state))
            self.notes = ("the last layer begins as the base has it",)
        else:
            load_backbone(network, self.backbone.state)
        return network

    def learn(
        self,
        network: nn.Module,
        dataset: Dataset,
        features: Dataset | None,
        folder: Path,
        last_epoch: int = 0,
    ) -> Generator[Progress, None, FitResult]:
        """Train `network`, of which the head comes first where there are features.

        Args:
            network: changed in place.
            dataset: samples to learn from and, maybe, to choose by.
            features: of the same samples.
            folder: where snapshots lie.
            last_epoch: of a linear probe: where it ends; 0 for all epochs.
        """
        if features is None:
            loop = fit(
                network,
                dataset,
                self._config_of_all_layers(network),
                snapshots=folder / ALL_LAYERS,
                stop=self.stop,
                team=team_of(self.ranks, self.spec),
            )
            return (yield from loop)
        path, head = separate_head(network)
        ended = self.request.method == LINEAR_PROBE
        prefix = "" if ended else "head_"
        config = self.config(prefix, augment="none")
        config = self._with_threads(config, head, _data(features.train.samples)[:1])
        with _scaled(network.get_submodule(path), features, config) as scaled:
            first = yield from fit(
                head,
                scaled,
                config,
                snapshots=folder / HEAD,
                stop=self.stop if ended else never,
                last_epoch=last_epoch,
            )
        if ended:
            return first
        return (yield from self._all_layers(network, dataset, first, folder))

    def _all_layers(
        self, network: nn.Module, dataset: Dataset, first: FitResult, folder: Path
    ) -> Generator[Progress, None, FitResult]:
        """Let all layers learn; if that made validation worse, go back to the head alone."""
        before = copy.deepcopy(network.state_dict())
        frozen = self.settings.batch_norms == "frozen"
        loop = fit(
            network,
            dataset,
            self._config_of_all_layers(network),
            snapshots=folder / ALL_LAYERS,
            train_mode=train_but_norms if frozen else nn.Module.train,
            scale_of=scale_by_depth(network, self.settings.layer_factor),
            stop=self.stop,
            team=team_of(self.ranks, self.spec),
        )
        second = yield from mapped(loop, _counted_from(first, self.settings.epochs))
        if dataset.validation and first.best.merit >= second.best.merit:
            network.load_state_dict(before)
            self.notes = (
                *self.notes,
                "the last layer alone did better, so all others are as before",
            )
            return first
        return replace(second, seconds=first.seconds + second.seconds)

    def config(self, prefix: str = "", **changes: Any) -> FitConfig:
        """Settings of one loop; those of the head have a prefix in `fine_tune`."""
        names = FitConfig.model_fields
        given = {n: v for n, v in self.settings.model_dump().items() if n in names}
        compute = self.request.compute.model_dump()
        given |= {name: value for name, value in compute.items() if name in names}
        for name in PHASE if prefix else ():
            given[name] = getattr(self.settings, prefix + name)
        if prefix or self.request.method == LINEAR_PROBE:
            changes |= {"mixup": 0.0, "cutmix": 0.0}
        return FitConfig.of(**{**given, "seed": self.request.seed, **changes})

    def _config_of_all_layers(self, network: nn.Module) -> FitConfig:
        example = torch.zeros(1, *self.dataset.preprocessing.input_shape)
        return self._with_threads(self.config(), network, example)

    def _with_threads(self, config: FitConfig, network: nn.Module, example: Tensor) -> FitConfig:
        """One thread for short steps, unless somebody has said how many."""
        if config.threads or choose_device(config.device).type != "cpu":
            return config
        per_step = multiply_adds(network, example) * config.batch_size
        return config.model_copy(update={"threads": int(per_step < SHORT_STEP)})

    @property
    def _keeps_head(self) -> bool:
        return getattr(self.settings, "head", "new") == "keep" and self.backbone.labels is not None


@contextmanager
def _scaled(layer: nn.Module, features: Dataset, config: FitConfig) -> Iterator[Dataset]:
    """The features at one scale for sgd, whose steps are as large as they are; inside, the weights
    of `layer` are those for that scale, and answer the same.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    train = features.train.samples
    factor = FEATURE_NORM / _norm(train) if config.optimizer == "sgd" else 1.0
    with torch.no_grad():
        weight.div_(factor)
    parts = {
        name: replace(part, samples=InMemory(_data(part.samples) * factor))
        for name, part in features.parts.items()
    }
    yield replace(features, parts=parts)
    with torch.no_grad():
        weight.mul_(factor)


def _norm(samples: Samples) -> float:
    """The root of the mean square over samples and places; 1 where all are zero."""
    return float(_data(samples).square().sum(1).mean().sqrt()) or 1.0


def _data(samples: Samples) -> Tensor:
    if not isinstance(samples, InMemory):
        raise TypeError("features lie in memory")
    return samples.data


def _counted_from(first: FitResult, epochs: int) -> Callable[[Progress], Progress]:
    """Steps and epochs of a second loop as those of one run that began with the head."""
    steps, before = first.history[-1].step, len(first.history)

    def counted(progress: Progress) -> Progress:
        if progress.phase not in ("train", "epoch"):
            return progress
        return replace(
            progress,
            step=progress.step + steps,
            num_steps=progress.num_steps + steps,
            epoch=progress.epoch + before,
            num_epochs=epochs + before,
        )

    return counted
