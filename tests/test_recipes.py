"""Settings that were found for built-in datasets, and when they are used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from models import networks
from training.__main__ import commands
from training.builtin import NAMES
from training.config import TrainConfig
from training.datasets import open_dataset
from training.progress import drive
from training.recipes import RECIPES, with_recipe
from training.train import network_spec


def test_every_built_in_dataset_has_one() -> None:
    assert set(RECIPES) == set(NAMES)


SHAPES = {
    "digits": (1, 8, 8),
    "mnist": (1, 28, 28),
    "fashion-mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
}


@pytest.mark.parametrize("name", RECIPES)
def test_its_network_takes_pictures_of_that_shape(name: str) -> None:
    pictures = torch.randint(0, 256, (40, *SHAPES[name]), dtype=torch.uint8)
    config = TrainConfig.of(**with_recipe({"dataset": name}))
    dataset = drive(
        open_dataset(config, pairs=[(one, str(i % 10)) for i, one in enumerate(pictures)])
    )
    spec = network_spec(config, dataset)
    logits = networks.build(spec.name, spec.options)(dataset.preprocessing.finish(pictures))
    assert logits.shape == (40, 10)


@pytest.mark.parametrize(
    ("given", "choice", "epochs"),
    [
        ({}, "auto", 12),
        ({"seed": 3}, "auto", 12),
        ({"learning_rate": 0.1}, "auto", 10),
        ({"learning_rate": 0.1}, "fast", 12),
        ({"epochs": 2}, "fast", 2),
        ({}, "none", 10),
    ],
)
def test_it_lies_beneath_what_is_given(given: dict[str, Any], choice: str, epochs: int) -> None:
    config = TrainConfig.of(**with_recipe({"dataset": "digits", **given}, choice))
    assert config.epochs == epochs
    assert given.items() <= config.model_dump().items()


def test_the_command_says_what_a_recipe_is_worth(tmp_path: Path) -> None:
    arguments = ["train", "--recipe", "fast", "--epochs", "1", "--home", str(tmp_path)]
    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code == 0, done.output
    assert f"recipe         {RECIPES['digits'].evidence}" in done.output
    (run,) = (tmp_path / "runs").glob("*/run.json")
    settings = json.loads(run.read_text())["settings"]
    assert (settings["epochs"], settings["augment"]) == (1, "digits")
