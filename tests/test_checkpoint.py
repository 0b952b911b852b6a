"""Checkpoints: what is loaded is bit for bit what was saved; anything else is refused by name."""

import hashlib
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import checkpoint, networks
from models.checkpoint import (
    GOLDEN,
    MANIFEST,
    AnswersMismatch,
    CheckpointDamaged,
    CheckpointError,
    ManifestInvalid,
    WeightsMismatch,
)
from models.manifest import WEIGHTS, FileRecord, Manifest, NetworkSpec, checksum_of, digest_of
from models.networks import BadNetworkOptions, UnknownNetwork
from models.preprocessing import Preprocessing

OPTIONS = {"inputs": 4, "num_classes": 3, "hidden": [5]}
NUMBERS = Preprocessing(steps=[{"step": "tensor", "shape": [4]}, {"step": "scale", "divisor": 2}])
LABELS = ("ant", "bee", "wasp")
Edit = Callable[[dict[str, Any]], object]


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 3)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x).relu()))
        return out


class Remembers(nn.Module):
    """A buffer outside the state_dict, a plain tensor, and an integer buffer inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("seen", torch.tensor(7))
        self.shift = torch.full((4,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x * self.table + self.shift)
        return out


class LooksAtItself(nn.Module):
    """Cannot be built on the meta device, whose tensors have no numbers."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(4, width)
        if max(self.head.bias.tolist()) > 100:
            raise RuntimeError("a very unlucky start")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


class Picky(nn.Linear):
    """Takes no weights but its own."""

    def __init__(self) -> None:
        super().__init__(4, 3)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        arguments[-1].append("these are not mine")


class Talkative(nn.Module):
    """Its state_dict holds more than tensors."""

    def get_extra_state(self) -> str:
        return "hello"


def described(name: str = "mlp", options: dict[str, Any] | None = None, **more: Any) -> Manifest:
    spec = NetworkSpec(name=name, options=OPTIONS if options is None else options)
    return Manifest(network=spec, preprocessing=NUMBERS, labels=LABELS, **more)


def untrained(name: str = "mlp", options: dict[str, Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    return networks.build(name, OPTIONS if options is None else options)


def saved(folder: Path, name: str = "mlp", options: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(1)
    inputs = torch.randn(6, 4)
    checkpoint.save(folder, untrained(name, options), described(name, options), inputs)
    return folder


def rewritten(folder: Path, edit: Edit, *, sealed: bool = True) -> Path:
    """The manifest edited; sealed again as only a program would, or left as a person would."""
    document = json.loads((folder / MANIFEST).read_text())
    edit(document)
    if sealed:
        document["digest"] = digest_of(document)
        document["checksum"] = checksum_of(document)
    (folder / MANIFEST).write_text(json.dumps(document, indent=1))
    return folder


def with_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Other weights, under a manifest that agrees with them."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    return replaced(folder, WEIGHTS, weights)


def replaced(folder: Path, name: str, content: dict[str, Tensor] | bytes) -> Path:
    (folder / name).unlink()
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        save_file(content, folder / name)
    data = (folder / name).read_bytes()
    record = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return rewritten(folder, lambda document: document["files"].update({name: record}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "checkpoint")


# Saved and loaded


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", OPTIONS),
        (f"{__name__}:Tied", {}),
        (f"{__name__}:Remembers", {}),
        (f"{__name__}:LooksAtItself", {}),
    ],
)
def test_what_is_loaded_is_what_was_saved(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    network = untrained(name, options).eval()
    loaded = checkpoint.load(saved(tmp_path / "a", name, options))
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], tensor), key
    assert loaded.golden is not None
    x = NUMBERS.finish(loaded.golden.inputs)
    assert torch.equal(loaded.network(x), network(x))
    assert torch.equal(loaded.golden.outputs, network(x))
    assert not loaded.network.training
    assert not any(value.requires_grad for value in loaded.network.parameters())


def test_a_convolutional_network_comes_back_with_its_statistics(tmp_path: Path) -> None:
    options = {"channels": 1, "size": 8, "num_classes": 3, "width": 2}
    network = untrained("cnn", options)
    network(torch.randn(16, 1, 8, 8))
    steps = [{"step": "decode"}, {"step": "color", "mode": "L"}, {"step": "crop", "size": [8, 8]}]
    spec = NetworkSpec(name="cnn", options=options)
    manifest = Manifest(network=spec, preprocessing={"steps": steps}, labels=LABELS)
    golden = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    checkpoint.save(tmp_path / "a", network, manifest, golden)
    loaded = checkpoint.load(tmp_path / "a")
    x = torch.randn(2, 1, 8, 8)
    assert network.training  # saving changed nothing
    assert torch.equal(loaded.network(x), network.eval()(x))
    assert loaded.golden is not None
    assert torch.equal(loaded.golden.inputs, golden)


def test_saving_twice_gives_one_digest_and_another_label_gives_another(tmp_path: Path) -> None:
    network = untrained()
    digests = [
        checkpoint.save(tmp_path / str(number), network, manifest).digest
        for number, manifest in enumerate(
            [
                described(),
                described(metrics={"accuracy": 0.5}),
                described().model_copy(update={"labels": ("ant", "bee", "fly")}),
                described(temperature=2.0),
            ]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_only_the_first_64_golden_inputs_are_kept(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", untrained(), described(), torch.randn(100, 4))
    golden = checkpoint.load(tmp_path / "a").golden
    assert golden is not None
    assert len(golden.inputs) == len(golden.outputs) == 64


def test_a_figure_that_is_not_finite_is_noted_as_null(tmp_path: Path) -> None:
    metrics = {"recall": [0.5, float("nan")], "loss": float("inf"), "by": {"ant": (1, 2)}}
    checkpoint.save(tmp_path / "a", untrained(), described(metrics=metrics))
    read = checkpoint.read_manifest(tmp_path / "a").metrics
    assert read == {"recall": [0.5, None], "loss": None, "by": {"ant": [1, 2]}}
    with pytest.raises(ValueError, match="network.options|cannot be written as JSON"):
        described("mlp", {"dropout": float("nan")})


def test_without_golden_inputs_there_is_no_golden_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", untrained(), described())
    checkpoint.save(tmp_path / "b", untrained(), described(), torch.empty(0, 4))
    for name in "ab":
        assert checkpoint.load(tmp_path / name).golden is None
        assert {path.name for path in (tmp_path / name).iterdir()} == {WEIGHTS, MANIFEST}


def test_views_and_overlapping_weights_are_stored_whole(tmp_path: Path) -> None:
    network = untrained()
    wide = torch.randn(3, 10)
    network.head.weight = nn.Parameter(wide[:, 2:7])
    network.head.bias = nn.Parameter(wide[:, 2])
    checkpoint.save(tmp_path / "a", network, described())
    loaded = checkpoint.load(tmp_path / "a").network
    assert torch.equal(loaded.head.weight, wide[:, 2:7])
    assert torch.equal(loaded.head.bias, wide[:, 2])


def test_half_precision_on_disk_computes_in_the_networks_own(tmp_path: Path) -> None:
    network = untrained().to(torch.bfloat16)
    checkpoint.save(tmp_path / "a", network, described(), torch.randn(3, 4))
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.network.head.weight.dtype == torch.float32
    assert torch.equal(loaded.network.head.weight, network.head.weight.float())
    assert (tmp_path / "a" / WEIGHTS).stat().st_size < 600


def test_the_folder_must_be_the_checkpoints_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        checkpoint.save(tmp_path, untrained(), described())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_cannot_be_stored_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="_extra_state of type str"):
        checkpoint.save(tmp_path / "a", Talkative(), described())
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}"):
        checkpoint.seal(tmp_path, described())
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(CheckpointError, match="bytes; 8388608 are allowed"):
        checkpoint.seal(tmp_path, described(metrics={"notes": "x" * 9_000_000}))


def test_a_network_that_does_not_answer_its_labels_is_not_saved(tmp_path: Path) -> None:
    inputs = torch.randn(2, 4)
    seven = untrained(options={**OPTIONS, "num_classes": 7})
    with pytest.raises(WeightsMismatch, match=r"shape \[7, 5\]; the network needs \[3, 5\]"):
        checkpoint.save(tmp_path / "a", seven, described(), inputs)
    manifest = described(f"{__name__}:LooksAtItself", {"width": 5})
    network = LooksAtItself(5)
    with pytest.raises(AnswersMismatch, match=r"shape \[2, 5\]; there are 3 labels"):
        checkpoint.save(tmp_path / "b", network, manifest, inputs)
    broken = untrained()
    nn.init.constant_(broken.head.bias, torch.nan)
    with pytest.raises(AnswersMismatch, match="not finite"):
        checkpoint.save(tmp_path / "c", broken, described(), inputs)


# Memory


def test_the_network_holds_the_mapped_file_itself(tmp_path: Path) -> None:
    options = {**OPTIONS, "hidden": [1000, 1000]}
    checkpoint.save(tmp_path / "a", untrained("mlp", options), described("mlp", options))
    loaded = checkpoint.load(tmp_path / "a")
    start = loaded.network.body[2].weight.data_ptr()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
    assert any(low <= start < high for low, high in ranges)


def test_building_takes_no_memory_for_weights_that_come_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built on the meta device: nothing is drawn at random and then thrown away."""
    folder = saved(tmp_path / "a")
    before = torch.get_rng_state()
    checkpoint.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda layer: check_meta(layer.weight))
    checkpoint.load(folder)


def check_meta(tensor: Tensor) -> None:
    assert tensor.is_meta


def test_a_giant_in_a_strangers_manifest_takes_no_memory(folder: Path) -> None:
    def giant(document: dict[str, Any]) -> None:
        document["network"]["options"]["hidden"] = [10**9] * 1000

    with pytest.raises(BadNetworkOptions, match="at most 64 widths"):
        checkpoint.load(rewritten(folder, giant))


def test_a_large_network_for_small_weights_is_refused_before_it_is_built(folder: Path) -> None:
    def large(document: dict[str, Any]) -> None:
        document["network"]["options"]["hidden"] = [30_000, 30_000]

    with pytest.raises(WeightsMismatch, match=r"missing body.2.bias, body.2.weight"):
        checkpoint.load(rewritten(folder, large))
    assert resident_mebibytes() < 3000


def resident_mebibytes() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def test_files_cannot_hold_more_tensors_than_any_network(folder: Path) -> None:
    many = {f"w{number}": torch.empty(0) for number in range(20_001)}
    with pytest.raises(CheckpointDamaged, match="20001 tensors"):
        checkpoint.load(replaced(folder, WEIGHTS, many))


# Damage


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN, MANIFEST])
def test_a_flipped_bit_anywhere_is_found(folder: Path, name: str) -> None:
    """In the manifest, unless it says the same as before: in a blank, or the case of an `e`."""
    data, choice = (folder / name).read_bytes(), random.Random(0)
    meaning = json.loads(data) if name == MANIFEST else None
    for _ in range(100):
        flipped = bytearray(data)
        flipped[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
        (folder / name).write_bytes(flipped)
        if same_meaning(bytes(flipped), meaning):
            continue
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)
    (folder / name).write_bytes(data)
    checkpoint.load(folder)


def same_meaning(text: bytes, meaning: object) -> bool:
    try:
        return meaning is not None and bool(json.loads(text) == meaning)
    except ValueError:
        return False


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN, MANIFEST])
def test_a_file_cut_short_or_gone_is_found(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for length in [0, 1, 7, 8, 9, len(data) // 2, len(data) - 2]:
        (folder / name).write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(folder)


def test_a_folder_that_is_none_has_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ManifestInvalid, match="manifest.json cannot be read: No such file"):
        checkpoint.load(tmp_path / "nothing")
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(ManifestInvalid, match="cannot be read: Is a directory"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["labels"].reverse(),
        lambda m: m["metrics"].update(accuracy=1.0),
        lambda m: m["lineage"].update(run="another"),
        lambda m: m["network"]["options"].update(dropout=0.5),
        lambda m: m["preprocessing"]["steps"][1].update(divisor=3.0),
        lambda m: m.update(temperature=2.0),
        lambda m: m.update(created="2001-01-01T00:00:00Z"),
        lambda m: m["files"].pop(GOLDEN),
        lambda m: m.update(checksum=None),
    ],
)
def test_a_manifest_edited_by_hand_is_found(folder: Path, edit: Edit) -> None:
    with pytest.raises(CheckpointDamaged, match="was changed after it was published"):
        checkpoint.load(rewritten(folder, edit, sealed=False))


def test_a_digest_that_is_anothers_is_found(folder: Path) -> None:
    def borrow(document: dict[str, Any]) -> None:
        document["digest"] = "0" * 64
        document["checksum"] = checksum_of(document)

    with pytest.raises(CheckpointDamaged, match="was changed"):
        checkpoint.read_manifest(rewritten(folder, borrow, sealed=False))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda m: m.pop("labels"), "labels: Field required"),
        (lambda m: m.pop("preprocessing"), "preprocessing: Field required"),
        (lambda m: m.pop("network"), "network: Field required"),
        (lambda m: m.update(format=2), "format is 2, and this program reads format 1"),
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m.update(labels=["ant", "bee"]), "there are 2 labels for 3 classes"),
        (lambda m: m.update(labels=["ant", "b\nee", "wasp"]), "has a control character"),
        (lambda m: m.update(labels=["ant", "b" * 257, "wasp"]), "labels.1: String should have at"),
        (lambda m: m.update(labels=["ant"] * 100_001), "labels: Tuple should have at most 100000"),
        (lambda m: m["network"]["options"].update(num_classes=4), "there are 3 labels for 4"),
        (lambda m: m["network"]["options"].update(x=float("inf")), "network.options: it cannot"),
        (lambda m: m["preprocessing"]["steps"].clear(), "preprocessing.steps: Tuple should have"),
        (lambda m: m["preprocessing"]["steps"].reverse(), "steps must follow the order decode"),
        (lambda m: m["files"].update({"../x": m["files"][WEIGHTS]}), "should match pattern"),
        (lambda m: m["files"][WEIGHTS].update(sha256="0"), "should match pattern"),
        (lambda m: m["files"][WEIGHTS].update(size_bytes=-1), "greater than or equal to 0"),
        (lambda m: m.update(created="2001-01-01T00:00:00"), "timezone"),
        (lambda m: m.update(temperature=0), "greater than 0"),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_named(folder: Path, edit: Edit, sentence: str) -> None:
    with pytest.raises(ManifestInvalid) as refusal:
        checkpoint.load(rewritten(folder, edit))
    assert str(refusal.value).startswith(MANIFEST)
    assert sentence in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_optional_fields_may_be_left_out(folder: Path) -> None:
    def bare(document: dict[str, Any]) -> None:
        for field in ("temperature", "metrics", "lineage", "created"):
            del document[field]

    assert checkpoint.load(rewritten(folder, bare)).manifest.metrics == {}


def test_a_manifest_without_weights_is_refused(folder: Path) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    del document["files"][WEIGHTS]
    with pytest.raises(ManifestInvalid, match=f"there is no {WEIGHTS}"):
        checkpoint.parse_manifest(json.dumps(document).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b'"format"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"metrics":' + b'{"a":' * 10_000,
        b'{"format": 1e999}',
        b'{"format": ' + b"9" * 10_000 + b"}",
        b'{"labels": "\\ud800"}',
    ],
)
def test_what_is_no_manifest_at_all_is_refused_in_a_sentence(text: bytes) -> None:
    with pytest.raises(ManifestInvalid, match="manifest.json: ") as refusal:
        checkpoint.parse_manifest(text)
    assert len(str(refusal.value)) < 500


def test_a_manifest_larger_than_any_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 1 << 40)
    with pytest.raises(ManifestInvalid, match="more than 8388608 bytes"):
        checkpoint.load(folder)


# Weights that do not fit


def nine_others() -> dict[str, Tensor]:
    return {str(number): torch.ones(1) for number in range(9)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("head.bias"), "missing head.bias"),
        (lambda w: w.update(tail=torch.ones(1)), "unexpected tail"),
        (lambda w: w.update({"head.bias": torch.ones(4)}), r"head.bias has shape \[4\]"),
        (lambda w: w.update({"head.bias": torch.ones(3, 1)}), r"needs \[3\]"),
        (lambda w: w.update({"head.bias": torch.ones(3).int()}), "has type torch.int32"),
        (lambda w: (w.clear(), w.update(nine_others())), "unexpected 0, 1, 2, 3, 4 and more"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    folder: Path, change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    with pytest.raises(WeightsMismatch, match=sentence):
        checkpoint.load(with_weights(folder, change))


def test_a_class_that_refuses_its_weights_is_heard(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", Picky(), described(f"{__name__}:Picky", {}))
    with pytest.raises(WeightsMismatch, match="does not take its weights: .* not mine"):
        checkpoint.load(tmp_path / "a")


def test_a_network_that_nobody_knows_is_refused(folder: Path) -> None:
    def unknown(document: dict[str, Any]) -> None:
        document["network"]["name"] = "no.such.module:Network"

    with pytest.raises(UnknownNetwork):
        checkpoint.load(rewritten(folder, unknown))


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.pop("outputs"),
        lambda g: g.update(more=torch.ones(1)),
        lambda g: g.update(outputs=g["outputs"][:, :2].contiguous()),
        lambda g: g.update(outputs=g["outputs"].double()),
        lambda g: g.update(inputs=g["inputs"][:2]),
        lambda g: g.update(inputs=torch.tensor(1.0), outputs=torch.tensor(1.0)),
        lambda g: g.update(inputs=torch.ones(65, 4), outputs=torch.ones(65, 3)),
        lambda g: g.update(inputs=torch.ones(0, 4), outputs=torch.ones(0, 3)),
    ],
)
def test_golden_answers_of_another_shape_are_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], object]
) -> None:
    golden = load_file(folder / GOLDEN)
    change(golden)
    with pytest.raises(CheckpointDamaged, match=GOLDEN):
        checkpoint.load(replaced(folder, GOLDEN, golden))


# Strangers


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.canary,))


@pytest.mark.parametrize("name", [WEIGHTS, GOLDEN])
def test_a_pickle_under_another_name_runs_nothing(folder: Path, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"head.bias": Bomb(canary)}, tmp_path / "bomb.pt")
    for content in (pickle.dumps(Bomb(canary)), (tmp_path / "bomb.pt").read_bytes()):
        with pytest.raises(CheckpointDamaged, match=f"{name} cannot be read"):
            checkpoint.load(replaced(folder, name, content))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()  # the bomb was live


def safetensors_of(header: object, num_bytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def tensor_at(begin: int, end: int, shape: tuple[int, ...] = (1,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 1 << 62),
        safetensors_of(b"{"),
        safetensors_of(b"[" * 100_000),
        safetensors_of({"w": tensor_at(0, 4)}),
        safetensors_of({"w": tensor_at(0, 4)}, 8),
        safetensors_of({"w": tensor_at(0, 4, (-1,))}, 4),
        safetensors_of({"w": tensor_at(0, 4, (2**32, 2**32))}, 4),
        safetensors_of({"overlaps": tensor_at(0, 4), "w": tensor_at(2, 6)}, 6),
        safetensors_of({"hole": tensor_at(0, 4), "w": tensor_at(8, 12)}, 12),
        safetensors_of({"head.bias": tensor_at(0, 0, (0, 2**60))}),
    ],
)
def test_weights_made_to_break_a_reader_are_refused(folder: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError):
        checkpoint.load(replaced(folder, WEIGHTS, content))


def test_a_call_in_the_place_of_a_network_is_not_made(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    def call(document: dict[str, Any]) -> None:
        document["network"] = {"name": "os:mkdir", "options": {"path": str(canary)}}

    with pytest.raises(UnknownNetwork, match="no class of torch.nn.Module"):
        checkpoint.load(rewritten(folder, call))
    assert not canary.exists()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(st.text().filter(lambda key: key != "num_classes"), json_values)


some_labels = st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4)


@given(json_objects, json_objects, some_labels)
@settings(max_examples=60, deadline=None)
def test_any_manifest_is_read_as_it_was_written(
    options: dict[str, Any], metrics: dict[str, Any], labels: list[str]
) -> None:
    try:
        spec = NetworkSpec(name="mlp", options=options)
        manifest = Manifest(network=spec, preprocessing=NUMBERS, labels=labels, metrics=metrics)
    except ValueError:
        return  # a control character
    sealed = manifest.sealed({WEIGHTS: FileRecord(size_bytes=1, sha256="0" * 64)})
    assert checkpoint.parse_manifest(sealed.model_dump_json(indent=1).encode()) == sealed
    assert sealed.sealed(sealed.files) == sealed
