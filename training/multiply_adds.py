"""How much a network computes, counted by its layers."""

from typing import Any

import torch
from torch import Tensor, nn


def multiply_adds(network: nn.Module, example: Tensor) -> int:
    """Multiplications with additions of one forward, in all layers that have a matrix of weights.

    Args:
        network: its state stays as it is.
        example: `[n, ...]`, as it takes it.
    """
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        # Each weight of an output channel is used once for each place of that channel.
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += output.numel() // len(weight) * weight.numel()

    layers = [one for one in network.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            network(example)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return total
