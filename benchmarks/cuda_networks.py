"""What the benchmark of GPUs serves: a ResNet with golden inputs, and a stand-in that computes
nearly nothing, so that what is left is the front."""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import IMAGENET, NUM_CLASSES
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

STUB = "stub"
NUM_GOLDEN = 4


class Stub(nn.Module):
    """The mean of each channel, times a matrix."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3)))


def build(name: str) -> nn.Module:
    """`stub`, or a network of torchvision, with random weights that answer apart."""
    torch.manual_seed(0)
    if name == STUB:
        return Stub(NUM_CLASSES).eval()
    network = networks.build(f"torchvision/{name}", {"num_classes": NUM_CLASSES}).eval()
    with torch.no_grad():
        network.get_submodule("fc").weight.mul_(20)
    return network


def steps(side: int) -> list[dict[str, object]]:
    """ImageNet's preprocessing for pictures of `side` pixels."""
    sizes = {"resize": {"size": side * 256 // 224}, "crop": {"size": [side, side]}}
    return [{**step, **sizes.get(str(step["step"]), {})} for step in IMAGENET]


def publish(home: Path, name: str, side: int) -> None:
    """Under its own name, with golden inputs: without them nothing is rounded."""
    path = f"{__name__}:Stub" if name == STUB else f"torchvision/{name}"
    manifest = Manifest(
        network=NetworkSpec(name=path, options={"num_classes": NUM_CLASSES}),
        preprocessing=Preprocessing(steps=steps(side)),
        labels=tuple(str(number) for number in range(NUM_CLASSES)),
    )
    golden = pixels(NUM_GOLDEN, side)
    ModelStore(home / "models").publish(
        name, lambda folder: checkpoint.save(folder, build(name), manifest, golden)
    )


def pixels(num_rows: int, side: int) -> Tensor:
    """uint8 `[n, 3, side, side]`, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, 3, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
