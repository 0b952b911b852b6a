"""Networks with eight bits: which layers have them, what they answer, how they rest on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import checkpoint, int8, networks
from models.checkpoint import WeightsMismatch
from models.int8 import Coded, Coding, Int8Layer, Int8MaxPool2d, coded, decoded
from models.int8_network import NotQuantizable, folded, groups_of, int8_form, layers_of
from models.manifest import Manifest, NetworkSpec
from models.networks import UnknownNetwork, is_built_in, is_registered
from models.preprocessing import Preprocessing
from training.calibration import calibrated
from training.progress import drive

OPTIONS = {"channels": 3, "size": 32, "num_classes": 4, "width": 8}


class Residual(nn.Module):
    """As torchvision's: one ReLU for all places, a sum before it, a shortcut with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.relu6 = nn.ReLU6()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.wide = nn.Conv2d(8, 16, 3, padding=2, dilation=2)
        self.short = nn.Conv2d(8, 16, 1)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.deep(x) + x)
        x = self.relu(self.wide(x) + self.short(x))
        x = self.relu6(self.hidden(x.mean((2, 3))))
        return self.head(x)


class Twice(nn.Module):
    """Calls one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.again(self.first(x)).relu()))


def network_of(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = kind().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return network.requires_grad_(False)


def in_int8(network: nn.Module, inputs: Tensor) -> nn.Module:
    return drive(calibrated(network, [inputs], len(inputs)))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_a_byte_stands_for_its_number() -> None:
    coding = Coding.of(torch.tensor([-1.0, 3.0]))
    x = torch.tensor([-1.0, 0.0, 0.5, 3.0, 9.0])
    found = decoded(coded(x, coding))
    torch.testing.assert_close(found, x.clamp(max=3.0), atol=coding.scale, rtol=0)
    assert found[1] == 0, "padding and ReLU need zero exactly"


def test_layers_are_found_with_what_follows_them() -> None:
    groups = {group.path: group for group in groups_of(folded(network_of(Residual)))}
    assert groups.keys() == {"stem", "deep", "wide", "short", "hidden"}
    assert {path for path, group in groups.items() if group.add is not None} == {"deep", "wide"}
    assert groups["hidden"].activation == "relu6"
    assert groups["short"].activation == "none"
    places = {path: layer.place for path, layer in layers_of(int8_form(network_of(Residual)))}
    assert {path for path, place in places.items() if place.gives_bytes} == {
        "stem",
        "deep",
        "short",
    }
    assert {path for path, place in places.items() if place.takes_bytes} == {
        "deep",
        "wide",
        "short",
    }


def test_eight_bits_answer_nearly_as_thirty_two() -> None:
    network, inputs = network_of(Residual), torch.rand(16, 3, 20, 20)
    small = in_int8(network, inputs)
    with torch.inference_mode():
        assert relative(small(inputs), network(inputs)) < 0.05
        assert not torch.equal(small(inputs), network(inputs))
    assert small.get_buffer("wide.weight").dtype == torch.int8


@pytest.mark.parametrize("kind", [Residual, Twice])
def test_plain_torch_answers_as_onednn_does(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (8, 3, 20, 20) if kind is Residual else (8, 6)
    network, inputs = network_of(kind), torch.randn(shape)
    small = in_int8(network, inputs)
    with torch.inference_mode():
        fast = small(inputs)
        monkeypatch.setattr(int8, "multiplies_bytes", lambda _: False)
        assert relative(small(inputs), fast) < 0.02
        assert relative(small(inputs), network(inputs)) < 0.05


def test_a_row_is_answered_alike_alone_and_in_a_batch() -> None:
    small, inputs = (
        in_int8(network_of(Residual), torch.rand(8, 3, 20, 20)),
        torch.rand(4, 3, 20, 20),
    )
    with torch.inference_mode():
        together = small(inputs)
        alone = torch.cat([small(row[None]) for row in inputs])
    # The sums in bytes are the same; the kernel of the last float layer may depend on the batch.
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1)]
)
@pytest.mark.parametrize("side", [7, 8, 9])
def test_pooling_bytes_is_pooling_numbers(
    side: int, window: int, stride: int, padding: int, ceil_mode: bool
) -> None:
    pool = nn.MaxPool2d(window, stride, padding, ceil_mode=ceil_mode)
    values = torch.randint(0, 256, (2, 3, side, side + 1), dtype=torch.uint8)
    found = Int8MaxPool2d(pool)(Coded(values, Coding(1.0, 0)))
    assert torch.equal(decoded(found), pool(values.float()))


def test_bytes_go_through_a_pooling() -> None:
    class Pooled(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.MaxPool2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.relu(self.norm(self.stem(x))))
            x = self.pool(self.relu(self.deep(x) + x))
            return self.head(self.relu(self.hidden(self.wide(x).mean((2, 3)))))

    network, inputs = network_of(Pooled), torch.rand(8, 3, 20, 20)
    small = in_int8(network, inputs)
    places = {path: layer.place for path, layer in layers_of(small)}
    assert places["stem"].gives_bytes
    assert places["deep"].takes_bytes
    assert places["wide"].takes_bytes
    with torch.inference_mode():
        assert relative(small(inputs), network(inputs)) < 0.05


def test_a_summand_that_others_need_is_not_written_over() -> None:
    class Kept(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(self.stem(x)))
            y = self.relu(self.deep(x) + x)
            return self.head(self.relu(self.hidden((self.wide(y) + self.short(x)).mean((2, 3)))))

    network, inputs = network_of(Kept), torch.rand(8, 3, 20, 20)
    with torch.inference_mode():
        assert relative(in_int8(network, inputs)(inputs), network(inputs)) < 0.05


def test_a_layer_that_is_called_twice_stays_as_it_is() -> None:
    small = int8_form(network_of(Twice))
    assert [path for path, _ in layers_of(small)] == ["first"]


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    class Capricious(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    with pytest.raises(NotQuantizable, match="cannot be traced"):
        int8_form(network_of(Capricious))
    with pytest.raises(NotQuantizable, match="no layer that eight bits suit"):
        int8_form(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


def test_it_is_built_by_its_name() -> None:
    found = networks.build("int8/cnn", OPTIONS)
    assert any(isinstance(module, Int8Layer) for module in found.modules())
    assert is_built_in("int8/cnn")
    assert is_registered("int8/cnn")
    assert not is_registered("int8/package.module:Class")
    with pytest.raises(UnknownNetwork):
        networks.build("int8/int8/cnn", OPTIONS)


def saved(folder: Path) -> tuple[nn.Module, Manifest]:
    network = networks.build("cnn", OPTIONS).eval().requires_grad_(False)
    steps = [
        {"step": "decode"},
        {"step": "color", "mode": "RGB"},
        {"step": "resize", "size": [32, 32]},
        {"step": "scale"},
    ]
    small = in_int8(network, torch.rand(8, 3, 32, 32))
    manifest = Manifest(
        network=NetworkSpec(name="int8/cnn", options=OPTIONS),
        preprocessing=Preprocessing(steps=steps),
        labels=tuple("abcd"),
    )
    golden = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    return small, checkpoint.save(folder, small, manifest, golden)


def test_it_rests_on_disk_as_any_other(tmp_path: Path) -> None:
    small, _ = saved(tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a")
    inputs = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(loaded.network(inputs), small(inputs))
    assert loaded.golden is not None
    for tensor in loaded.network.state_dict().values():
        assert not tensor.is_meta


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("body.3.weight", None),
        ("body.3.weight_scale", torch.ones(3)),
        ("body.0.input_bounds", None),
        ("body.3.weight", torch.zeros(12, 8, 3, 3)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, other: Tensor | None
) -> None:
    small, manifest = saved(tmp_path / "a")
    state = small.state_dict()
    assert name in state
    del state[name]
    with pytest.raises(WeightsMismatch):
        checkpoint.network_with(manifest, state if other is None else {**state, name: other})


def test_bytes_go_through_as_they_are() -> None:
    bytes_in = Coded(torch.zeros(1, 2, dtype=torch.uint8), Coding(1.0, 0))
    assert coded(bytes_in, Coding(2.0, 1)) is bytes_in
