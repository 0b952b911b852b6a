"""Which network a file of weights is of: classes, head, channels and size from its shapes."""

import pytest
import torch
from torch import nn

from models import backbones
from models.backbones import BackboneError
from models.fitting import fit


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return backbones.build(name, **options)


def rebuilt(name: str, fitted) -> nn.Module:
    """The network of the options found, holding the weights found."""
    network = on_meta(name, **fitted.options)
    network.load_state_dict(fitted.state, strict=True, assign=True)
    return network


SMALL = [
    "resnet18",
    "mobilenet_v2",
    "squeezenet1_1",
    "vgg11",
    "vit_b_32",
    "mnasnet0_5",
    "googlenet",
]


@pytest.mark.parametrize("name", SMALL)
def test_the_number_of_classes_is_read(name):
    fitted = fit(name, on_meta(name, num_classes=17).state_dict())
    assert fitted.options["num_classes"] == 17
    assert "head" not in fitted.options
    rebuilt(name, fitted)


@pytest.mark.slow  # eighty networks, about a second each
def test_the_number_of_classes_of_every_network():
    for name in backbones.names():
        fitted = fit(name, on_meta(name, num_classes=17).state_dict())
        assert fitted.options["num_classes"] == 17, name
        assert "head" not in fitted.options, name
        rebuilt(name, fitted)


@pytest.mark.slow  # eighty networks, about a second each
def test_a_sequence_as_last_layer_of_every_network():
    for name in backbones.names():
        network, path = on_meta(name), backbones.head_of(name)
        owner, _, last = path.rpartition(".")
        own = network.get_submodule(path)
        new = nn.Sequential(nn.Dropout(), type(own)(**_sizes(own, num_classes=17)))
        setattr(network.get_submodule(owner), last, new)
        fitted = fit(name, network.state_dict())
        assert fitted.options["num_classes"] == 17, name
        assert fitted.options["head"]["at"] == path, name
        rebuilt(name, fitted)


def _sizes(own: nn.Module, num_classes: int) -> dict[str, int]:
    if isinstance(own, nn.Linear):
        return {"in_features": own.in_features, "out_features": num_classes}
    return {"in_channels": own.in_channels, "out_channels": num_classes, "kernel_size": 1}


def test_a_head_of_the_users_own_answers_as_it_did():
    torch.manual_seed(0)
    theirs = backbones.build("resnet18")
    theirs.fc = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Dropout(0.4), nn.Linear(32, 3))
    fitted = fit("resnet18", theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(rebuilt("resnet18", fitted).eval()(x), theirs.eval()(x))
    assert any("ReLU is assumed" in note for note in fitted.notes)


def test_squeezenet_with_its_whole_head_replaced_still_pools():
    theirs = backbones.build("squeezenet1_1")
    theirs.classifier = nn.Sequential(
        nn.Dropout(), nn.Conv2d(512, 3, 3, padding=0), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1))
    )
    fitted = fit("squeezenet1_1", theirs.state_dict())
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(rebuilt("squeezenet1_1", fitted).eval()(x), theirs.eval()(x))


def test_convnext_keeps_its_norm_where_the_whole_head_was_replaced():
    theirs = backbones.build("convnext_tiny")
    theirs.classifier = nn.Sequential(
        theirs.classifier[0], nn.Flatten(1), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    fitted = fit("convnext_tiny", theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(rebuilt("convnext_tiny", fitted).eval()(x), theirs.eval()(x))


def test_channels_and_picture_size_are_read():
    grey = on_meta("resnet18", num_classes=10, channels=1)
    assert fit("resnet18", grey.state_dict()).options == {"channels": 1, "num_classes": 10}
    large = on_meta("vit_b_32", num_classes=4, image_size=384)
    fitted = fit("vit_b_32", large.state_dict())
    assert fitted.options == {"image_size": 384, "num_classes": 4}
    rebuilt("vit_b_32", fitted)


def test_auxiliary_classifiers_are_left_out():
    from torchvision import models

    with torch.device("meta"):
        full = models.googlenet(num_classes=6, aux_logits=True, init_weights=False)
    fitted = fit("googlenet", full.state_dict())
    assert any("auxiliary" in note for note in fitted.notes)
    rebuilt("googlenet", fitted)


def test_the_name_of_an_owning_object_comes_off():
    state = {f"model.{name}": t for name, t in on_meta("resnet18").state_dict().items()}
    rebuilt("resnet18", fit("resnet18", state))


def test_files_from_before_batches_were_counted():
    state = on_meta("resnet18").state_dict()
    old = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
    rebuilt("resnet18", fit("resnet18", old))


@pytest.mark.parametrize(
    ("name", "other"),
    [("resnet18", "resnet34"), ("resnet50", "wide_resnet50_2"), ("vgg11", "vgg13_bn")],
)
def test_the_right_network_is_named(name, other):
    with pytest.raises(BackboneError, match=f"it fits torchvision/{other}$"):
        fit(name, on_meta(other, num_classes=3).state_dict())


def test_weights_of_no_such_network_name_the_difference():
    with pytest.raises(BackboneError, match=r"it lacks conv1\.weight.*it also has 0\.weight"):
        fit("resnet18", nn.Sequential(nn.Linear(4, 3)).state_dict())
