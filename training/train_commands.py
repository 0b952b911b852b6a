"""The commands that change weights: train and finetune, and how an interrupted run goes on."""

import json
import re
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from training.commands import HOME, Home, Json, Options, named_values
from training.config import FinetuneConfig, TrainConfig, option_name
from training.options import with_fields
from training.progress import Progress

if TYPE_CHECKING:
    from training.outcome import FineTuned
    from training.ranks import Ranks
    from training.train import Trained

INTERRUPTED: Final = 130
SPLITTING: Final = frozenset({"validation_fraction", "test_fraction"})
"""Options that ask for parts held out instead of a cross-validation."""
RUN_FILE: Final = "run.json"
"""In a run's folder: what it needs to be gone on with."""

Name = Annotated[
    str | None,
    typer.Option("--name", help="Publish the result under this name; else it is only measured."),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Go on with an interrupted run: its folder.")
]
RecipeChoice = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="fast: settings found by experiment for a built-in dataset, beneath those that are "
        "given here. none: the defaults below. auto: fast where nothing of training is given.",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="The backbone's weights: a .pt, .pth or .safetensors file, or the word torchvision.",
    ),
]
Rank = Annotated[int, typer.Option("--rank", envvar="RANK", hidden=True)]
NumRanks = Annotated[int, typer.Option("--world-size", envvar="WORLD_SIZE", hidden=True)]
NumHere = Annotated[int, typer.Option("--local-world-size", envvar="LOCAL_WORLD_SIZE", hidden=True)]
"""What torchrun puts into the environment of each process that it starts."""
Data = Annotated[
    str | None, typer.Option("--data", help="The pictures: a folder with one sub-folder a class.")
]


_CLASS: Final = re.compile(r"[\w.]+:[^\W\d]\w*")
"""`package.module:Class`; what follows the colon of a version is a number."""


class RunUnknown(Exception):
    """The folder holds no run that could be gone on with."""


def train(
    given: dict[str, Any],
    name: Name = None,
    resume: Resume = None,
    option: Options = None,
    recipe: RecipeChoice = "auto",
    home: Home = HOME,
    as_json: Json = False,
    rank: Rank = 0,
    num_ranks: NumRanks = 1,
    num_here: NumHere = 1,
) -> None:
    """Train a network from fresh weights, measure it, and publish it as a version.

    Where only the dataset is named, its recipe is used: settings found by experiment. Any other
    option of training turns that off, and the defaults below hold, unless --recipe says fast.
    """
    from training.recipes import recipe_for, with_recipe
    from training.train import train as run_training

    with _torchrun(rank, num_ranks, num_here) as ranks:
        given |= {"num_processes": num_ranks} if ranks else {}
        said: list[str] = []
        if resume is not None:
            name, settings = _read_run(resume, "train", given)
            config = TrainConfig.of(**settings)
        else:
            given |= {"network_options": named_values(option)} if option else {}
            config = TrainConfig.of(**with_recipe(given, recipe))
            used = recipe_for(given, recipe)
            said += [f"recipe         {used.evidence}"] if used else []
        run = resume or _new_run(home, "train", name, config.model_dump(mode="json"))
        _carry_out(run_training(config, run=run, ranks=ranks), run, name, home, as_json, said)


def finetune(
    given: dict[str, Any],
    weights: Weights = "torchvision",
    data: Data = None,
    name: Name = None,
    resume: Resume = None,
    home: Home = HOME,
    as_json: Json = False,
    rank: Rank = 0,
    num_ranks: NumRanks = 1,
    num_here: NumHere = 1,
) -> None:
    """Give a backbone a new head and train it, on features that are computed once.

    With --unfreeze-epochs the layers below learn too, at smaller rates the lower they are.
    """
    from training.fine_tune import fine_tune
    from training.methods import request_of

    with _torchrun(rank, num_ranks, num_here) as ranks:
        given |= {"num_processes": num_ranks} if ranks else {}
        if resume is not None:
            name, settings = _read_run(resume, "finetune", given)
            weights, validation = settings.pop("weights"), settings.pop("validation")
            config = FinetuneConfig.of(**settings)
        else:
            config = FinetuneConfig.of(**given, **({"dataset": data} if data else {}))
            validation = "split" if given.keys() & SPLITTING else "auto"
        is_version = "/" not in config.backbone and not _CLASS.fullmatch(config.backbone)
        named = None if weights == "torchvision" and is_version else weights
        request = request_of(config, weights=named, validation=validation)
        dumped = {**config.model_dump(mode="json"), "weights": weights, "validation": validation}
        run = resume or _new_run(home, "finetune", name, dumped)
        said: list[str] = []
        loop = _told(fine_tune(request, home, run, ranks=ranks), said)
        _carry_out(loop, run, name, home, as_json, said)


def train_command() -> Any:
    """`train` as typer takes it."""
    return with_fields(train, TrainConfig, flag_of=option_name, without=("network_options",))


def finetune_command() -> Any:
    """`finetune` as typer takes it."""
    return with_fields(finetune, FinetuneConfig, flag_of=option_name)


def _carry_out(
    loop: "Generator[Progress, None, Trained]",
    run: Path,
    name: str | None,
    home: Path,
    as_json: bool,
    said: Sequence[str] = (),
) -> None:
    from training.console import follow
    from training.events import EVENTS, recorded

    try:
        trained = follow(recorded(loop, run / EVENTS), as_json=as_json)
    except KeyboardInterrupt:
        command = json.loads((run / RUN_FILE).read_text())["command"]
        typer.echo(f"\nstopped; go on with:  pytorchlib {command} --resume {run}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    version = _publish(trained, name, home, run)
    figures = trained.report.figures()
    if as_json:
        typer.echo(json.dumps({"version": version, "run": str(run), "metrics": figures}))
        return
    best = trained.fitted.best
    measured_on = trained.measured_on or trained.dataset.measured_on
    typer.echo(f"{measured_on} accuracy  {trained.report.accuracy:.2%}")
    for sentence in said:
        typer.echo(sentence)
    typer.echo(f"best weights   of epoch {best.epoch}, step {best.step}")
    typer.echo(f"training took  {trained.fitted.seconds:.1f} s")
    typer.echo(f"published      {version}" if version else "not published: --name was not given")
    typer.echo(f"curves         tensorboard --logdir {run / EVENTS}")


def _told(
    loop: "Generator[Progress, None, FineTuned]", said: list[str]
) -> "Generator[Progress, None, Trained]":
    """The same loop, which ends with the network; how it was measured is put into `said`."""
    done = yield from loop
    said += [done.validation, *done.notes]
    return done.trained


def _publish(trained: "Trained", name: str | None, home: Path, run: Path) -> str | None:
    if name is None:
        return None
    from models.store import ModelStore
    from training.publish import publish

    return str(publish(trained, ModelStore(home / "models"), name, run=run.name))


def _new_run(home: Path, command: str, name: str | None, settings: Mapping[str, Any]) -> Path:
    """A folder of its own, which says how to go on."""
    if name is not None:
        from models.store import ModelStore

        ModelStore(home / "models").versions(name)  # a name that none can have: told before hours
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    run = home / "runs" / f"{stamp}-{uuid.uuid4().hex[:6]}"
    run.mkdir(parents=True)
    document = {"command": command, "name": name, "settings": dict(settings)}
    (run / RUN_FILE).write_text(json.dumps(document, indent=1))
    return run


@contextmanager
def _torchrun(rank: int, num_ranks: int, num_here: int) -> "Iterator[Ranks | None]":
    """The ranks that torchrun started beside this one, if this is rank 0; any other follows it."""
    if rank > 0:
        from training.torchrun import follow_rank_0

        raise typer.Exit(follow_rank_0(rank, num_ranks))
    if num_ranks < 2:
        yield None
        return
    from training.torchrun import joined

    with joined(num_ranks, num_here) as ranks:
        yield ranks


def _read_run(
    folder: Path, command: str, given: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Name and settings of a run; the number of processes may be another one now."""
    try:
        document = json.loads((folder / RUN_FILE).read_text())
    except (OSError, ValueError):
        raise RunUnknown(f"{folder} holds no run that could be gone on with") from None
    if document["command"] != command:
        raise RunUnknown(f"{folder} is a run of {document['command']}, not of {command}")
    changed = {key: value for key, value in given.items() if key == "num_processes"}
    return document["name"], {**document["settings"], **changed}
