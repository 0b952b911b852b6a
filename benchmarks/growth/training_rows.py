"""What training and evaluation cost as datasets and epochs grow."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.evaluate import pictures
from benchmarks.growth.row import Curve, Measure, Row
from benchmarks.networks import RESNET, publish_resnet
from benchmarks.ours import ROOT
from benchmarks.rounds import Sample
from models import networks
from models.store import ModelStore

NUM_FEATURES: Final = 784
NUM_PICTURES: Final = 48


def rows() -> list[Row]:
    """All of this file."""
    return [
        Row(
            "dataset",
            "samples of a dataset",
            [1 << power for power in range(10, 18)],
            [
                Curve("open_cpu_s", "CPU s to open it", 1.0),
                Curve("epoch_cpu_s", "CPU s of an epoch", 1.0),
            ],
            _datasets,
        ),
        Row(
            "evaluate",
            "pictures evaluated",
            [250, 500, 1000, 2000, 4000, 8000],
            [
                Curve("memory_bytes", "peak memory in bytes", 0.0, "count"),
                Curve("cpu_s", "CPU s", 1.0),
            ],
            _evaluations,
            num_rounds=3,
        ),
        Row(
            "epochs",
            "epochs of a linear probe",
            [1, 2, 5, 10, 20, 50, 100],
            [Curve("cpu_s", "CPU s, the backbone's pass included", 0.1)],
            _probes,
            num_rounds=3,
        ),
    ]


@contextmanager
def _datasets(folder: Path) -> Iterator[Measure]:
    """Numbers that mean nothing, and one epoch of a perceptron over them."""
    from training.config import TrainConfig
    from training.datasets import open_dataset
    from training.fit import fit
    from training.progress import drive
    from training.train import network_spec

    torch.set_num_threads(1)

    def measure(size: int) -> Sample:
        path = folder / f"{size}.npz"
        if not path.exists():
            _write_npz(path, size)
        config = TrainConfig.of(dataset=str(path), network="mlp", epochs=1, batch_size=64)
        began = time.process_time()
        dataset = drive(open_dataset(config))
        opened = time.process_time()
        spec = network_spec(config, dataset)
        drive(fit(networks.build(spec.name, spec.options), dataset, config))
        return {"open_cpu_s": opened - began, "epoch_cpu_s": time.process_time() - opened}

    yield measure


@contextmanager
def _evaluations(folder: Path) -> Iterator[Measure]:
    """A process of its own for each, because memory that was once taken may stay."""

    def measure(size: int) -> Sample:
        data = folder / str(size)
        if not data.exists():
            pictures(data, size)
        command = [sys.executable, "-m", "benchmarks.growth.evaluation", str(data)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
        )
        memory, cpu_s = map(float, done.stdout.split())
        return {"memory_bytes": memory, "cpu_s": cpu_s}

    yield measure


@contextmanager
def _probes(folder: Path) -> Iterator[Measure]:
    """ResNet-18 as the frozen backbone; nothing is in the cache when one begins."""
    from training.fine_tune import work
    from training.progress import drive

    torch.set_num_threads(1)
    home = folder / "home"
    publish_resnet(ModelStore(home / "models"))
    data = str(pictures(folder / "pictures", NUM_PICTURES))
    counts = iter(range(1_000_000))

    def measure(size: int) -> Sample:
        shutil.rmtree(home / "cache", ignore_errors=True)
        options: dict[str, Any] = {
            "base": RESNET,
            "dataset": data,
            "hyperparameters": {"epochs": size, "validation": "none"},
        }
        run = folder / f"run-{next(counts)}"
        run.mkdir()
        began = time.process_time()
        drive(work(options, home=home, folder=run, run=run.name))
        return {"cpu_s": time.process_time() - began}

    yield measure


def _write_npz(path: Path, size: int) -> None:
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (size, NUM_FEATURES), dtype=np.uint8)
    y = np.arange(size) % 10
    np.savez(
        path, x_train=x, y_train=y, x_val=x[:100], y_val=y[:100], x_test=x[:100], y_test=y[:100]
    )
