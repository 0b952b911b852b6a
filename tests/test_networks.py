"""Networks by name: what each computes, what it refuses, where an operator's classes come from."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import networks
from models.networks import BadNetworkOptions, UnknownNetwork

OWN = {
    "mlp": ({"inputs": 12, "num_classes": 5, "hidden": [7, 6], "dropout": 0.1}, (12,)),
    "cnn": ({"channels": 3, "size": 9, "num_classes": 5, "width": 4}, (3, 9, 9)),
}
own_names = pytest.mark.parametrize("name", OWN)


class Doubler(nn.Module):
    """A class of the operator's own, named by its path."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.num_classes = num_classes


def ran() -> None:
    pytest.fail("a function that only a name pointed to was called")


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    options, shape = OWN[name]
    torch.manual_seed(0)
    return networks.build(name, options), torch.randn(4, *shape)


def test_every_own_name_is_tried_here() -> None:
    assert set(OWN) == set(networks.NETWORKS)


@own_names
def test_answers_one_logit_a_class(name: str) -> None:
    network, x = built(name)
    out = network(x)
    assert out.shape == (4, 5)
    assert out.dtype == torch.float32


@own_names
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network, x = built(name)
    network(x).square().sum().backward()
    silent = [key for key, value in network.named_parameters() if value.grad is None]
    assert network.training
    assert not silent


@own_names
def test_a_state_dict_carries_everything_over(name: str) -> None:
    network, x = built(name)
    network(x)  # moves the running statistics
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    twin = networks.build(name, OWN[name][0])
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(network.eval()(x), twin.eval()(x))


@own_names
def test_takes_no_memory_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        network = networks.build(name, OWN[name][0])
    assert all(tensor.is_meta for tensor in network.state_dict().values())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_come_to_the_last_relu_as_its_answers_lie(layout: torch.memory_format) -> None:
    network = networks.build("cnn", {"channels": 1, "size": 8, "num_classes": 10}).to(
        memory_format=layout
    )
    last, came = list(network.body)[-1], []
    last.register_full_backward_hook(lambda _, __, outer: came.append(outer[0].stride()))
    answers = last.register_forward_hook(lambda _, __, found: came.append(found.stride()))
    x = torch.rand(4, 1, 8, 8).contiguous(memory_format=layout)
    network(x).square().sum().backward()
    answers.remove()
    assert came[0] == came[1]


def test_mlp_has_three_layers_by_default_and_flattens() -> None:
    network = networks.build("mlp", {"inputs": 12, "num_classes": 2})
    assert sum(isinstance(layer, nn.Linear) for layer in network.modules()) == 3
    assert network(torch.zeros(1, 3, 2, 2)).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("mlp", {"inputs": 0}, "inputs must be a whole number from 1"),
        ("mlp", {"inputs": "12"}, "not '12'"),
        ("mlp", {"inputs": True}, "not True"),
        ("mlp", {"inputs": 1.5}, "not 1.5"),
        ("mlp", {"hidden": 5}, "hidden must be a list"),
        ("mlp", {"hidden": [8, -1]}, "a width in hidden must be"),
        ("mlp", {"hidden": ["x" * 1000]}, "not 'xxxxxxxxx"),
        ("mlp", {"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ("mlp", {"dropout": float("nan")}, "not nan"),
        ("mlp", {"colour": "red"}, "unexpected keyword argument 'colour'"),
        ("cnn", {"size": 3}, "size must be a whole number from 4"),
        ("cnn", {"channels": None}, "channels must be"),
        ("cnn", {"num_classes": 0}, "num_classes must be a whole number from 1"),
    ],
)
def test_refuses_an_option_with_a_sentence(
    name: str, change: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadNetworkOptions, match=f"'{name}' refuses its options: ") as refusal:
        networks.build(name, {**OWN[name][0], **change})
    assert sentence in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mlp", {"hidden": [10**9] * 1000}),
        ("mlp", {"hidden": [10**9]}),
        ("mlp", {"hidden": [100_000, 100_000]}),
        ("mlp", {"num_classes": 10**12}),
        ("cnn", {"size": 10**6}),
        ("cnn", {"size": 1024, "width": 1024, "num_classes": 100_000}),
    ],
)
def test_a_giant_is_refused_before_it_takes_memory(name: str, change: dict[str, Any]) -> None:
    class Allocated(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            raise AssertionError(f"{func} was called")

    with Allocated(), pytest.raises(BadNetworkOptions):
        networks.build(name, {**OWN[name][0], **change})


def test_a_missing_option_is_named() -> None:
    with pytest.raises(BadNetworkOptions, match="num_classes"):
        networks.build("mlp", {"inputs": 3})


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(UnknownNetwork, match="did you mean cnn"):
        networks.build("cnnn", {})
    with pytest.raises(UnknownNetwork, match="torchvision/resnet18"):
        networks.build("torchvision/resnet19", {})
    with pytest.raises(UnknownNetwork, match="there are mlp, cnn and torchvision"):
        networks.build("zzzzzzzzzzzz", {})


def test_torchvisions_networks_go_by_their_own_names() -> None:
    with torch.device("meta"):
        network = networks.build("torchvision/resnet18", {"num_classes": 3})
    assert network.fc.weight.shape == (3, 512)
    with pytest.raises(BadNetworkOptions, match="num_classes must be a whole number"):
        networks.build("torchvision/resnet18", {"num_classes": 10**12})


def test_names_holds_all_three_kinds() -> None:
    assert {"mlp", "cnn", "torchvision/resnet18"} <= set(networks.names())


def test_a_class_by_its_path() -> None:
    network = networks.build(f"{__name__}:Doubler", {"num_classes": 7})
    assert isinstance(network, Doubler)
    assert network.num_classes == 7
    assert not networks.is_registered(f"{__name__}:Doubler")


@pytest.mark.parametrize(
    "name",
    [
        f"{__name__}:ran",  # a function: its name must not be enough to call it
        "os:system",
        "builtins:exec",
        "torch:nn",
        "torch.nn:NoSuchLayer",
        "no.such.module:Network",
        ":Network",
        ".relative:Network",
        "json:",
        "a:b:c",
        "mlp:MLP",
    ],
)
def test_a_path_that_is_no_network_is_refused_and_not_called(name: str) -> None:
    with pytest.raises(UnknownNetwork):
        networks.build(name, {})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that registers networks, as `pip install` would leave it."""
    (tmp_path / "acme_networks.py").write_text(
        "from torch import nn\n\n"
        "class Tiny(nn.Linear):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__(3, num_classes)\n\n"
        "def tuple_of(num_classes):\n"
        "    return (num_classes,)\n\n"
        "number = 3\n"
    )
    info = tmp_path / "acme_networks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-networks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pytorchlib.networks]\n"
        "acme-tiny = acme_networks:Tiny\n"
        "acme-tuple = acme_networks:tuple_of\n"
        "acme-number = acme_networks:number\n"
        "acme-gone = acme_networks:Gone\n"
        "acme-nowhere = no_such_package:Network\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_networks", raising=False)


@pytest.mark.usefixtures("installed")
def test_an_installed_package_brings_its_networks() -> None:
    assert networks.build("acme-tiny", {"num_classes": 4})(torch.zeros(2, 3)).shape == (2, 4)
    assert networks.is_registered("acme-tiny")
    assert "acme-tiny" in networks.names()
    with pytest.raises(UnknownNetwork, match="did you mean acme-tiny"):
        networks.build("acme-tinny", {})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["acme-tuple", "acme-number", "acme-gone", "acme-nowhere"])
def test_a_registration_that_leads_to_no_network_is_named(name: str) -> None:
    with pytest.raises(UnknownNetwork, match=name):
        networks.build(name, {"num_classes": 4})


@pytest.mark.parametrize("name", ["mlp", "cnn", "torchvision/resnet18"])
def test_registered_is_what_imports_nothing_by_its_text(name: str) -> None:
    assert networks.is_registered(name)
    assert not networks.is_registered(name + "x")
