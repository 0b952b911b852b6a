"""An exponential moving average of a network's weights, which often answers better than they do."""

import copy

import torch
from torch import Tensor, nn


class Average:
    """The averaged network, in `eval()` and without gradients.

    The decay warms up with the number of steps, so that a short run does not keep the random
    weights that it began with.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    def update(self, network: nn.Module, num_steps: int) -> None:
        """Move towards `network` after its step number `num_steps`, counted from 1."""
        decay = min(self.decay, (1 + num_steps) / (10 + num_steps))
        with torch.no_grad():
            floats, current = _paired(self.network, network, floating=True)
            torch._foreach_lerp_(floats, current, 1 - decay)
            for mine, theirs in zip(*_paired(self.network, network, floating=False), strict=True):
                mine.copy_(theirs)


def _paired(
    first: nn.Module, second: nn.Module, *, floating: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers of both in the same order, those of floating point or the others."""
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(_tensors(first), _tensors(second), strict=True)
        if mine.is_floating_point() == floating
    ]
    return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
