"""Weights of a torchvision network, and the options that build the network they fit.

The number of classes, another head, the channels and the picture's size are read from names and
shapes; what these cannot show is taken for granted and said in a note.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones import (
    AUXILIARY,
    PREFIX,
    WITH_AUXILIARY,
    BackboneError,
    build,
    current_names,
    first_convolution,
    names,
)
from models.heads import AsBuilt, Head, last_layer, read_head


@dataclass(frozen=True, slots=True)
class Fitted:
    """Weights together with the options of `build` that they fit.

    Attributes:
        options: keyword arguments of `build` besides the name.
        state: the weights under the names of that network; strictly loadable.
        notes: what was taken for granted or left out, one sentence each.
    """

    options: dict[str, Any]
    state: dict[str, Tensor]
    notes: tuple[str, ...]


def fit(name: str, state: Mapping[str, Tensor]) -> Fitted:
    """Read from names and shapes which `name` it is: classes, head, channels, picture size.

    Args:
        name: one of `names()`.
        state: as `models.state_dicts` reads it.

    Raises:
        BackboneError: the weights are of another network; the sentence names the difference and,
            where one is found, the network that they are of.
        ValueError: torchvision knows no such network.
    """
    name = name.removeprefix(PREFIX)
    network = _on_meta(name, {})
    current = _without_owner(current_names(state), last_layer(network))
    options = _shape_options(network, current)
    if options:
        network = _on_meta(name, options)
    head = read_head(network, current)
    if head is None:
        raise BackboneError(_difference(name, network, current))
    if name.startswith(WITH_AUXILIARY) and "channels" not in options:
        options["transform_input"] = True
    if not _is_own(head, network):
        options["head"] = head.model_dump(mode="json")
    options["num_classes"] = head.num_classes
    notes = tuple(_notes(state, options, head))
    return Fitted(options, _with_batch_counts(current, _on_meta(name, options)), notes)


def _on_meta(name: str, options: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return build(name, **options)


def _with_batch_counts(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """With zeros for the counts of batches, which files from before torch 0.4.1 do not have."""
    zeros = {
        name: torch.zeros((), dtype=torch.int64)
        for name in network.state_dict()
        if name.endswith("num_batches_tracked") and name not in state
    }
    return {**state, **zeros}


def _shape_options(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options that change shapes in front of the head: grey pictures, another picture size."""
    options: dict[str, Any] = {}
    path, own = first_convolution(network)
    kernel = state.get(f"{path}.weight")
    if kernel is None or kernel.ndim != 4:
        return options
    if kernel.shape[1] != own.in_channels:
        options["channels"] = int(kernel.shape[1])
    positions = state.get("encoder.pos_embedding")
    if positions is not None and positions.ndim == 3:
        image_size = math.isqrt(positions.shape[1] - 1) * int(kernel.shape[-1])
        if image_size != getattr(network, "image_size", image_size):
            options["image_size"] = image_size
    return options


def _without_owner(state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """`state` without the name of an object that held the whole network, such as `model.`."""
    first = next(iter(state), "")
    owner, dot, _ = first.partition(".")
    owner += dot
    owned = bool(dot) and all(name.startswith(owner) for name in state)
    if owned and any(name.startswith(owner + head.partition(".")[0]) for name in state):
        return {name.removeprefix(owner): tensor for name, tensor in state.items()}
    return state


def _is_own(head: Head, network: nn.Module) -> bool:
    """Whether `head` is torchvision's but for the number of classes."""
    layer = head.layers.get("")
    if layer is None or head.at != last_layer(network):
        return False
    own = network.get_submodule(head.at).state_dict()
    found = layer.build().state_dict() if not isinstance(layer, AsBuilt) else {}
    return own.keys() == found.keys() and own["weight"].shape[1:] == found["weight"].shape[1:]


def _notes(state: Mapping[str, Tensor], options: Mapping[str, Any], head: Head) -> Iterator[str]:
    if any(key.startswith(AUXILIARY) for key in state):
        yield "the auxiliary classifiers are left out; only training uses them"
    if "head" in options:
        yield f"the head is not torchvision's own: {head.describe()}"
    if head.assumed:
        yield "ReLU is assumed between the head's layers, where weights show nothing"
    if "channels" in options:
        yield f"the first convolution takes {options['channels']} channels"
    if "transform_input" in options:
        yield "transform_input is assumed, as torchvision's published weights of this network need"


def _difference(name: str, network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """The sentence on why `state` is not of `network`."""
    expected = network.state_dict()
    missing = [key for key in expected if key not in state and "num_batches" not in key]
    extra = [key for key in state if key not in expected]
    parts = [
        f"{word} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for word, keys in (("it lacks", missing), ("it also has", extra))
        if keys
    ]
    for key in expected.keys() & state.keys():
        if expected[key].shape != state[key].shape and not parts:
            parts = [f"{key} has shape {list(state[key].shape)}, not {list(expected[key].shape)}"]
    fitting = next((other for other in _relatives(name) if _fits(other, state)), None)
    hint = f"; it fits {PREFIX}{fitting}" if fitting else ""
    return f"the file is not of {PREFIX}{name}: {'; '.join(parts)}{hint}"


def _relatives(name: str) -> list[str]:
    """Networks whose names share their beginning, anywhere: resnet18, resnext50, wide_resnet50."""
    return [other for other in names() if name[:3] in other and other != name]


def _fits(name: str, state: Mapping[str, Tensor]) -> bool:
    network = _on_meta(name, {})
    options = _shape_options(network, state)
    return read_head(_on_meta(name, options) if options else network, state) is not None
