"""A small convolutional network for small grey or colour pictures (8 to 64 pixels a side).

On a processor, time goes where activations are large. So pictures that can spare it are halved by
the first two convolutions themselves, which also leave the borders out; smaller ones are pooled,
before norm and ReLU, which then touch a quarter of the numbers (the largest of four is the same
before and after ReLU). Widths that are multiples of eight are the cheapest for each filter.
`docs/log.md` has the figures.
"""

import torch
from torch import Tensor, nn

from models.options import refuse_giant, whole_number

STRIDED_FROM = 16
"""Pictures of this side and larger are halved by strides; smaller ones lose too much by them."""


class CNN(nn.Module):
    """Three convolutions with batch norm and one linear layer.

    Args:
        channels: 1 for grey, 3 for colour.
        size: pixels a side; at least 4.
        num_classes: width of the last layer.
        width: filters of the first convolution; the next two have one and a half times and three
            times as many.

    Input float32 `[N, channels, size, size]`, output logits float32 `[N, num_classes]`.

    Raises:
        ValueError: an option is out of its bounds.
    """

    def __init__(self, channels: int, size: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        whole_number("channels", channels, 1, 1024)
        whole_number("size", size, 4, 1024)
        whole_number("num_classes", num_classes, 1, 1 << 17)
        whole_number("width", width, 1, 1024)
        widths = (width, width + (width + 1) // 2, 3 * width)
        is_strided = size >= STRIDED_FROM
        side = ((size - 5) // 2 - 2) // 2 + 1 if is_strided else size // 4
        refuse_giant(widths[2] * side**2 * num_classes)
        body = _strided if is_strided else _pooled
        self.body = body(channels, *widths)
        self.head = nn.Linear(widths[2] * side**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        if self.training and features.requires_grad:
            _keep_layout(features)
        out: Tensor = self.head(features.flatten(1))
        return out


def _keep_layout(features: Tensor) -> None:
    """Let their gradient lie in memory as they do, not as the head flattened them.

    Where the two differ, the way back through the last ReLU took a tenth of a step.
    """
    is_last = features.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    features.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient.contiguous(memory_format=layout)
    )


def _strided(channels: int, first: int, second: int, third: int) -> nn.Sequential:
    """To a quarter of the side, less a border."""
    return nn.Sequential(
        nn.Conv2d(channels, first, 5, stride=2, bias=False),
        *_norm(first),
        nn.Conv2d(first, second, 3, stride=2, bias=False),
        *_norm(second),
        nn.Conv2d(second, third, 3, padding=1, bias=False),
        *_norm(third),
    )


def _pooled(channels: int, first: int, second: int, third: int) -> nn.Sequential:
    """To a quarter of the side."""
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1, bias=False),
        *_norm(first),
        nn.Conv2d(first, second, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        *_norm(second),
        nn.Conv2d(second, third, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        *_norm(third),
    )


def _norm(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(width), nn.ReLU()
