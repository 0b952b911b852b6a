"""A small convolutional network for small grey or colour pictures (8 to 64 pixels a side)."""

from torch import Tensor, nn

from models.options import refuse_giant, whole_number


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class CNN(nn.Module):
    """Three convolutions with batch norm, two of them pooled, and one linear layer.

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
        features = 4 * width * (size // 4) ** 2
        refuse_giant(features * num_classes)
        self.body = nn.Sequential(
            _stage(channels, width),
            nn.MaxPool2d(2),
            _stage(width, 2 * width),
            nn.MaxPool2d(2),
            _stage(2 * width, 4 * width),
        )
        self.head = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).flatten(1))
        return out
