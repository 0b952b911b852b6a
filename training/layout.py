"""How pictures and filters lie in memory: convolutions are faster with the channels last."""

import torch
from torch import Tensor, nn


def layout_of(network: nn.Module) -> torch.memory_format:
    """The layout that suits `network`."""
    convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
    return torch.channels_last if convolves else torch.contiguous_format


def laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """A batch of pictures `[N, C, H, W]` in that layout; anything else stays as it is."""
    return x.contiguous(memory_format=layout) if x.ndim == 4 else x
