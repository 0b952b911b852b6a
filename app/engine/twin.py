"""The eager twin of a live network: the same weights, ready for gradients and hooks.

Explanations need both, and neither may touch what serves: the twin is built anew around the same
tensors, so it costs no memory but its module objects.
"""

from typing import Final

import torch
from torch import Tensor, nn

from app.engine.loading import LoadedVersion
from app.errors import Conflict
from models.checkpoint import network_with
from models.networks import INT8

FINE_SIDE: Final = 7


def twin_of(loaded: LoadedVersion) -> nn.Module:
    """A network of its own with the weights of `loaded`, in `eval()`; takes milliseconds.

    Its ReLUs keep their inputs, which gradients may need.

    Raises:
        Conflict: its layers compute with bytes, through which no gradient goes.
    """
    if loaded.manifest.network.name.startswith(INT8):
        parent = loaded.manifest.lineage.parent or "the version that it was made from"
        raise Conflict(
            f"{loaded.version} computes in int8, which has no gradients; ask {parent} to explain"
        )
    twin = network_with(loaded.manifest, loaded.network.state_dict())
    for module in twin.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010 - the attribute has no type
    return twin


def last_spatial_layer(network: nn.Module, inputs: Tensor) -> nn.Module | None:
    """The last convolution whose map still says where: of 7 x 7 and more, as ImageNet's have.

    Where every map is smaller, the first of the largest; None where there is no convolution.

    Args:
        inputs: what the network takes, `[1, ...]`.
    """
    sides: dict[nn.Module, int] = {}

    def measure(layer: nn.Module, _: object, output: Tensor) -> None:
        sides[layer] = min(output.shape[2:])

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    handles = [layer.register_forward_hook(measure) for layer in layers]
    try:
        with torch.no_grad():
            network(inputs)
    finally:
        for handle in handles:
            handle.remove()
    fine = [layer for layer, side in sides.items() if side >= FINE_SIDE]
    return fine[-1] if fine else max(sides, key=sides.__getitem__, default=None)
