"""The two networks that are served, with random weights: a small perceptron and ResNet-18.

Published into a model store for our own server, and written as plain state_dicts for the peers.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.networks import INT8
from models.preprocessing import Preprocessing
from models.store import ModelStore
from training.calibration import calibrated
from training.importing import noise
from training.progress import drive

Options = dict[str, Any]
Steps = list[dict[str, Any]]
PERCEPTRON = "perceptron"
RESNET = "resnet"
NUM_CLASSES = 1000
PERCEPTRON_OPTIONS = {"inputs": 784, "hidden": [128, 64], "num_classes": 10}
RESNET_NAME = "torchvision/resnet18"
RESNET_INT8 = "resnet-int8"
BATCH = 32
NUM_CALIBRATION = 64
NUM_GOLDEN = 8
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
    steps = [{"step": "tensor", "shape": [784]}]
    for seed, name in enumerate(names):
        _publish(store, name, perceptron(seed), "mlp", PERCEPTRON_OPTIONS, steps)


def publish_resnet(store: ModelStore, golden_inputs: Tensor | None = None) -> None:
    """ResNet-18 under the name `RESNET`; without golden inputs it is served in fp32 alone."""
    options: Options = {"num_classes": NUM_CLASSES}
    _publish(store, RESNET, resnet(), RESNET_NAME, options, IMAGENET, golden_inputs)


def publish_resnet_forms(store: ModelStore) -> None:
    """ResNet-18 that may be served in any form, and its int8 version, calibrated on noise."""
    pictures = noise(Preprocessing(steps=IMAGENET), NUM_CALIBRATION)
    publish_resnet(store, pictures[:NUM_GOLDEN])
    parent = checkpoint.load(store.resolve(RESNET).folder)
    batches = [parent.manifest.preprocessing.finish(one) for one in pictures.split(BATCH)]
    network = drive(calibrated(parent.network, batches, len(pictures)))
    spec = NetworkSpec(name=INT8 + RESNET_NAME, options=parent.manifest.network.options)
    manifest = parent.manifest.model_copy(update={"network": spec})
    store.publish(
        RESNET_INT8,
        lambda folder: checkpoint.save(folder, network, manifest, pictures[:NUM_GOLDEN]),
    )


def publish_network(
    store: ModelStore, name: str, network: str, options: Options, steps: Steps
) -> None:
    """Any network with random weights, its classes called by their numbers."""
    torch.manual_seed(0)
    _publish(store, name, networks.build(network, options).eval(), network, options, steps)


def write_state_dict(network: nn.Module, path: Path) -> Path:
    """For systems that know nothing of our checkpoints; keys as plain torch modules have them."""
    torch.save(network.state_dict(), path)
    return path


def _publish(
    store: ModelStore,
    name: str,
    network: nn.Module,
    kind: str,
    options: Options,
    steps: Steps,
    golden_inputs: Tensor | None = None,
) -> None:
    manifest = Manifest(
        network=NetworkSpec(name=kind, options=options),
        preprocessing=Preprocessing.model_validate({"steps": steps}),
        labels=tuple(str(number) for number in range(options["num_classes"])),
    )
    store.publish(name, lambda folder: checkpoint.save(folder, network, manifest, golden_inputs))
