"""A small convolutional network for small grey or colour pictures (8 to 64 pixels a side).

On a processor, time goes where activations are large. So pictures that can spare it are halved by
the first two convolutions themselves, and what is pooled is pooled before its norm and ReLU, which
then touch a quarter of the numbers; the largest of four is the same before and after ReLU.
`docs/log.md` has the figures.
"""

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
        width: filters of the first convolution; the next two have twice and four times as many.

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
        is_strided = size >= STRIDED_FROM
        side = _halved(_halved(size)) // 2 if is_strided else size // 4
        refuse_giant(4 * width * side**2 * num_classes)
        first = (
            (*_convolution(channels, width, 5, 2), *_convolution(width, 2 * width, 3, 2))
            if is_strided
            else (*_convolution(channels, width, 3, 1), *_pooled(width, 2 * width))
        )
        self.body = nn.Sequential(*first, *_pooled(2 * width, 4 * width))
        self.head = nn.Linear(4 * width * side**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).flatten(1))
        return out


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _pooled(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _halved(size: int) -> int:
    """The side after a convolution with a stride of two."""
    return (size + 1) // 2
