"""Heads read from weights and built again: the rebuilt network answers as the original did."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from models.heads import Head, HeadError, last_layer, read_head


class Backbone(nn.Module):
    """A body of 8 features and a head like torchvision's mobilenets."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Linear(6, 8)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(x))
        return out


FORMS = {
    "the last layer": ("classifier.1", nn.Linear(8, 3)),
    "the last layer without bias": ("classifier.1", nn.Linear(8, 3, bias=False)),
    "the whole head by one layer": ("classifier", nn.Linear(8, 3)),
    "dropout and a layer": ("classifier", nn.Sequential(nn.Dropout(), nn.Linear(8, 3))),
    "a sequence inside": ("classifier.1", nn.Sequential(nn.Dropout(), nn.Linear(8, 3))),
    "two layers": (
        "classifier",
        nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)),
    ),
    "two layers behind dropout": (
        "classifier",
        nn.Sequential(nn.Dropout(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)),
    ),
    "batch norm": (
        "classifier",
        nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)),
    ),
    "layer norm first": (
        "classifier",
        nn.Sequential(nn.Flatten(1), nn.LayerNorm(8), nn.Linear(8, 3)),
    ),
    "flat first": ("classifier", nn.Sequential(nn.Flatten(), nn.Linear(8, 3))),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_rebuilt_network_answers_the_same(form):
    torch.manual_seed(1)
    at, part = FORMS[form]
    theirs = Backbone()
    owner, _, name = at.rpartition(".")
    setattr(theirs.get_submodule(owner), name, copy.deepcopy(part))
    head = read_head(Backbone(), theirs.state_dict())
    assert head is not None
    assert head.num_classes == 3
    ours = Backbone()
    Head.model_validate_json(head.model_dump_json()).put_on(ours)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 6)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_named_layers_are_taken_in_their_order():
    theirs = Backbone()
    theirs.classifier = nn.Sequential()
    theirs.classifier.add_module("first", nn.Linear(8, 5))
    theirs.classifier.add_module("second", nn.Linear(5, 3))
    head = read_head(Backbone(), theirs.state_dict())
    assert head is not None
    assert head.describe() == "classifier: Linear(8, 5), Linear(5, 3)"


def test_relu_between_layers_is_said_to_be_assumed():
    theirs = Backbone()
    theirs.classifier = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    head = read_head(Backbone(), theirs.state_dict())
    assert head is not None
    assert head.assumed == ("1",)


@pytest.mark.parametrize(
    "theirs",
    [
        nn.Sequential(nn.Linear(6, 8)),
        Backbone().features,
        nn.ModuleDict({"features": nn.Linear(6, 9), "classifier": nn.Linear(9, 3)}),
        nn.ModuleDict({"features": nn.Linear(6, 8), "classifier": nn.LSTM(8, 3)}),
        nn.ModuleDict({"features": nn.Linear(6, 8), "classifier": nn.BatchNorm1d(8)}),
    ],
    ids=["other names", "no head", "other body", "recurrent head", "no last layer"],
)
def test_weights_of_another_network_have_no_head_here(theirs):
    assert read_head(Backbone(), theirs.state_dict()) is None


def test_layers_whose_widths_do_not_meet_are_no_head():
    state = dict(Backbone().state_dict())
    state["classifier.1.weight"] = torch.zeros(5, 8)
    state["classifier.3.weight"] = torch.zeros(3, 4)
    assert read_head(Backbone(), state) is None


def test_a_head_for_a_part_that_is_not_there_is_refused():
    head = Head.model_validate(
        {"at": "fc", "layers": {"": {"layer": "linear", "inputs": 8, "outputs": 3}}}
    )
    with pytest.raises(HeadError, match="no part 'fc'"):
        head.put_on(Backbone())
    layers = {"1": {"layer": "linear", "inputs": 8, "outputs": 3}, "7": {"layer": "as_built"}}
    missing = Head.model_validate({"at": "classifier", "layers": layers})
    with pytest.raises(HeadError, match="as_built"):
        missing.put_on(Backbone())


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {"0": {"layer": "relu"}},
        {"0": {"layer": "linear", "inputs": 1 << 20, "outputs": 1 << 20}},
        {"0": {"layer": "os.system"}},
        {"0": {"layer": "dropout", "p": 2}},
    ],
)
def test_a_head_out_of_bounds_is_refused(layers):
    with pytest.raises(ValidationError):
        Head.model_validate({"at": "classifier", "layers": layers})


def test_last_layer():
    assert last_layer(Backbone()) == "classifier.1"
    with pytest.raises(HeadError, match="no layer with weights"):
        last_layer(nn.ReLU())
