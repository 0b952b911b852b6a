"""The last layers of a network as data: read from the names and shapes of weights, and built again.

A state_dict says which layers have weights, not what stands between them. Places without weights
are filled as the network's own head has them, or else as people fill them: flattened in front, ReLU
behind a layer, dropout behind that (which does nothing when predicting). `Head.assumed` says so.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.options import refuse_giant

KernelSize: TypeAlias = Annotated[int, Field(ge=1, le=64)]
Size: TypeAlias = Annotated[int, Field(ge=1, le=1 << 24)]


class HeadError(ValueError):
    """The weights of a head cannot be understood, or a head cannot be put on a network."""


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Linear(_Layer):
    """Fully connected."""

    layer: Literal["linear"] = "linear"
    inputs: Size
    outputs: Size
    bias: bool = True

    def build(self) -> nn.Module:
        """With fresh weights."""
        return nn.Linear(self.inputs, self.outputs, bias=self.bias)


class Convolution(_Layer):
    """A convolution that answers one number a class at each place; something behind it pools."""

    layer: Literal["convolution"] = "convolution"
    inputs: Size
    outputs: Size
    kernel: tuple[KernelSize, KernelSize] = (1, 1)
    bias: bool = True

    def build(self) -> nn.Module:
        """With fresh weights."""
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, bias=self.bias)


class BatchNorm(_Layer):
    """Batch norm over features."""

    layer: Literal["batch_norm"] = "batch_norm"
    features: Size

    def build(self) -> nn.Module:
        """With fresh weights."""
        return nn.BatchNorm1d(self.features)


class LayerNorm(_Layer):
    """Layer norm over features."""

    layer: Literal["layer_norm"] = "layer_norm"
    features: Size

    def build(self) -> nn.Module:
        """With fresh weights."""
        return nn.LayerNorm(self.features)


class Flatten(_Layer):
    """To one dimension a sample; nothing happens to what is flat."""

    layer: Literal["flatten"] = "flatten"

    def build(self) -> nn.Module:
        """Has no weights."""
        return nn.Flatten(1)


class ReLU(_Layer):
    """Negative numbers become 0."""

    layer: Literal["relu"] = "relu"

    def build(self) -> nn.Module:
        """Has no weights."""
        return nn.ReLU()


class Dropout(_Layer):
    """Zeroes numbers with probability `p` while training."""

    layer: Literal["dropout"] = "dropout"
    p: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def build(self) -> nn.Module:
        """Has no weights."""
        return nn.Dropout(self.p)


class AsBuilt(_Layer):
    """What the network's own head has at the place of this name."""

    layer: Literal["as_built"] = "as_built"


Layer: TypeAlias = Annotated[
    Linear | Convolution | BatchNorm | LayerNorm | Flatten | ReLU | Dropout | AsBuilt,
    Field(discriminator="layer"),
]


class Head(_Layer):
    """What stands at the path `at` of a network.

    Attributes:
        at: path of the part that is replaced, such as `fc` or `classifier.1`.
        layers: name -> layer, in order. The single name "" means that the part is that layer
            itself; anything else means an `nn.Sequential` of children of these names.
    """

    at: str = Field(min_length=1, max_length=256)
    layers: dict[str, Layer] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _check(self) -> Self:
        linear = [one for one in self.layers.values() if isinstance(one, Linear | Convolution)]
        if not linear:
            raise ValueError("a head needs a linear layer or a convolution")
        refuse_giant(sum(one.inputs * one.outputs for one in linear))
        return self

    @property
    def num_classes(self) -> int:
        """Outputs of the last layer with weights."""
        last = [one for one in self.layers.values() if isinstance(one, Linear | Convolution)][-1]
        return last.outputs

    @property
    def assumed(self) -> tuple[str, ...]:
        """Names of the layers that weights do not show and that change the answer."""
        return tuple(name for name, one in self.layers.items() if isinstance(one, ReLU))

    def describe(self) -> str:
        """Such as `fc: Linear(512, 256), ReLU, Linear(256, 5)`."""
        return f"{self.at}: " + ", ".join(_describe(one) for one in self.layers.values())

    def put_on(self, network: nn.Module) -> None:
        """Replace the part of `network` at the path `at`.

        Raises:
            HeadError: there is no such part, or nothing of a wanted name in it.
        """
        owner_path, _, name = self.at.rpartition(".")
        try:
            built = network.get_submodule(self.at)
            owner = network.get_submodule(owner_path)
        except AttributeError:
            raise HeadError(f"the network has no part {self.at!r}") from None
        setattr(owner, name, self._build(built))

    def _build(self, built: nn.Module) -> nn.Module:
        if list(self.layers) == [""]:
            return _build(self.layers[""], built)
        part = nn.Sequential()
        children = dict(built.named_children())
        for name, layer in self.layers.items():
            part.add_module(name, _build(layer, children.get(name)))
        return part


def _build(layer: Layer, built: nn.Module | None) -> nn.Module:
    if not isinstance(layer, AsBuilt):
        return layer.build()
    if built is None:
        raise HeadError("the network's own head has nothing at a place marked as_built")
    return copy.deepcopy(built)


def _describe(layer: Layer) -> str:
    if isinstance(layer, Linear | Convolution):
        return f"{type(layer).__name__}({layer.inputs}, {layer.outputs})"
    return type(layer).__name__


def last_layer(network: nn.Module) -> str:
    """Path of the last layer that has weights, in the order in which the layers were made."""
    paths: list[str] = [
        path for path, part in network.named_modules() if getattr(part, "weight", None) is not None
    ]
    if not paths:
        raise HeadError("the network has no layer with weights")
    return paths[-1]


def enclosing(path: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def read_head(network: nn.Module, state: Mapping[str, Tensor]) -> Head | None:
    """The head that `state` has where it differs from `network`.

    Args:
        network: with its own head, for any number of classes; may be on the meta device.
        state: its weights but for the head, and the head's.

    Returns:
        The smallest part that explains the difference; None where none does, which means that
        the weights are of another network.
    """
    expected = network.state_dict()
    for at in enclosing(last_layer(network)):
        if _outside(expected, at) == _outside(state, at):
            inside = _below(state, at)
            head = _understood(at, inside, network.get_submodule(at))
            if head is not None:
                return head
    return None


def _outside(state: Mapping[str, Tensor], at: str) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if not name.startswith(f"{at}.") and not name.endswith("num_batches_tracked")
    }


def _below(state: Mapping[str, Tensor], at: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of a child (or "" for the part itself) -> its tensors' names and shapes."""
    children: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in state.items():
        if name.startswith(f"{at}."):
            child, _, leaf = name.removeprefix(f"{at}.").rpartition(".")
            children.setdefault(child, {})[leaf] = tuple(tensor.shape)
    return children


def _understood(
    at: str, children: Mapping[str, Mapping[str, tuple[int, ...]]], built: nn.Module
) -> Head | None:
    weighted = {name: _layer_of(shapes) for name, shapes in children.items()}
    layers = {name: layer for name, layer in weighted.items() if layer is not None}
    if not layers or len(layers) < len(weighted) or any("." in name for name in layers):
        return None
    if not isinstance(list(layers.values())[-1], Linear | Convolution):
        return None
    if not _widths_fit(list(layers.values())):
        return None
    if all(name.isdecimal() for name in layers):
        layers = _filled(layers, built)
    return Head(at=at, layers=layers)


def _layer_of(shapes: Mapping[str, tuple[int, ...]]) -> Layer | None:
    """The layer that has tensors of these names and shapes; None where no known one has."""
    weight = shapes.get("weight", ())
    names = set(shapes) - {"num_batches_tracked"}
    bias = "bias" in names
    if names == {"weight", "bias", "running_mean", "running_var"}:
        return BatchNorm(features=weight[0])
    if names - {"bias"} != {"weight"}:
        return None
    match weight:
        case (outputs, inputs):
            return Linear(inputs=inputs, outputs=outputs, bias=bias)
        case (outputs, inputs, height, width):
            return Convolution(inputs=inputs, outputs=outputs, kernel=(height, width), bias=bias)
        case (features,) if bias:
            return LayerNorm(features=features)
        case _:
            return None


def _widths_fit(layers: Sequence[Layer]) -> bool:
    """Whether each layer takes as many numbers as the one before it gives."""
    width = None
    for layer in layers:
        match layer:
            case Linear() | Convolution():
                takes, gives = layer.inputs, layer.outputs
            case BatchNorm() | LayerNorm():
                takes = gives = layer.features
            case _:
                continue
        if width is not None and takes != width:
            return False
        width = gives
    return True


def _filled(weighted: Mapping[str, Layer], built: nn.Module) -> dict[str, Layer]:
    """The whole sequence: the layers with weights and what must stand between them."""
    own = dict(built.named_children()) if isinstance(built, nn.Sequential) else {}
    kept = {name for name, part in own.items() if _is_kept(part, weighted.get(name))}
    last = max(int(name) for name in weighted)
    if weighted.keys() <= own.keys():
        last = max(last, *(int(name) for name in kept), 0)  # squeezenet pools behind its last layer
    layers: dict[str, Layer] = {}
    for name in map(str, range(last + 1)):
        if name in kept:
            layers[name] = AsBuilt()
        elif name in weighted:
            layers[name] = weighted[name]
        else:
            layers[name] = _between(list(layers.values()))
    return layers


def _is_kept(own: nn.Module, found: Layer | None) -> bool:
    """Whether a part of the network's own head stays: it has no weights, or is the same norm."""
    if found is None:
        return not own.state_dict()
    if not isinstance(found, BatchNorm | LayerNorm):
        return False
    own_shapes, shapes = (
        {n: t.shape for n, t in part.state_dict().items()} for part in (own, found.build())
    )
    return own_shapes == shapes


def _between(before: Sequence[Layer]) -> Layer:
    """What stands at a place without weights behind these layers."""
    if not before:
        return Flatten()
    has_weights = isinstance(before[-1], Linear | Convolution | BatchNorm | LayerNorm)
    return ReLU() if has_weights else Dropout()
