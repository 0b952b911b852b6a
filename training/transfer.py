"""How all layers of a base learn: batch norms stay as they are, lower layers by smaller steps."""

from collections.abc import Callable

from torch import nn

from models.heads import last_layer

NUM_STAGES = 4
"""Into so many stages the layers below the head are cut, each with its own learning rate."""


def train_but_norms(network: nn.Module) -> None:
    """Training mode but for batch norms: a few pictures must not move what millions have set."""
    network.train()
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def scale_by_depth(network: nn.Module, factor: float) -> Callable[[str], float]:
    """The factor of a parameter's learning rate: 1 for the head, 1/`factor` for the lowest stage,
    in equal ratios between (Howard and Ruder, 2018).
    """
    head = last_layer(network) + "."
    names = [name for name, _ in network.named_parameters() if not name.startswith(head)]
    stages = {name: index * NUM_STAGES // len(names) for index, name in enumerate(names)}

    def scale_of(name: str) -> float:
        height = stages.get(name, NUM_STAGES) / NUM_STAGES
        return float(factor ** (height - 1))

    return scale_of
