"""The commands about models that are there: import, export, evaluate, predict, info.

torch is imported inside the commands, so that `--help` answers at once.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training import spoken
from training.commands import HOME, Device, Home, Json, Options, named_values

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.store import Version
    from training.importing import Imported
    from training.measure import Measured

Model = Annotated[
    str, typer.Option("--model", "-m", help="A model: digits, digits@production or digits:3.")
]
Network = Annotated[
    str,
    typer.Option(help="What the weights are of: torchvision/resnet50, or package.module:Class."),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="A .pt, .pth or .safetensors file with a state_dict; or the word torchvision, for "
        "the weights that are published there.",
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one a line or JSON; ImageNet's are built in."),
]
Resize = Annotated[int | None, typer.Option(min=1, help="Pixels of the shorter side.")]
Crop = Annotated[int | None, typer.Option(min=1, help="Pixels a side, from the centre.")]
Mean = Annotated[
    str | None, typer.Option(help="One number or one a channel, as 0.485,0.456,0.406.")
]
Std = Annotated[str | None, typer.Option(help="The same for the deviations.")]
Channels = Annotated[int | None, typer.Option(min=1, help="1 for grey pictures, 3 for colour.")]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", metavar="SHAPE", help="Numbers come in instead of pictures, as 784 or 1,28,28."
    ),
]
Entry = Annotated[
    str | None, typer.Option(help="The key that holds the weights, in a file with several.")
]
Check = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Labelled pictures, a folder a class; prints the accuracy on them."
    ),
]
Form = Annotated[
    str, typer.Option("--format", help="pt or safetensors: weights; pt2 or onnx: graph.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Where to; MODEL-VERSION.pt if not given.")
]
Data = Annotated[
    str,
    typer.Option(
        "--dataset",
        "--data",
        help="A folder of class folders, a CSV or NPZ file, or digits, mnist, fashion-mnist, "
        "cifar10.",
    ),
]
DataRoot = Annotated[str, typer.Option(help="Where downloaded datasets lie.")]
LabelColumn = Annotated[str, typer.Option(help="The CSV column that holds the label.")]
Part = Annotated[
    str | None,
    typer.Option(help="train, validation or test; what figures come from if not given."),
]
Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Pictures to look at.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="How many classes to name.")]


def import_model(
    weights: Weights,
    network: Network,
    name: Annotated[str, typer.Option(help="What the model will be called.")],
    labels: Labels = None,
    resize: Resize = None,
    crop: Crop = None,
    mean: Mean = None,
    std: Std = None,
    channels: Channels = None,
    input_shape: Input = None,
    option: Options = None,
    entry: Entry = None,
    check: Check = None,
    device: Device = "auto",
    home: Home = HOME,
) -> None:
    """Publish a state_dict as a model: only tensors are read from the file, never code.

    The number of classes and the form of the head are read from the weights. The preprocessing
    that is assumed is printed: torchvision's published one for the network, unless the options
    say otherwise. --check shows at once whether it is the right one.
    """
    shape = _numbers("--input", input_shape, int)
    means, stds = _numbers("--mean", mean, float), _numbers("--std", std, float)
    options = named_values(option or [])
    _make_findable(network)

    from models.store import ModelStore
    from training import importing
    from training.assumed import PictureOptions

    request = importing.ImportRequest(
        weights=weights,
        network=network,
        labels=labels,
        pictures=PictureOptions(resize, crop, means, stds, channels, shape),
        options=options,
        entry=entry,
    )
    imported = importing.read_import(request)
    _say(spoken.of_import(imported.manifest, imported.notes))
    measured = _measured(imported, str(check), device) if check else None
    store = ModelStore(home / "models")
    version = importing.publish(imported, store, name, measured)
    typer.echo(f"published      {version}")
    if store.aliases(name).get("production") != version.number:
        typer.echo(f"               {name}@production stays at {store.resolve(name)}")


def export_model(
    model: Model,
    form: Form = "pt",
    output: Output = None,
    home: Home = HOME,
) -> None:
    """Write a model as a file: its weights, or with pt2 and onnx the network with them.

    A graph is checked first: it must answer the model's golden inputs, and batches of 1 and 3, as
    the model does. It takes pictures that are preprocessed already.
    """
    from training.export import GRAPHS, SUFFIXES, export, how_to_load

    version, checkpoint = _loaded(home, model)
    path = output or Path(f"{version.name}-{version.number}{SUFFIXES.get(form, '')}")
    export(checkpoint, path, form)
    what = "graph" if form in GRAPHS else "weights"
    typer.echo(f"{path}: the {what} of {version}, {checkpoint.manifest.network.name}")
    if form not in GRAPHS and (lines := how_to_load(checkpoint, path)):
        typer.echo(lines)


def quantize_model(
    model: Model,
    dataset: Data,
    name: Annotated[
        str | None, typer.Option(help="Publish under another name than the model's own.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=10_000, help="How many samples to look at.")
    ] = 256,
    data_root: DataRoot = "data",
    label_column: LabelColumn = "",
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Publish a version that computes with eight bits, smaller and quicker on processors.

    Samples of the training part are looked at; what the rounding costs is measured on the part that
    is held out. Where that has 200 samples or more, 98 % of them must get the same class as before.
    """
    from models.store import ModelStore
    from training.config import DataConfig
    from training.console import follow
    from training.quantize import HELD_OUT, publish, quantize

    version, checkpoint = _loaded(home, model)
    config = DataConfig.of(
        dataset=dataset,
        data_root=data_root,
        label_column=label_column,
        validation_fraction=0,
        test_fraction=HELD_OUT,
    )
    loop = quantize(version, checkpoint, config, samples)
    quantized = follow(loop, as_json=as_json)
    made = publish(quantized, ModelStore(home / "models"), name or version.name)
    if as_json:
        facts = {"model": made.name, "version": made.number, "parent": str(version)}
        typer.echo(_json({**facts, **quantized.manifest.metrics}))
    else:
        _say(spoken.of_quantization(quantized))
        typer.echo(f"published    {made}")


def evaluate_model(
    model: Model,
    dataset: Data,
    data_root: DataRoot = "data",
    label_column: LabelColumn = "",
    part: Part = None,
    device: Device = "auto",
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Measure a model on labelled samples: accuracy, per-class figures, calibration.

    A dataset with parts of its own is measured on its test part. One that the model learned from is
    measured on the part that was held out then; of any other one, everything.
    """
    from training.measure import whole

    version, checkpoint = _loaded(home, model)
    config = whole(dataset, data_root=data_root, label_column=label_column)
    measured = _driven(checkpoint.network, checkpoint.manifest, config, device, part, as_json)
    if as_json:
        typer.echo(_json({"model": version.name, "version": version.number, **_facts(measured)}))
    else:
        typer.echo(f"{version} on {measured.where}")
        _say(measured.notes)
        _say(spoken.of_report(measured.report))


def predict_model(
    model: Model,
    files: Files,
    top_k: TopK = 3,
    device: Device = "auto",
    as_json: Json = False,
    home: Home = HOME,
) -> None:
    """Say what is in pictures (or files of numbers), without a server."""
    from models.device import choose_device
    from training.predict import predict_files

    version, checkpoint = _loaded(home, model)
    faults = 0
    for one in predict_files(checkpoint, files, choose_device(device), top_k):
        faults += one.fault is not None
        if as_json:
            about = {"model": version.name, "version": version.number}
            typer.echo(_json({**one.to_json(), **about}))
        elif one.fault is not None:
            typer.echo(f"{one.file}: {one.fault}", err=True)
        else:
            guesses = ", ".join(f"{guess.label} {guess.probability:.1%}" for guess in one.best)
            typer.echo(f"{one.file}: {guesses}")
    if faults:
        raise typer.Exit(1)


def info(as_json: Json = False) -> None:
    """Check the installation: versions, devices, and a number computed on each."""
    from training.info import gather

    found = gather()
    if as_json:
        typer.echo(_json(found.to_json()))
    else:
        _say(spoken.of_info(found))
    if found.fault is not None:
        typer.echo(found.fault, err=True)
        raise typer.Exit(1)


def _loaded(home: Path, model: str) -> "tuple[Version, Checkpoint]":
    """A version and its network, with as many threads as this process may use."""
    import torch

    from models.checkpoint import load
    from models.device import thread_count
    from models.store import ModelStore

    version = ModelStore(home / "models").resolve(model)
    torch.set_num_threads(thread_count())
    return version, load(version.folder)


def _measured(imported: "Imported", folder: str, device: str) -> "Measured":
    from training.measure import whole

    found = _driven(imported.network, imported.manifest, whole(folder), device)
    _say(spoken.of_check(found))
    return found


def _driven(
    network: Any,
    manifest: Any,
    config: Any,
    device: str,
    part: str | None = None,
    as_json: bool = False,
) -> "Measured":
    from models.device import choose_device
    from training.console import follow
    from training.measure import measure

    loop = measure(network, manifest, config, choose_device(device), part)
    return follow(loop, as_json=as_json)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def _facts(measured: "Measured") -> dict[str, Any]:
    return {
        "dataset": measured.dataset,
        "part": measured.part,
        "where": measured.where,
        "notes": measured.notes,
        "report": measured.report.to_json(),
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _numbers(option: str, text: str | None, kind: type[Any]) -> tuple[Any, ...] | None:
    """`0.1,0.2` as numbers."""
    if text is None:
        return None
    try:
        return tuple(kind(one) for one in text.replace("x", ",").split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{option} takes numbers with commas between, not {text!r}"
        ) from None


def _make_findable(network: str) -> None:
    """An operator's own class may lie in the folder where the command is run."""
    if ":" in network and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
