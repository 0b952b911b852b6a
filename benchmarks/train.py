"""`python -m benchmarks.train`: how fast training is, against the loop that every tutorial shows.

Three things: an epoch of MNIST by the tutorial's loop and by ours, with the same network, batches,
optimizer and number of steps, in rounds; the `mnist` recipe over several seeds; the `digits` recipe
over several seeds. Needs MNIST under `PYTORCHLIB_TEST_DATA` or `--data`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.machine import this_machine
from benchmarks.record import Record, Table, command_of, tell
from benchmarks.rounds import Cell, Round, Sample, difference, measure_rounds, ratio, undisturbed
from benchmarks.verdict import Verdict, at_least, at_most, goals_table
from models import networks
from training.config import TrainConfig
from training.datasets import Dataset, open_dataset
from training.fit import fit
from training.progress import drive
from training.randomness import seed_for, seeded
from training.recipes import with_recipe
from training.train import measure, network_spec

TUTORIAL, OURS = "tutorial loop", "pytorchlib"
CLASSIC = {"network": "mlp", "optimizer": "sgd", "learning_rate": 0.01, "momentum": 0.5}
GOALS = {"mnist": (0.99, 10.0), "digits": (0.98, 10.0)}


@dataclass(frozen=True, slots=True)
class SeedOutcome:
    """One run of a recipe: test accuracy, and seconds in the training loop."""

    seed: int
    accuracy: float
    seconds: float
    cpu_seconds: float


def main(arguments: Sequence[str]) -> None:
    """Measure, print the tables and one line of JSON, and keep them where that is asked."""
    options = _options().parse_args(arguments)
    torch.set_num_threads(options.threads)
    began, tables, figures = datetime.now(UTC), [], {}
    if "classic" in options.parts:
        rounds = _classic_rounds(options)
        verdicts = _classic_verdicts(rounds)
        tables += [_classic_table(rounds), goals_table("Against the tutorial's loop", verdicts)]
        figures["classic"] = _plain(rounds, verdicts)
    for name in GOALS.keys() & set(options.parts):
        outcomes = [_recipe_run(name, seed, options.data) for seed in range(options.seeds)]
        tables.append(_recipe_table(name, outcomes))
        figures[name] = [asdict(outcome) for outcome in outcomes]
    method = [f"{options.threads} threads; times are of the training loop, data read beforehand"]
    command = command_of("train", arguments)
    record = Record("train", command, this_machine(), method, tables, figures, began)
    record.show(write=options.write)


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    data = os.environ.get("PYTORCHLIB_TEST_DATA", "../shared/data")
    parts = ("classic", *GOALS)
    add = options.add_argument
    add("--data", type=Path, default=Path(data), help="the folder that holds mnist/MNIST/raw")
    add("--parts", nargs="+", choices=parts, default=parts, help="which; all")
    add("--rounds", type=int, default=7, help="epochs of either loop")
    add("--seeds", type=int, default=5, help="runs of each recipe")
    add("--threads", type=int, default=2, help="processor threads")
    add("--write", action="store_true", help="keep the outcome in benchmarks/results")
    return options


# One epoch of the classic recipe, by either loop


def _classic_rounds(options: argparse.Namespace) -> list[Round]:
    config = TrainConfig.of(
        dataset="mnist",
        data_root=str(options.data),
        validation_fraction=0,
        epochs=1,
        batch_size=64,
        **CLASSIC,
    )
    dataset = drive(open_dataset(config))
    cells = [
        Cell(TUTORIAL, _timed(lambda seed: _tutorial_epoch(config, dataset, seed))),
        Cell(OURS, _timed(lambda seed: _our_epoch(config, dataset, seed))),
    ]
    return measure_rounds(cells, options.rounds, tell=tell)


def _timed(epoch: Callable[[int], tuple[float, nn.Module, Dataset]]) -> Callable[[], Sample]:
    seeds = count()

    def sample() -> Sample:
        seconds, network, dataset = epoch(next(seeds))
        return {"seconds": seconds, "accuracy": drive(measure(network, dataset)).accuracy}

    return sample


def _our_epoch(
    config: TrainConfig, dataset: Dataset, seed: int
) -> tuple[float, nn.Module, Dataset]:
    network = _perceptron(config, dataset, seed)
    began = time.perf_counter()
    drive(fit(network, dataset, config.model_copy(update={"seed": seed})))
    return time.perf_counter() - began, network, dataset


def _tutorial_epoch(
    config: TrainConfig, dataset: Dataset, seed: int
) -> tuple[float, nn.Module, Dataset]:
    """As it is written everywhere: a transform a sample, a `DataLoader`, `loss.item()` at times."""
    from torchvision import datasets, transforms

    normalize = transforms.Normalize((0.1307,), (0.3081,))
    transform = transforms.Compose([transforms.ToTensor(), normalize])
    root = config.data_root if Path(config.data_root, "MNIST").is_dir() else _below(config)
    train = datasets.MNIST(root, train=True, transform=transform)
    loader = DataLoader(train, batch_size=64, shuffle=True)
    network = _perceptron(config, dataset, seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.5)
    network.train()
    began = time.perf_counter()
    for step, (data, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(data), target)
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            loss.item()
    return time.perf_counter() - began, network, dataset


def _below(config: TrainConfig) -> str:
    return str(Path(config.data_root, "mnist"))


def _perceptron(config: TrainConfig, dataset: Dataset, seed: int) -> nn.Module:
    spec = network_spec(config, dataset)
    with seeded(seed_for(seed, "weights")):
        return networks.build(spec.name, spec.options)


def _classic_verdicts(rounds: Sequence[Round]) -> list[Verdict]:
    kept = undisturbed(rounds)
    gain = difference(OURS, TUTORIAL, "accuracy")
    return [
        at_least("times as fast", kept, ratio(TUTORIAL, OURS, "seconds"), 12.0),
        at_most(
            "accuracy differs by, in points", rounds, lambda samples: 100 * abs(gain(samples)), 0.3
        ),
    ]


def _classic_table(rounds: Sequence[Round]) -> Table:
    rows = [("loop", "s an epoch, median", "least", "most", "test accuracy, mean")]
    for name in (TUTORIAL, OURS):
        seconds = [one.samples[name]["seconds"] for one in rounds]
        accuracy = statistics.mean(one.samples[name]["accuracy"] for one in rounds)
        times = (statistics.median(seconds), min(seconds), max(seconds))
        rows.append((name, *(f"{value:.3f}" for value in times), f"{accuracy:.2%}"))
    return Table("MNIST, 784-128-64-10, SGD 0.01, momentum 0.5, batch 64, 938 steps", rows)


def _plain(rounds: Sequence[Round], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "rounds": [asdict(one) for one in rounds],
    }


# The recipes


def _recipe_run(name: str, seed: int, data: Path) -> SeedOutcome:
    config = TrainConfig.of(**with_recipe({"dataset": name, "data_root": str(data), "seed": seed}))
    dataset = drive(open_dataset(config))
    spec = network_spec(config, dataset)
    with seeded(seed_for(seed, "weights")):
        network = networks.build(spec.name, spec.options)
    cpu = time.process_time()
    fitted = drive(fit(network, dataset, config))
    cpu = time.process_time() - cpu
    accuracy = drive(measure(fitted.network, dataset)).accuracy
    outcome = SeedOutcome(seed, accuracy, fitted.seconds, cpu)
    tell(f"{name}, seed {seed}: {accuracy:.2%} after {fitted.seconds:.2f} s, {cpu:.2f} s of CPU")
    return outcome


def _recipe_table(name: str, outcomes: Sequence[SeedOutcome]) -> Table:
    accuracy_goal, seconds_goal = GOALS[name]
    rows = [("figure", "mean", "least", "most", "goal of the mean")]
    figures: Mapping[str, tuple[list[float], str, str]] = {
        "test accuracy": ([one.accuracy for one in outcomes], ".2%", f"{accuracy_goal:.0%}"),
        "seconds": ([one.seconds for one in outcomes], ".2f", f"under {seconds_goal:g}"),
        "seconds of CPU": ([one.cpu_seconds for one in outcomes], ".2f", ""),
    }
    for figure, (values, form, goal) in figures.items():
        numbers = (statistics.mean(values), min(values), max(values))
        rows.append((figure, *(format(value, form) for value in numbers), goal))
    return Table(f"Recipe `{name}`, {len(outcomes)} seeds", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
