"""torchvision's networks: built for any classes, with torchvision's own preprocessing."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models import backbones, networks
from models.backbones import BackboneError, load_backbone, published_preprocessing

LAST_LAYERS = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_1": "classifier.1",
    "mnasnet0_5": "classifier.1",
    "shufflenet_v2_x0_5": "fc",
}


@pytest.mark.parametrize("name", list(LAST_LAYERS))
def test_small_networks_answer_for_the_wanted_classes(name):
    network = networks.build(f"torchvision/{name}", {"num_classes": 5}).eval()
    with torch.inference_mode():
        assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    assert backbones.head_of(name) == LAST_LAYERS[name]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_second_classifiers_train_as_others_do(name):
    network = backbones.build(name, num_classes=4).train()
    assert network(torch.randn(2, 3, 96, 96)).shape == (2, 4)


@pytest.mark.slow  # eighty networks, about a second each
def test_every_network_is_built_without_memory():
    for name in backbones.names():
        with torch.device("meta"):
            network = backbones.build(name, num_classes=7)
        assert all(tensor.is_meta for tensor in network.parameters()), name
        last = network.get_submodule(backbones.head_of(name))
        assert isinstance(last, nn.Linear | nn.Conv2d), name
        assert last.weight.shape[0] == 7, name
        published_preprocessing(name)


def test_grey_pictures():
    network = backbones.build("resnet18", num_classes=3, channels=1).eval()
    assert network(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    assert network.conv1.stride == (2, 2)


def test_unknown_names_and_options_are_named_errors():
    with pytest.raises(networks.UnknownNetwork, match="torchvision/resnet18"):
        networks.build("torchvision/resnet19", {"num_classes": 2})
    with pytest.raises(networks.BadNetworkOptions, match="colour"):
        networks.build("torchvision/resnet18", {"num_classes": 2, "colour": "red"})
    with pytest.raises(networks.BadNetworkOptions, match="image_size must be a whole number"):
        networks.build("torchvision/vit_b_32", {"num_classes": 2, "image_size": 1 << 30})
    head = {"at": "fc", "layers": {"": {"layer": "linear", "inputs": 512, "outputs": 3}}}
    with pytest.raises(networks.BadNetworkOptions, match="3 outputs for 2 classes"):
        networks.build("torchvision/resnet18", {"num_classes": 2, "head": head})


def test_mnasnet_takes_weights_from_safetensors():
    network = backbones.build("mnasnet0_5", num_classes=2)
    other = copy.deepcopy(network)
    other.load_state_dict(dict(network.state_dict()), strict=True)


@pytest.mark.parametrize("size", [(500, 375), (231, 400), (64, 64)])
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "efficientnet_v2_l", "swin_t"])
def test_published_preprocessing_is_torchvisions(name, size):
    from torchvision import models

    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((size[1] // 2, size[0] // 2))
    theirs = models.get_model_weights(name).DEFAULT.transforms()(picture)
    steps = published_preprocessing(f"torchvision/{name}")
    ours = steps.finish(steps.picture(picture).unsqueeze(0))[0]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_published_preprocessing_of_an_older_file():
    older = published_preprocessing("resnet50", "resnet50-0676ba61.pth")
    assert [step.size for step in older.steps if step.step == "resize"] == [256]
    other = published_preprocessing("resnet50", "best.pth")
    assert other == published_preprocessing("resnet50")


def test_imagenet_labels():
    labels = backbones.imagenet_labels()
    assert len(labels) == 1000
    assert labels[309:311] == ("bee", "ant")


def test_a_backbone_is_loaded_all_but_the_last_layer():
    published = backbones.build("resnet18", num_classes=1000)
    network = backbones.build("resnet18", num_classes=2)
    before = network.fc.weight.clone()
    load_backbone(network, published.state_dict())
    assert torch.equal(network.layer4[1].conv2.weight, published.layer4[1].conv2.weight)
    assert torch.equal(network.bn1.running_var, published.bn1.running_var)
    assert torch.equal(network.fc.weight, before)


def test_weights_of_another_network_load_nothing():
    network = backbones.build("resnet18", num_classes=2)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(BackboneError, match=r"conv1.weight has shape|have no layer"):
        load_backbone(network, backbones.build("resnet34", channels=1).state_dict())
    with pytest.raises(BackboneError, match="have no conv1.weight"):
        load_backbone(network, backbones.build("squeezenet1_1").state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_older_names_of_layers_are_understood():
    names = ["features.denseblock1.denselayer2.norm.1.weight", "aux1.fc1.weight"]
    names += ["encoder.layers.encoder_layer_3.mlp.linear_2.bias", "fc.weight"]
    current = backbones.current_names({name: torch.zeros(1) for name in names})
    assert list(current) == [
        "features.denseblock1.denselayer2.norm1.weight",
        "encoder.layers.encoder_layer_3.mlp.3.bias",
        "fc.weight",
    ]
