"""`python -m benchmarks.ranks`: two processes of one thread against one process of two threads.

The same network, samples and batches, in rounds that take turns; time is that of the training loop,
without the start of processes. Above 1, sharing is faster.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch

from models import networks
from models.manifest import NetworkSpec
from training.config import TrainConfig
from training.datasets import Dataset, open_dataset
from training.fit import fit, team_of
from training.progress import drive
from training.ranks import Ranks, started

NUM_CLASSES = 10
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int], int, int]] = {
    "cnn": ({"channels": 1, "size": 28}, (1, 28, 28), 2048, 256),
    "torchvision/mobilenet_v2": ({}, (3, 96, 96), 96, 16),
}
"""Network -> options, shape of a picture, samples, batch size."""


def main(arguments: Sequence[str]) -> None:
    """Measure, and print one line a network."""
    options = _options().parse_args(arguments)
    torch.set_num_threads(2)
    with started(2) as ranks:
        for name in options.networks:
            _, shape, num, _ = CASES[name]
            dataset = _noise(shape, num)
            _seconds(name, dataset, ranks)  # the first time, kernels and memory are made ready
            pairs = [
                (_seconds(name, dataset, None), _seconds(name, dataset, ranks))
                for _ in range(options.rounds)
            ]
            ratios = [alone / together for alone, together in pairs]
            shown = ", ".join(f"{alone:.2f}/{together:.2f}" for alone, together in pairs)
            sys.stdout.write(
                f"{name}: {statistics.median(ratios):.2f} times as fast "
                f"(from {min(ratios):.2f} to {max(ratios):.2f}; seconds {shown}; "
                f"load {os.getloadavg()[0]:.1f})\n"
            )


def _seconds(name: str, dataset: Dataset, ranks: Ranks | None) -> float:
    """Of one epoch, with two threads in all."""
    own, _, _, batch_size = CASES[name]
    spec = NetworkSpec(name=name, options={**own, "num_classes": NUM_CLASSES})
    config = TrainConfig.of(epochs=1, batch_size=batch_size, threads=1 if ranks else 2)
    network = networks.build(spec.name, spec.options)
    return drive(fit(network, dataset, config, team=team_of(ranks, spec))).seconds


def _noise(shape: tuple[int, int, int], num: int) -> Dataset:
    pixels = torch.randint(0, 256, (num, *shape), dtype=torch.uint8)
    pairs = [(picture, index % NUM_CLASSES) for index, picture in enumerate(pixels)]
    config = TrainConfig.of(validation_fraction=0.0, test_fraction=0.0)
    return drive(open_dataset(config, pairs=pairs))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
