"""The fully connected network: three layers by default, for vectors and flattened pictures."""

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        inputs: numbers in one sample, after flattening.
        hidden: width of each hidden layer; two of them make three fully connected layers.
        num_classes: width of the last layer.
        dropout: probability of zeroing a hidden number while training.

    Input float32 `[N, inputs]` (further dimensions are flattened), output logits
    float32 `[N, num_classes]`.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = inputs
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = next_width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.flatten(1)))
        return out
