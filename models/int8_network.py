"""A network whose convolutions and linear layers compute with eight bits.

It is made from the float network by the same steps at calibration and at every load: trace, fold
batch norms, find the layers with what follows them, put an `Int8Layer` into the place of each. So
it needs nothing on disk but its tensors and the name of the float network: `int8/<its name>`.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from models.int8 import Activation, Int8Conv2d, Int8Layer, Int8Linear, Int8MaxPool2d, Place
from models.networks import NetworkError

_RELU: Final = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_RELU6: Final = {nn.ReLU6, F.relu6}
_ADD: Final = {operator.add, operator.iadd, torch.add, "add", "add_"}
_NOTHING: Final = {nn.Identity, nn.Dropout, nn.Dropout2d}


class NotQuantizable(NetworkError):
    """A network has no form with eight bits."""


@dataclass(frozen=True, slots=True)
class Group:
    """A layer of the traced network, with what is computed together with it.

    Attributes:
        path: of the layer.
        layer: where it is called.
        add: where something is added to what it gives, if anything.
        last: the last of layer, add and activation; what it gives is what the group gives.
        activation: which one.
    """

    path: str
    layer: fx.Node
    add: fx.Node | None
    last: fx.Node
    activation: Activation

    @property
    def input(self) -> fx.Node:
        """Where what the layer takes was computed."""
        return _node(self.layer.args[0])

    @property
    def other(self) -> fx.Node | None:
        """Where the other summand was computed."""
        if self.add is None:
            return None
        return next(_node(one) for one in self.add.args if one is not self.layer)

    @property
    def takes(self) -> tuple[fx.Node, ...]:
        return (self.input,) if self.other is None else (self.input, self.other)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def folded(network: nn.Module) -> fx.GraphModule:
    """A traced copy of `network` in `eval()`, its batch norms folded, what does nothing left out.

    Raises:
        NotQuantizable: it cannot be traced.
    """
    from torch.fx.experimental.optimization import fuse

    try:
        graph: fx.GraphModule = fuse(network.eval())  # type: ignore[assignment]
    except Exception as error:
        # Tracing refuses control flow that depends on numbers, with whatever exception it meets.
        raise NotQuantizable(f"the network cannot be traced: {error}") from error
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) in _NOTHING:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph.eval().requires_grad_(False)


def groups_of(graph: fx.GraphModule) -> list[Group]:
    """The layers that eight bits suit, in the order in which they are called.

    A layer whose answer is the network's stays as it is: its numbers are what people read, and it
    costs little. So does one that is called twice: its inputs have no one range.
    """
    modules = dict(graph.named_modules())
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    found: list[Group] = []
    taken: set[fx.Node] = set()
    for node in graph.graph.nodes:
        layer = modules.get(node.target) if node.op == "call_module" else None
        if layer is None or calls.count(node.target) > 1 or not _suits(layer):
            continue
        group = _group(node, modules, taken)
        if any(user.op == "output" for user in group.last.users):
            continue
        found.append(group)
        taken |= {group.layer, group.last} | ({group.add} if group.add else set())
    return found


def _suits(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _group(node: fx.Node, modules: Mapping[str, nn.Module], taken: set[fx.Node]) -> Group:
    add, last = None, node
    after = _only_user(last)
    if after is not None and _is_sum(after, node, modules) and after not in taken:
        add = last = after
        after = _only_user(last)
    activation: Activation = "none"
    kind = _kind(after, modules)
    if after is not None and kind in _RELU | _RELU6:
        activation, last = "relu" if kind in _RELU else "relu6", after
    return Group(str(node.target), node, add, last, activation)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_sum(node: fx.Node, layer: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it adds a second value of the network to what a convolution gives."""
    others = [one for one in node.args if one is not layer]
    return (
        _kind(node, modules) in _ADD
        and type(modules[str(layer.target)]) is nn.Conv2d
        and len(node.args) == 2
        and not node.kwargs
        and len(others) == 1
        and isinstance(others[0], fx.Node)
    )


def _kind(node: fx.Node | None, modules: Mapping[str, nn.Module]) -> Any:
    """The class of a module, the function, or the name of the method that is called."""
    if node is None:
        return None
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target


def int8_form(network: nn.Module) -> nn.Module:
    """The network with an empty `Int8Layer` in the place of each layer that eight bits suit.

    Args:
        network: any; it is not changed.

    Raises:
        NotQuantizable: it cannot be traced, or no layer suits.
    """
    graph = folded(network)
    groups = groups_of(graph)
    if not groups:
        raise NotQuantizable("the network has no layer that eight bits suit")
    bytes_in = _Bytes(graph, groups)
    for group, place in [(group, bytes_in.place(group)) for group in groups]:
        _replace(graph, group, place)
    for path, module in list(graph.named_modules()):
        if Int8MaxPool2d.can_stand_for(module):
            graph.set_submodule(path, Int8MaxPool2d(cast("nn.MaxPool2d", module)))
    graph.graph.lint()
    graph.recompile()
    return graph


class _Bytes:
    """Which values of a traced network are bytes.

    Args:
        graph: what `folded` gave.
        groups: its layers that eight bits suit.
    """

    def __init__(self, graph: fx.GraphModule, groups: Sequence[Group]) -> None:
        modules = dict(graph.named_modules())
        self._pools = {
            node
            for node in graph.graph.nodes
            if node.op == "call_module" and Int8MaxPool2d.can_stand_for(modules[node.target])
        }
        self._taking = {node: one for one in groups for node in (one.layer, one.add) if node}
        self._given = {one.last for one in groups if self._is_taken(one.last)}

    def place(self, group: Group) -> Place:
        """How the group's layer sits in the network."""
        return Place(
            group.activation, self._origin(group.input) in self._given, group.last in self._given
        )

    def _is_taken(self, value: fx.Node) -> bool:
        """Whether everything that takes the value takes it as bytes."""
        return all(
            self._is_taken(user)
            if user in self._pools
            else user in self._taking and value in self._taking[user].takes
            for user in value.users
        )

    def _origin(self, value: fx.Node) -> fx.Node:
        """Before the pooling, which bytes go through."""
        return self._origin(_node(value.args[0])) if value in self._pools else value


def _replace(graph: fx.GraphModule, group: Group, place: Place) -> None:
    graph.set_submodule(group.path, _int8_layer(graph.get_submodule(group.path), place))
    with graph.graph.inserting_after(group.last):
        call = graph.graph.call_module(group.path, group.takes)
    group.last.replace_all_uses_with(call)
    for node in dict.fromkeys((group.last, group.add, group.layer)):
        if node is not None:
            graph.graph.erase_node(node)


def _int8_layer(layer: nn.Module, place: Place) -> Int8Layer:
    if isinstance(layer, nn.Conv2d):
        return Int8Conv2d(layer, place)
    assert isinstance(layer, nn.Linear)
    return Int8Linear(layer, place)


def layers_of(network: nn.Module) -> Iterator[tuple[str, Int8Layer]]:
    """Its layers of eight bits by their paths; none in a float network."""
    return (
        (path, layer) for path, layer in network.named_modules() if isinstance(layer, Int8Layer)
    )
