"""Networks by name: one table of our own, torchvision's by theirs, and an operator's classes.

Names: `mlp`, `cnn`, `torchvision/<network>`, a name that an installed package registers under
the entry point `pytorchlib.networks`, or `package.module:Class`. The last form imports code, so
it is for the command line and for checkpoints that an operator published; whatever takes names
from the network asks `is_registered` first.
"""

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from torch import nn

NETWORKS: Mapping[str, str] = {"mlp": "models.mlp:MLP", "cnn": "models.cnn:CNN"}
ENTRY_POINTS = "pytorchlib.networks"
TORCHVISION = "torchvision/"


class NetworkError(Exception):
    """A network cannot be built."""


class UnknownNetwork(NetworkError):
    """No network goes by this name."""


class BadNetworkOptions(NetworkError):
    """The network does not accept these options."""


def names() -> list[str]:
    """Every registered name, ours first. Imports torchvision (seconds) for its part."""
    from models import backbones

    registered = [point.name for point in entry_points(group=ENTRY_POINTS)]
    return [*NETWORKS, *registered, *(TORCHVISION + name for name in backbones.names())]


def is_registered(name: str) -> bool:
    """Whether `name` can be built without importing code that only its text names."""
    if name in NETWORKS or any(point.name == name for point in entry_points(group=ENTRY_POINTS)):
        return True
    if not name.startswith(TORCHVISION):
        return False
    from models import backbones

    return name.removeprefix(TORCHVISION) in backbones.names()


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network called `name` with freshly initialised weights, in training mode.

    Args:
        name: as in the module's docstring.
        options: keyword arguments of the class; `num_classes` for every classifier.

    Raises:
        UnknownNetwork: no such name; the sentence lists the nearest ones.
        BadNetworkOptions: an option is unknown, missing or out of range.
    """
    if name.startswith(TORCHVISION):
        from models import backbones

        network_class: Any = backbones.build
        options = {"name": name.removeprefix(TORCHVISION), **options}
    else:
        network_class = _class_of(name)
    try:
        network = network_class(**options)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise BadNetworkOptions(f"network {name!r} refuses its options: {error}") from error
    if not isinstance(network, nn.Module):
        raise UnknownNetwork(f"{name!r} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _class_of(name: str) -> Any:
    if name in NETWORKS:
        return _imported(NETWORKS[name])
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            return point.load()
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise UnknownNetwork(f"no network is called {name!r}{hint}")


def _imported(path: str) -> Any:
    module_name, _, class_name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UnknownNetwork(f"cannot import the network {path!r}: {error}") from error
