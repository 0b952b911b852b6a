"""Networks by name: one table of our own, torchvision's by theirs, and an operator's classes.

Names: `mlp`, `cnn`, `torchvision/<network>`, a name that an installed package registers under
the entry point `pytorchlib.networks`, or `package.module:Class`; and `int8/` before any of these,
for its form with eight bits. `package.module:Class` imports code, so it is for the command line and
for checkpoints that an operator published; whatever takes names from the network asks
`is_registered` first.
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

from torch import nn

from models.options import whole_number

NETWORKS: Mapping[str, str] = {"mlp": "models.mlp:MLP", "cnn": "models.cnn:CNN"}
ENTRY_POINTS = "pytorchlib.networks"
TORCHVISION = "torchvision/"
INT8 = "int8/"
MAX_CLASSES = 1 << 17


class NetworkError(Exception):
    """A network cannot be built."""


class UnknownNetwork(NetworkError):
    """No network goes by this name."""


class BadNetworkOptions(NetworkError):
    """The network does not accept these options."""


def names() -> list[str]:
    """Every registered name, ours first. Imports torchvision (seconds) for its part."""
    from models import backbones

    return [*NETWORKS, *_registered(), *(TORCHVISION + name for name in backbones.names())]


def is_registered(name: str) -> bool:
    """Whether `name` can be built without importing code that only its text names."""
    name = name.removeprefix(INT8)
    if is_built_in(name):
        return name in NETWORKS or name in names()
    return name in _registered()


def is_built_in(name: str) -> bool:
    """Whether `name` is one of ours or one of torchvision's; it need not exist."""
    name = name.removeprefix(INT8)
    return name in NETWORKS or name.startswith(TORCHVISION)


def require(name: str) -> None:
    """Refuse a name that no network has, before anything slow; builds nothing.

    Raises:
        UnknownNetwork: as `build`.
    """
    _maker_of(name)


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network called `name` with freshly initialised weights, in training mode.

    Args:
        name: as in the module's docstring.
        options: keyword arguments of the class; `num_classes` for every classifier.

    Raises:
        UnknownNetwork: no such name; the sentence lists the nearest ones.
        BadNetworkOptions: an option is unknown, missing or out of range.
    """
    make = _maker_of(name)
    try:
        if "num_classes" in options:
            whole_number("num_classes", options["num_classes"], 1, MAX_CLASSES)
        network = make(**options)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise BadNetworkOptions(f"network {name!r} refuses its options: {error}") from error
    if not isinstance(network, nn.Module):
        raise UnknownNetwork(f"{name!r} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _maker_of(name: str) -> Callable[..., object]:
    if name.startswith(INT8):
        return partial(_int8, name.removeprefix(INT8))
    if name in NETWORKS:
        return _class_at(NETWORKS[name])
    if name.startswith(TORCHVISION):
        return _backbone(name)
    if name in (registered := _registered()):
        return _loaded(registered[name])
    if ":" in name:
        return _class_at(name)
    raise _unknown(name)


def _int8(name: str, **options: Any) -> nn.Module:
    from models.int8_network import int8_form

    if name.startswith(INT8):
        raise _unknown(name)
    return int8_form(build(name, options))


def _backbone(name: str) -> Callable[..., object]:
    from models import backbones

    own_name = name.removeprefix(TORCHVISION)
    if own_name not in backbones.names():
        raise _unknown(name)
    return partial(backbones.build, own_name)


def _registered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _loaded(point: EntryPoint) -> Callable[..., object]:
    try:
        maker = point.load()
    except (ImportError, AttributeError) as error:
        raise UnknownNetwork(
            f"the network {point.name!r} is registered as {point.value} "
            f"and cannot be imported: {error}"
        ) from error
    if not callable(maker):
        raise UnknownNetwork(f"the network {point.name!r} is registered as {maker!r}, not a class")
    return cast("Callable[..., object]", maker)


def _class_at(path: str) -> type[nn.Module]:
    """The class `package.module:Class`; nothing but a network's class is ever called."""
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UnknownNetwork(f"cannot import the network {path!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UnknownNetwork(f"{path!r} is no class of torch.nn.Module")
    return found


def _unknown(name: str) -> UnknownNetwork:
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    there = f"there are {', '.join([*NETWORKS, *_registered()])} and torchvision/resnet18, ..."
    hint = f"; did you mean {', '.join(near)}?" if near else f"; {there}"
    return UnknownNetwork(f"no network is called {name[:80]!r}{hint}")
