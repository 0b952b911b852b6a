"""From nothing to a model that can be asked: trains `digits` once, and writes a picture to send."""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from models.store import ModelStore

NAME: Final = "digits"
PICTURE: Final = "sample-digit.png"
SHOWN: Final = "3"
SHOWN_AT: Final = 128
"""Pixels a side of the picture: eight by eight would be too small to look at."""


def prepare(home: Path) -> Path:
    """Let the store in `home` hold `digits`, and a picture lie beside it.

    Trains where the store holds none (seconds, with progress shown), and writes the picture where
    there is none; a second call does nothing.

    Returns:
        The picture: a real handwritten digit that the model was not trained on.
    """
    from models.store import ModelStore

    store = ModelStore(home / "models")
    if not store.versions(NAME):
        typer.echo("training the model digits, once", err=True)
        _train(store)
    picture = home / PICTURE
    if not picture.exists():
        _write_picture(picture)
    return picture


def _train(store: "ModelStore") -> None:
    from training.config import TrainConfig
    from training.console import follow
    from training.publish import publish
    from training.recipes import with_recipe
    from training.train import train

    config = TrainConfig.of(**with_recipe({"dataset": NAME}))
    trained = follow(train(config))
    version = publish(trained, store, NAME)
    typer.echo(
        f"{version} is right about {trained.report.accuracy:.1%} of its test pictures", err=True
    )


def _write_picture(path: Path) -> None:
    """The most typical three of the test part, enlarged; the preprocessing undoes that."""
    import torch
    from PIL import Image

    from training.config import TrainConfig
    from training.datasets import open_dataset
    from training.progress import drive
    from training.samples import picture_of

    dataset = drive(open_dataset(TrainConfig.of(dataset=NAME)))
    part = dataset.parts[dataset.measured_on]
    indices = (part.targets == dataset.classes.index(SHOWN)).nonzero().flatten().tolist()
    threes = torch.stack([part.samples.read(index)[0] for index in indices])
    distances = (threes - threes.float().mean(0)).square().sum((1, 2, 3))
    picture = picture_of(threes[int(distances.argmin())])
    picture.resize((SHOWN_AT, SHOWN_AT), Image.Resampling.NEAREST).save(path)
