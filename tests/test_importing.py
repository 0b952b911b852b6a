"""Weights become models: read, tried once, measured, published; and come out as plain files."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from models import checkpoint, networks
from models.store import ModelStore
from training.assumed import PictureOptions
from training.config import DataConfig
from training.export import ExportRefused, export, how_to_load
from training.importing import ImportRefused, ImportRequest, find_import, publish, read_import
from training.measure import ClassesUnknown, measure, whole
from training.progress import drive

CPU = torch.device("cpu")
SIZE = 8
OPTIONS = {"channels": 3, "size": SIZE, "width": 2}
PICTURES = PictureOptions(resize=SIZE)


def small_network() -> nn.Module:
    """Answers `red` or `blue` for pictures that are one or the other."""
    torch.manual_seed(0)
    network = networks.build("cnn", {**OPTIONS, "num_classes": 2})
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    for part in convolutions:
        nn.init.zeros_(part.weight)
        for channel in range(2):  # carries red and blue through in channels of their own
            source = (0, 2)[channel] if part is convolutions[0] else channel
            part.weight.data[channel, source, 1, 1] = 1.0
    nn.init.zeros_(network.head.weight)
    half = network.head.in_features // convolutions[-1].out_channels
    for label in range(2):
        network.head.weight.data[label, label * half : (label + 1) * half] = 1.0
    return network.eval()


def saved(folder: Path, state: dict[str, Tensor]) -> str:
    torch.save(state, folder / "weights.pt")
    return str(folder / "weights.pt")


def request(folder: Path, **changes) -> ImportRequest:
    (folder / "labels.txt").write_text("red\nblue\n")
    values = {
        "weights": changes.get("weights") or saved(folder, small_network().state_dict()),
        "network": "cnn",
        "labels": folder / "labels.txt",
        "pictures": PICTURES,
        "options": OPTIONS,
    }
    return ImportRequest(**{**values, **changes})


def coloured_pictures(folder: Path, num: int = 4) -> Path:
    """Class folders `blue` and `red`; the last red picture is blue."""
    colors = {"red": (250, 20, 10), "blue": (10, 20, 250)}
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for index in range(num):
            Image.new("RGB", (20, 16), color).save(folder / name / f"{index}.png")
    Image.new("RGB", (20, 16), colors["blue"]).save(folder / "red" / f"{num - 1}.png")
    return folder


def test_an_imported_network_answers_as_it_did(tmp_path):
    imported = read_import(request(tmp_path))
    assert imported.manifest.network.options == {**OPTIONS, "num_classes": 2}
    x = torch.rand(5, 3, SIZE, SIZE)
    assert torch.equal(imported.network(x), small_network()(x))


def test_half_precision_becomes_single(tmp_path):
    half = small_network().half().state_dict()
    imported = read_import(request(tmp_path, weights=saved(tmp_path, half)))
    assert imported.network.head.weight.dtype == torch.float32


def test_a_version_with_golden_answers_is_published_once(tmp_path):
    store = ModelStore(tmp_path / "models")
    imported = read_import(request(tmp_path))
    version = publish(imported, store, "colors")
    assert publish(imported, store, "colors") == version
    assert store.resolve("colors") == version
    loaded = checkpoint.load(version.folder)
    assert loaded.manifest.lineage.method == "import"
    assert loaded.manifest.lineage.options["weights"] == "weights.pt"
    finished = loaded.manifest.preprocessing.finish(loaded.golden.inputs)
    assert torch.allclose(loaded.network(finished), loaded.golden.outputs, atol=1e-5)


def test_the_same_request_is_found_again(tmp_path):
    store = ModelStore(tmp_path / "models")
    asked = request(tmp_path)
    assert find_import(store, "colors", asked) is None
    version = publish(read_import(asked), store, "colors")
    assert find_import(store, "colors", asked) == version
    assert find_import(store, "colors", replace(asked, labels=None)) is None
    (tmp_path / "labels.txt").write_text("rot\nblau\n")
    assert find_import(store, "colors", asked) is None


def test_a_check_measures_by_the_names_of_folders(tmp_path):
    imported = read_import(request(tmp_path))  # its labels are red, blue; folders sort as blue, red
    folder = coloured_pictures(tmp_path / "pictures")
    measured = drive(measure(imported.network, imported.manifest, whole(str(folder)), CPU))
    assert measured.report.num_samples == 8
    assert measured.report.accuracy == pytest.approx(7 / 8)
    assert measured.report.confused_pairs[0].target == "red"
    version = publish(imported, ModelStore(tmp_path / "models"), "colors", measured)
    assert version.manifest().metrics["accuracy"] == pytest.approx(7 / 8)
    assert torch.equal(checkpoint.load(version.folder).golden.inputs, measured.sample)


def test_a_class_that_the_model_does_not_know(tmp_path):
    imported = read_import(request(tmp_path, labels=None))
    config = whole(str(coloured_pictures(tmp_path / "pictures")))
    with pytest.raises(ClassesUnknown, match="no label blue, red; its labels are 0, 1"):
        drive(measure(imported.network, imported.manifest, config, CPU))


def test_a_part_that_is_not_there(tmp_path):
    imported = read_import(request(tmp_path))
    config = whole(str(coloured_pictures(tmp_path / "pictures")))
    with pytest.raises(ClassesUnknown, match="no part 'test'; it has train"):
        drive(measure(imported.network, imported.manifest, config, CPU, part="test"))


def test_data_that_the_model_did_not_learn_from_is_split_as_asked(tmp_path):
    network = networks.build("cnn", {"channels": 1, "size": 8, "num_classes": 10, "width": 2})
    weights = saved(tmp_path, network.state_dict())
    options = {"channels": 1, "size": 8, "width": 2}
    imported = read_import(request(tmp_path, weights=weights, options=options, labels=None))
    measured = drive(measure(imported.network, imported.manifest, DataConfig(), CPU))
    assert measured.part == "test"
    assert 100 < measured.report.num_samples < 300
    assert measured.where == "the test part of digits"
    measured = drive(measure(imported.network, imported.manifest, whole("digits"), CPU))
    assert measured.where == "all samples of digits"
    assert measured.report.num_samples == 1797


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pictures": PictureOptions(resize=16)}, r"does not take inputs of shape \[3, 16, 16\]"),
        ({"weights": "torchvision"}, "publishes no weights for cnn"),
    ],
)
def test_what_cannot_answer_is_not_imported(tmp_path, changes, sentence):
    with pytest.raises(ImportRefused, match=sentence):
        read_import(request(tmp_path, **changes))


def test_weights_that_are_not_finite_are_named(tmp_path):
    state = small_network().state_dict()
    state["head.bias"][0] = torch.nan
    with pytest.raises(ImportRefused, match=r"head\.bias holds numbers that are not finite"):
        read_import(request(tmp_path, weights=saved(tmp_path, state)))


OWN_NETWORK = """
from torch import nn

class Rows(nn.Module):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.layer = nn.Linear(width, classes)

    def forward(self, x):
        return self.layer(x)

class Pair(Rows):
    def forward(self, x):
        return self.layer(x), x
"""


def test_a_class_of_the_operators_own(tmp_path, monkeypatch):
    (tmp_path / "own_network.py").write_text(OWN_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    weights = saved(tmp_path, nn.ModuleDict({"layer": nn.Linear(5, 3)}).state_dict())
    numbers = PictureOptions(shape=(5,))
    own = ImportRequest(weights, "own_network:Rows", None, numbers, {"width": 5})
    imported = read_import(own)
    assert imported.manifest.labels == ("0", "1", "2")
    assert imported.manifest.network.options == {"width": 5}
    publish(imported, ModelStore(tmp_path / "models"), "rows")
    with pytest.raises(ImportRefused, match="answers 2 inputs with tuple"):
        read_import(ImportRequest(weights, "own_network:Pair", None, numbers, {"width": 5}))


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_an_exported_file_loads_in_plain_torch(tmp_path, form):
    store = ModelStore(tmp_path / "models")
    version = publish(read_import(request(tmp_path)), store, "colors")
    export(checkpoint.load(version.folder), tmp_path / f"out.{form}", form)
    read = torch.load if form == "pt" else load_file
    plain = networks.build("cnn", {**OPTIONS, "num_classes": 2}).eval()
    plain.load_state_dict(read(str(tmp_path / f"out.{form}")))
    x = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(plain(x), small_network()(x))
    again = read_import(request(tmp_path, weights=str(tmp_path / f"out.{form}")))
    assert publish(again, store, "colors") == version


def test_export_never_writes_over_a_file(tmp_path):
    version = publish(read_import(request(tmp_path)), ModelStore(tmp_path / "models"), "colors")
    loaded = checkpoint.load(version.folder)
    (tmp_path / "out.pt").write_text("mine")
    with pytest.raises(ExportRefused, match="is there already"):
        export(loaded, tmp_path / "out.pt", "pt")
    assert (tmp_path / "out.pt").read_text() == "mine"
    with pytest.raises(ExportRefused, match="no format"):
        export(loaded, tmp_path / "out.onnx", "onxn")
    with pytest.raises(ExportRefused, match="cannot be written"):
        export(loaded, tmp_path / "absent" / "out.pt", "pt")
    assert not list(tmp_path.glob(".*.part"))


def test_a_torchvision_network_goes_in_and_out(tmp_path):
    from torchvision import models

    theirs = models.mnasnet0_5(num_classes=3)
    weights = saved(tmp_path, theirs.state_dict())
    imported = read_import(ImportRequest(weights, "torchvision/mnasnet0_5"))
    assert imported.manifest.labels == ("0", "1", "2")
    assert imported.manifest.preprocessing.input_shape == (3, 224, 224)
    version = publish(imported, ModelStore(tmp_path / "models"), "parts")
    loaded = checkpoint.load(version.folder)
    export(loaded, tmp_path / "out.pt", "pt")
    lines = how_to_load(loaded, tmp_path / "out.pt")
    exec(f"import torch, torchvision\n{lines}", namespace := {})
    ours, again = loaded.network.state_dict(), namespace["network"].state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in again.items())


@pytest.mark.slow
def test_a_sequence_as_head_is_imported(tmp_path):
    from torchvision import models

    theirs = models.shufflenet_v2_x0_5(num_classes=3)
    theirs.fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(1024, 4))
    weights = saved(tmp_path, {"model": copy.deepcopy(theirs).state_dict(), "epoch": 3})
    imported = read_import(ImportRequest(weights, "torchvision/shufflenet_v2_x0_5"))
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(imported.network(x), theirs.eval()(x))
    assert any("Linear(1024, 4)" in note for note in imported.notes)
    version = publish(imported, ModelStore(tmp_path / "models"), "parts")
    assert torch.equal(checkpoint.load(version.folder).network(x), theirs(x))


def test_an_unknown_network_lists_the_nearest(tmp_path):
    weights = saved(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(networks.UnknownNetwork, match="torchvision/resnet50"):
        read_import(ImportRequest(weights, "torchvision/resnet5"))


@pytest.mark.slow  # real weights, a hundred photographs
def test_published_weights_know_ants_and_bees(real_data, tmp_path):
    file = real_data / "weights" / "mobilenet_v2.pth"
    imported = read_import(ImportRequest(str(file), "torchvision/mobilenet_v2"))
    for ours, theirs in (("ant", "ants"), ("bee", "bees")):
        (tmp_path / "photographs" / ours).mkdir(parents=True)
        for path in sorted((real_data / "hymenoptera" / "val" / theirs).iterdir())[:50]:
            (tmp_path / "photographs" / ours / path.name).symlink_to(path)
    config = whole(str(tmp_path / "photographs"))
    right = drive(measure(imported.network, imported.manifest, config, CPU)).report
    assert right.accuracy > 0.6
    wrong = read_import(
        ImportRequest(
            str(file), "torchvision/mobilenet_v2", pictures=PictureOptions(mean=(40.0,), std=(1.0,))
        )
    )
    assert drive(measure(wrong.network, wrong.manifest, config, CPU)).report.accuracy < 0.2


def test_noise_is_the_same_each_time():
    from training.importing import noise

    steps = read_steps()
    assert torch.equal(noise(steps, 2), noise(steps, 2))
    assert noise(steps, 2).dtype == torch.uint8


def read_steps():
    from models.backbones import picture_preprocessing

    return picture_preprocessing(8, 8, (0.5,), (0.5,))


def test_numbers_of_pictures_reach_the_network_as_they_are(tmp_path):
    imported = read_import(request(tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    steps = imported.manifest.preprocessing
    finished = steps.finish(steps.picture(Image.fromarray(pixels)).unsqueeze(0))
    assert torch.allclose(finished[0].permute(1, 2, 0) * 255, torch.from_numpy(pixels).float())
