"""The two networks that are served, with random weights: a small perceptron and ResNet-18.

Published into a model store for our own server, and written as plain state_dicts for the peers.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

PERCEPTRON = "perceptron"
RESNET = "resnet"
NUM_CLASSES = 1000
PERCEPTRON_OPTIONS = {"inputs": 784, "hidden": [128, 64], "num_classes": 10}
RESNET_NAME = "torchvision/resnet18"
IMAGENET = [
    {"step": "decode"},
    {"step": "orient"},
    {"step": "color", "mode": "RGB"},
    {"step": "resize", "size": 256},
    {"step": "crop", "size": [224, 224]},
    {"step": "scale"},
    {"step": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
]


def perceptron(seed: int = 0) -> nn.Module:
    """784-128-64-10."""
    torch.manual_seed(seed)
    return networks.build("mlp", PERCEPTRON_OPTIONS).eval()


def resnet(seed: int = 0) -> nn.Module:
    """ResNet-18 for 1000 classes; imports torchvision."""
    torch.manual_seed(seed)
    network = networks.build(RESNET_NAME, {"num_classes": NUM_CLASSES}).eval()
    with torch.no_grad():
        # Random heads answer nearly the same for every class; far apart, a wrong answer shows.
        network.get_submodule("fc").weight.mul_(20)
    return network


def publish_perceptrons(store: ModelStore, names: list[str]) -> None:
    """One perceptron under each name, each with weights of its own; the first has seed 0."""
    for seed, name in enumerate(names):
        manifest = Manifest(
            network=NetworkSpec(name="mlp", options=PERCEPTRON_OPTIONS),
            preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [784]}]),
            labels=tuple("0123456789"),
        )
        _publish(store, name, perceptron(seed), manifest)


def publish_resnet(store: ModelStore, golden_inputs: Tensor | None = None) -> None:
    """ResNet-18 under the name `RESNET`; without golden inputs it is served in fp32 alone."""
    manifest = Manifest(
        network=NetworkSpec(name=RESNET_NAME, options={"num_classes": NUM_CLASSES}),
        preprocessing=Preprocessing(steps=IMAGENET),
        labels=tuple(str(number) for number in range(NUM_CLASSES)),
    )
    _publish(store, RESNET, resnet(), manifest, golden_inputs)


def write_state_dict(network: nn.Module, path: Path) -> Path:
    """For systems that know nothing of our checkpoints; keys as plain torch modules have them."""
    torch.save(network.state_dict(), path)
    return path


def _publish(
    store: ModelStore,
    name: str,
    network: nn.Module,
    manifest: Manifest,
    golden_inputs: Tensor | None = None,
) -> None:
    store.publish(name, lambda folder: checkpoint.save(folder, network, manifest, golden_inputs))
