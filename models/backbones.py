"""torchvision's classification networks by their own names, with as many classes as wanted.

torchvision is imported inside the functions: it takes seconds, and only its own networks need it.
Names are torchvision's (`resnet18`); the prefix `torchvision/` is accepted everywhere.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.download import fetch
from models.heads import Head, last_layer
from models.options import probability, whole_number
from models.pairing import import_torchvision
from models.preprocessing import (
    Color,
    Crop,
    Decode,
    Interpolation,
    Normalize,
    Orient,
    Preprocessing,
    Resize,
    Scale,
)
from models.state_dicts import read_state_dict

PREFIX = "torchvision/"
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Second classifiers of googlenet and inception_v3, used in their training only."""
MAX_CHANNELS = 16
MAX_IMAGE_SIZE = 2048
WITH_AUXILIARY = ("googlenet", "inception_v3")
_DENSE_LAYER = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)")
_ENCODER_LAYER = re.compile(r"(.*encoder_layer_\d+\.mlp)\.linear_([12])\.(.*)")


class BackboneError(Exception):
    """Weights cannot be used for this network."""


def names() -> list[str]:
    """torchvision's own names of its classification networks, sorted."""
    models = import_torchvision("torchvision.models")
    found: list[str] = models.list_models(module=models)
    return found


def build(
    name: str,
    num_classes: int = 1000,
    head: Head | Mapping[str, Any] | None = None,
    channels: int = 3,
    **options: Any,
) -> nn.Module:
    """The network `name` with fresh weights; works under `torch.device("meta")`.

    Args:
        name: one of `names()`.
        num_classes: width of the answer.
        head: other last layers than torchvision's; must end in `num_classes` outputs.
        channels: of the pictures; the first convolution is replaced where they are not three.
        options: torchvision's own: `dropout`, `attention_dropout`, `stochastic_depth_prob`,
            `image_size` (vision transformers), `transform_input` (googlenet, inception_v3).

    Returns:
        A network from float32 `[N, channels, H, W]` to logits float32 `[N, num_classes]`, in
        training mode. googlenet and inception_v3 come without their auxiliary classifiers.

    Raises:
        ValueError, TypeError: an unknown name or option, or a head that does not fit.
    """
    models = import_torchvision("torchvision.models")
    name = name.removeprefix(PREFIX)
    whole_number("channels", channels, 1, MAX_CHANNELS)
    _check_options(options)
    if name.startswith(WITH_AUXILIARY):
        options = {"aux_logits": False, "init_weights": False, **options}
    try:
        with _QuickOnMeta():
            network: nn.Module = models.get_model(name, num_classes=num_classes, **options)
    except AssertionError as error:  # torchvision's way to refuse an option
        raise ValueError(str(error)) from None
    if name.startswith("mnasnet"):
        _accept_unversioned_weights(network)
    if channels != 3:
        _take_channels(network, channels)
    if head is not None:
        head = Head.model_validate(head)
        if head.num_classes != num_classes:
            raise ValueError(f"the head has {head.num_classes} outputs for {num_classes} classes")
        head.put_on(network)
    return network


def head_of(name: str) -> str:
    """Path of the last layer of the network `name`, such as `fc` or `classifier.1`."""
    with torch.device("meta"):
        return last_layer(build(name))


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    """Path and layer of the convolution that sees the picture."""
    for path, part in network.named_modules():
        if isinstance(part, nn.Conv2d):
            return path, part
    raise BackboneError("the network has no convolution")


def published_preprocessing(name: str, file_name: str | None = None) -> Preprocessing:
    """What torchvision publishes with its weights of `name`, for pictures in colour.

    Known without a download.

    Args:
        name: one of `names()`.
        file_name: of the weights; those published under this name are meant, else the default
            ones.
    """
    default = _default_weights(name)
    every: Any = type(default)
    known = (one for one in every if one.url.rpartition("/")[2] == file_name)
    transforms = next(known, default).transforms()
    (crop,), (resize,) = transforms.crop_size, transforms.resize_size
    return picture_preprocessing(
        resize, crop, transforms.mean, transforms.std, interpolation=transforms.interpolation.value
    )


def picture_preprocessing(
    resize: int,
    crop: int,
    mean: tuple[float, ...] | list[float],
    std: tuple[float, ...] | list[float],
    interpolation: Interpolation = "bilinear",
) -> Preprocessing:
    """Shorter side to `resize`, a square of `crop` from the centre, 0..1, normalised.

    The number of means decides whether pictures are grey or in colour.
    """
    return Preprocessing(
        steps=(
            Decode(),
            Orient(),
            Color(mode="L" if len(mean) == 1 else "RGB"),
            Resize(size=resize, interpolation=interpolation),
            Crop(size=(crop, crop)),
            Scale(),
            Normalize(mean=tuple(mean), std=tuple(std)),
        )
    )


def imagenet_labels() -> tuple[str, ...]:
    """ImageNet's 1000 class names in the order of every published network's outputs."""
    return tuple(_default_weights("resnet18").meta["categories"])


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the names that torchvision uses today, without auxiliary classifiers.

    torchvision renamed layers of densenet and of the vision transformers after publishing their
    weights, and still reads both.
    """
    return {
        _current_name(name): tensor
        for name, tensor in state.items()
        if not name.startswith(AUXILIARY)
    }


def load_backbone(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy all but the last layer of `state` into `network`.

    Args:
        network: made by `build`, for any number of classes.
        state: weights of the same network with whatever last layer; `models.state_dicts` reads
            them from files.

    Raises:
        BackboneError: a weight is missing or has another shape.
    """
    state = current_names(state)
    head = last_layer(network) + "."
    wanted = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if not name.startswith(head) and not name.endswith("num_batches_tracked")
    }
    for name, tensor in wanted.items():
        if name not in state:
            raise BackboneError(f"the weights are of another network: they have no {name}")
        if state[name].shape != tensor.shape:
            raise BackboneError(
                f"the weights are of another network: {name} has shape "
                f"{list(state[name].shape)} and should have {list(tensor.shape)}"
            )
    network.load_state_dict({name: state[name] for name in wanted}, strict=False)


def fetch_published(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """torchvision's default published weights of `name`, downloaded once and checked.

    Args:
        folder: where they are kept; torch's own cache of downloads unless given.

    Raises:
        models.download.DownloadError: no network and no file, or another hash.
        models.state_dicts.StateDictError: the file cannot be read.
    """
    folder = folder or Path(torch.hub.get_dir()) / "checkpoints"
    return read_state_dict(fetch(_default_weights(name).url, folder))


class _QuickOnMeta(TorchFunctionMode):
    """Makes building on the meta device work for RegNet and quick for all.

    RegNet computes its widths with small tensors, which need numbers. Filling weights that have
    no memory is most of the time of building a network there, and does nothing.
    """

    _FILLING = frozenset(
        getattr(torch.Tensor, name)
        for name in ("uniform_", "normal_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._FILLING and args[0].is_meta:
            return args[0]
        if func in (torch.arange, torch.tensor):
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)


def _check_options(options: Mapping[str, Any]) -> None:
    """A manifest may be a stranger's: only these options, and within bounds."""
    for name, value in options.items():
        if name in ("dropout", "attention_dropout", "stochastic_depth_prob"):
            probability(name, value)
        elif name == "image_size":
            whole_number(name, value, 1, MAX_IMAGE_SIZE)
        elif name != "transform_input":
            raise ValueError(f"{name!r} is no option of torchvision's networks here")
        elif not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")


def _default_weights(name: str) -> Any:
    models = import_torchvision("torchvision.models")
    return models.get_model_weights(name.removeprefix(PREFIX)).DEFAULT


def _take_channels(network: nn.Module, channels: int) -> None:
    path, old = first_convolution(network)
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    owner, _, name = path.rpartition(".")
    setattr(network.get_submodule(owner), name, new)


def _current_name(name: str) -> str:
    if found := _DENSE_LAYER.fullmatch(name):
        return found[1] + found[2]
    if found := _ENCODER_LAYER.fullmatch(name):
        return f"{found[1]}.{3 * (int(found[2]) - 1)}.{found[3]}"
    return name


def _accept_unversioned_weights(network: nn.Module) -> None:
    """MNASNet refuses weights without a mark of their layout, which safetensors cannot carry.

    All but the first published ones have the layout of today.
    """
    parent = type(network)

    class MNASNet(parent):  # type: ignore[misc, valid-type]
        def _load_from_state_dict(self, state: Any, prefix: str, marks: Any, *rest: Any) -> None:
            super()._load_from_state_dict(state, prefix, {"version": 2, **marks}, *rest)

    network.__class__ = MNASNet
