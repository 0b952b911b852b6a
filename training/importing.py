"""Weights that somebody arrives with become a version in the model store.

What the file shows (classes, head, channels) is read from it; what it cannot show (preprocessing,
labels) is taken from torchvision or from the person, and said in words.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import checkpoint, networks
from models.checkpoint import network_with, sha256_of
from models.manifest import Lineage, Manifest, NetworkSpec
from models.networks import TORCHVISION
from models.preprocessing import Preprocessing
from models.state_dicts import read_state_dict
from models.store import ModelStore, Version
from training.assumed import PictureOptions, assumed_preprocessing
from training.labels import labels_for
from training.measure import Measured
from training.state import environment

PUBLISHED = "torchvision"
"""Instead of a file: the weights that torchvision publishes for the network."""
METHOD = "import"
NUM_GOLDEN = 2
_FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError)
"""What a network raises that is given inputs of a shape that it does not take."""


class ImportRefused(Exception):
    """The weights cannot become a model."""


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import.

    Attributes:
        weights: a `.pt`, `.pth` or `.safetensors` file, or the word `torchvision`.
        network: as `models.networks` knows it; `package.module:Class` too.
        labels: a file of class names.
        pictures: what is said about the preprocessing.
        options: of the network's class; torchvision's networks need none.
        entry: the key that holds the weights, in a file with several.
    """

    weights: str
    network: str
    labels: Path | None = None
    pictures: PictureOptions = PictureOptions()
    options: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """A network with its weights, not yet published.

    Attributes:
        network: in `eval()`, in fp32, on the CPU.
        manifest: without metrics, digest and files.
        notes: what was taken for granted, one sentence each.
    """

    network: nn.Module
    manifest: Manifest
    notes: tuple[str, ...]


def read_import(request: ImportRequest) -> Imported:
    """Read the weights, build their network and try it once.

    Raises:
        ImportRefused: the network does not take such pictures, or its answers are not logits.
        models.state_dicts.StateDictError, models.download.DownloadError: of the file.
        models.backbones.BackboneError, models.checkpoint.WeightsMismatch: another network's.
        models.networks.NetworkError: no such network, or not with these options.
        training.assumed.PictureOptionsInvalid, training.labels.LabelsInvalid: what was said.
    """
    if request.network.startswith(TORCHVISION):
        draft = _of_torchvision(request)
    else:
        draft = _of_a_class(request)
    state = _in_fp32(draft.state)
    labels = labels_for(request.labels, draft.num_classes)
    manifest = Manifest(
        network=draft.spec,
        preprocessing=draft.preprocessing,
        labels=labels,
        lineage=_lineage(request),
    )
    network = network_with(manifest, state)
    _try(network, manifest)
    return Imported(network, manifest, draft.notes)


def find_import(store: ModelStore, name: str, request: ImportRequest) -> Version | None:
    """The version of `name` that the very same request made before; None where there is none.

    Reads the file once, for its hash, and imports nothing slow: a server that is started again
    with the same file is ready at once.
    """
    asked = _lineage(request).options
    for number in reversed(store.versions(name)):
        version = store.version(name, number)
        lineage = version.manifest().lineage
        if lineage.method == METHOD and lineage.options == asked:
            return version
    return None


def publish(
    imported: Imported, store: ModelStore, name: str, measured: Measured | None = None
) -> Version:
    """Publish as the next version of the model `name`; the same weights again change nothing.

    Args:
        measured: what a check found; its figures go into the manifest, and samples of it are the
            golden inputs.

    Raises:
        models.store.StoreError: the store refuses.
    """
    manifest = imported.manifest
    golden = noise(manifest.preprocessing, NUM_GOLDEN)
    if measured is not None:
        figures = {**measured.report.figures(), "measured_on": measured.dataset}
        manifest = manifest.model_copy(update={"metrics": figures})
        golden = measured.sample
    imported.network.to("cpu")

    def write(folder: Path) -> None:
        checkpoint.save(folder, imported.network, manifest, golden)

    return store.publish(name, write, why="imported")


def noise(preprocessing: Preprocessing, num: int) -> Tensor:
    """Inputs that look like nothing, the same at every call: `[num, *raw_shape]`."""
    shape = (num, *preprocessing.raw_shape)
    generator = torch.Generator().manual_seed(0)
    if preprocessing.accepts_pictures:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True, slots=True)
class _Draft:
    spec: NetworkSpec
    state: Mapping[str, Tensor]
    preprocessing: Preprocessing
    num_classes: int
    notes: tuple[str, ...] = ()


def _of_torchvision(request: ImportRequest) -> _Draft:
    # torchvision takes seconds to import, and only its own networks need it.
    from models import backbones
    from models.fitting import fit

    networks.require(request.network)
    if request.weights == PUBLISHED:
        state = backbones.fetch_published(request.network)
    else:
        state = read_state_dict(Path(request.weights), request.entry)
    fitted = fit(request.network, state)
    options = {**fitted.options, **request.options}
    with torch.device("meta"):
        network = networks.build(request.network, options)
    preprocessing = assumed_preprocessing(
        request.pictures,
        backbones.published_preprocessing(request.network, Path(request.weights).name),
        options.get("channels", 3),
        getattr(network, "image_size", None),
    )
    spec = NetworkSpec(name=request.network, options=options)
    return _Draft(spec, fitted.state, preprocessing, options["num_classes"], fitted.notes)


def _of_a_class(request: ImportRequest) -> _Draft:
    if request.weights == PUBLISHED:
        raise ImportRefused(f"torchvision publishes no weights for {request.network}; name a file")
    state = read_state_dict(Path(request.weights), request.entry)
    num_classes = _last_width(state)
    options = _with_classes(request, num_classes)
    preprocessing = assumed_preprocessing(request.pictures, None, options.get("channels"))
    spec = NetworkSpec(name=request.network, options=options)
    return _Draft(spec, state, preprocessing, num_classes)


def _with_classes(request: ImportRequest, num_classes: int) -> dict[str, Any]:
    """The options, and the number of classes where nothing is said and the class takes it."""
    options = dict(request.options)
    if "num_classes" in options:
        return options
    try:
        with torch.device("meta"):
            networks.build(request.network, {**options, "num_classes": num_classes})
    except networks.BadNetworkOptions as error:
        if "num_classes" not in str(error):
            raise  # one of the options is at fault, and not that the class takes no number
        return options
    return {**options, "num_classes": num_classes}


def _last_width(state: Mapping[str, Tensor]) -> int:
    """Outputs of the last layer: rows of the last matrix or convolution that was saved."""
    for tensor in reversed(list(state.values())):
        if tensor.ndim in (2, 4):
            return int(tensor.shape[0])
    raise ImportRefused("the weights have no linear layer and no convolution")


def _in_fp32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point weights as float32; refused where a number is not finite."""
    found = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor = tensor.float()
            if not bool(tensor.isfinite().all()):
                raise ImportRefused(f"{name} holds numbers that are not finite")
        found[name] = tensor
    return found


def _try(network: nn.Module, manifest: Manifest) -> None:
    """One forward, so that what cannot answer is never published."""
    preprocessing, num_labels = manifest.preprocessing, len(manifest.labels)
    inputs = preprocessing.finish(noise(preprocessing, NUM_GOLDEN))
    try:
        with torch.inference_mode():
            logits = network(inputs)
    except _FORWARD_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ImportRefused(
            f"{manifest.network.name} does not take inputs of shape "
            f"{list(preprocessing.input_shape)}: {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (NUM_GOLDEN, num_labels):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ImportRefused(
            f"{manifest.network.name} answers {NUM_GOLDEN} inputs with {shape}; "
            f"one row of {num_labels} numbers each is needed"
        )


def _lineage(request: ImportRequest) -> Lineage:
    """Where the weights come from, and everything that was asked."""
    is_file = request.weights != PUBLISHED
    asked: dict[str, Any] = {
        "weights": Path(request.weights).name,
        "sha256": _sha256(Path(request.weights)) if is_file else None,
        "network": request.network,
        "labels_sha256": _sha256(request.labels) if request.labels else None,
        "pictures": _plain(asdict(request.pictures)),
        "options": _plain(request.options),
        "entry": request.entry,
    }
    return Lineage(method=METHOD, options=asked, environment=environment())


def _sha256(path: Path) -> str | None:
    """Of a file; None where it cannot be read, which its reader explains."""
    try:
        return sha256_of(path)
    except OSError:
        return None


def _plain(values: Any) -> Any:
    """As the values come back from JSON."""
    return json.loads(json.dumps(values))
