"""G6: the `mnist` recipe on a device, and an epoch of the loop that every tutorial shows there."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from models import networks
from training.config import TrainConfig
from training.datasets import Dataset, open_dataset
from training.fit import fit
from training.progress import drive
from training.randomness import seed_for, seeded
from training.recipes import with_recipe
from training.samples import InMemory
from training.source import Part
from training.train import measure, network_spec

SMOKE_SAMPLES = 512


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: test accuracy, seconds in the training loop, epochs."""

    accuracy: float
    seconds: float
    num_epochs: int


def recipe_run(device: torch.device, seed: int, data: Path, *, smoke: bool) -> Outcome:
    """The recipe with one seed."""
    config, dataset = _opened(device, seed, data, smoke=smoke)
    fitted = drive(fit(_network(config, dataset), dataset, config))
    accuracy = drive(measure(fitted.network, dataset)).accuracy
    return Outcome(accuracy, fitted.seconds, config.epochs)


def tutorial_epoch_s(device: torch.device, data: Path, *, smoke: bool) -> float:
    """The same network; a `DataLoader` of single samples, batch 64, `loss.item()` at times."""
    config, dataset = _opened(device, 0, data, smoke=smoke)
    samples: Any = dataset.train.samples
    finished = dataset.preprocessing.finish(samples.data)
    loader = DataLoader(TensorDataset(finished, dataset.train.targets), 64, shuffle=True)
    network = _network(config, dataset).to(device).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.5)
    began = time.perf_counter()
    for step, (batch, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(batch.to(device)), target.to(device))
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            loss.item()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _opened(
    device: torch.device, seed: int, data: Path, *, smoke: bool
) -> tuple[TrainConfig, Dataset]:
    given = {"dataset": "mnist", "data_root": str(data), "seed": seed, "device": str(device)}
    config = TrainConfig.of(**with_recipe(given))
    dataset = drive(open_dataset(config))
    if smoke:
        parts = {name: _first(part) for name, part in dataset.parts.items()}
        dataset, config = replace(dataset, parts=parts), config.model_copy(update={"epochs": 1})
    return config, dataset


def _first(part: Part) -> Part:
    samples: Any = part.samples
    return Part(InMemory(samples.data[:SMOKE_SAMPLES]), part.targets[:SMOKE_SAMPLES])


def _network(config: TrainConfig, dataset: Dataset) -> nn.Module:
    spec = network_spec(config, dataset)
    with seeded(seed_for(config.seed, "weights")):
        return networks.build(spec.name, spec.options)
