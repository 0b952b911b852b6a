"""The fully connected network: three layers by default, for vectors and flattened pictures."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from models.options import probability, refuse_giant, whole_number

MAX_LAYERS = 64
MAX_WIDTH = 1 << 17
MAX_INPUTS = 1 << 25


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        inputs: numbers in one sample, after flattening.
        num_classes: width of the last layer.
        hidden: width of each hidden layer; two of them make three fully connected layers.
        dropout: probability of zeroing a hidden number while training.

    Input float32 `[N, inputs]` (further dimensions are flattened), output logits
    float32 `[N, num_classes]`.

    Raises:
        ValueError: an option is out of its bounds.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = _widths(inputs, hidden, num_classes)
        dropout = probability("dropout", dropout)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths[:-1]):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-2], widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.flatten(1)))
        return out


def _widths(inputs: int, hidden: Sequence[int], num_classes: int) -> list[int]:
    if not isinstance(hidden, (list, tuple)) or len(hidden) > MAX_LAYERS:
        raise ValueError(f"hidden must be a list of at most {MAX_LAYERS} widths")
    widths = [
        whole_number("inputs", inputs, 1, MAX_INPUTS),
        *(whole_number("a width in hidden", width, 1, MAX_WIDTH) for width in hidden),
        whole_number("num_classes", num_classes, 1, MAX_WIDTH),
    ]
    refuse_giant(sum((width + 1) * next_width for width, next_width in pairwise(widths)))
    return widths
