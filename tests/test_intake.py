"""Uploads from strangers: each hostile one is a 4xx with a name, and leaves no trace."""

import copy
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import publish_cnn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from starlette.testclient import TestClient

from models.checkpoint import GOLDEN, MANIFEST
from models.intake_error import IntakeRefused
from models.manifest import WEIGHTS
from models.store import ModelStore
from models.tensor_file import Expected, check_tensor_file

URL = "/v1/models/stranger/versions"


class Parts:
    """An upload that is fine until a test changes it."""

    def __init__(self, folder: Path) -> None:
        self.manifest: Any = json.loads((folder / MANIFEST).read_text())
        for name in ("files", "digest", "checksum"):
            del self.manifest[name]
        data = (folder / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : 8 + length])
        self.data = data[8 + length :]
        self.header_text: bytes | None = None
        self.length: int | None = None
        self.golden: bytes | None = (folder / GOLDEN).read_bytes()
        self.weights: bytes | None = None
        self.manifest_text: bytes | None = None
        self.sha256: str | None = None

    def first(self) -> dict[str, Any]:
        """The entry of the first tensor with several dimensions."""
        entries = [entry for name, entry in self.header.items() if name != "__metadata__"]
        many = [entry for entry in entries if len(entry["shape"]) > 1]
        found: dict[str, Any] = min(many, key=lambda one: one["data_offsets"])
        return found

    def weights_bytes(self) -> bytes:
        if self.weights is not None:
            return self.weights
        text = self.header_text or json.dumps(self.header).encode()
        length = len(text) if self.length is None else self.length
        return struct.pack("<Q", length) + text + self.data

    def form(self) -> dict[str, Any]:
        text = self.manifest_text or json.dumps(self.manifest).encode()
        form: dict[str, Any] = {"manifest": (None, text), "weights": ("w", self.weights_bytes())}
        if self.golden is not None:
            form["golden"] = ("g", self.golden)
        if self.sha256 is not None:
            form["sha256"] = (None, self.sha256)
        return form


Change = Callable[[Parts], object]
HOSTILE: dict[str, tuple[str, Change]] = {}


def hostile(code: str) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        HOSTILE[change.__name__] = (code, change)
        return change

    return register


@hostile("header_invalid")
def empty(parts: Parts) -> None:
    parts.weights = b""


@hostile("header_invalid")
def seven_bytes(parts: Parts) -> None:
    parts.weights = b"\0" * 7


@hostile("header_invalid")
def a_pickle(parts: Parts) -> None:
    parts.weights = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n."


@hostile("header_invalid")
def a_header_of_exabytes(parts: Parts) -> None:
    parts.length = 2**63


@hostile("header_invalid")
def a_header_over_its_bound(parts: Parts) -> None:
    parts.header_text = json.dumps(parts.header).encode() + b" " * 200_000


@hostile("header_invalid")
def a_header_beyond_the_file(parts: Parts) -> None:
    parts.length = len(json.dumps(parts.header)) + len(parts.data) + 1


@hostile("header_invalid")
def a_header_that_is_no_json(parts: Parts) -> None:
    parts.header_text = b"{" * 100


@hostile("header_invalid")
def a_header_nested_deeply(parts: Parts) -> None:
    parts.header_text = b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"


@hostile("header_invalid")
def a_header_that_is_a_list(parts: Parts) -> None:
    parts.header_text = b"[]"


@hostile("header_invalid")
def a_header_in_latin_1(parts: Parts) -> None:
    parts.header_text = b'{"\xe9": 1}'


@hostile("header_invalid")
def a_key_twice(parts: Parts) -> None:
    text = json.dumps(parts.header)
    name = next(iter(parts.header.keys() - {"__metadata__"}))
    entry = json.dumps(parts.header[name])
    parts.header_text = (text[:-1] + f', "{name}": {entry}}}').encode()


@hostile("header_invalid")
def an_endless_number(parts: Parts) -> None:
    parts.header_text = b'{"a": ' + b"9" * 10_000 + b"}"


@hostile("header_invalid")
def a_field_too_many(parts: Parts) -> None:
    parts.first()["code"] = "import os"


@hostile("keys_mismatch")
def a_tensor_missing(parts: Parts) -> None:
    parts.header.pop(next(iter(parts.header.keys() - {"__metadata__"})))


@hostile("keys_mismatch")
def a_tensor_of_no_size_beside(parts: Parts) -> None:
    parts.header["../../x"] = {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}


@hostile("shape_mismatch")
def another_shape(parts: Parts) -> None:
    parts.first()["shape"] = [1, *parts.first()["shape"]]


@hostile("shape_mismatch")
def a_negative_shape(parts: Parts) -> None:
    parts.first()["shape"] = [-side for side in parts.first()["shape"]]


@hostile("shape_mismatch")
def an_overflowing_shape(parts: Parts) -> None:
    parts.first()["shape"] = [2**32, 2**32]


@hostile("dtype_refused")
def an_unknown_type(parts: Parts) -> None:
    parts.first()["dtype"] = "F8_E4M3"


@hostile("dtype_refused")
def whole_numbers_for_weights(parts: Parts) -> None:
    parts.first()["dtype"] = "I32"


@hostile("dtype_refused")
def a_type_that_is_a_list(parts: Parts) -> None:
    parts.first()["dtype"] = ["F32"]


@hostile("offsets_invalid")
def overlap(parts: Parts) -> None:
    start, end = parts.first()["data_offsets"]
    for entry in parts.header.values():
        if isinstance(entry, dict) and entry.get("data_offsets", [0])[0] == end:
            size = entry["data_offsets"][1] - end
            entry["data_offsets"] = [start, start + size]


@hostile("offsets_invalid")
def a_hole(parts: Parts) -> None:
    for name, entry in parts.header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [at + 4 for at in entry["data_offsets"]]


@hostile("offsets_invalid")
def bytes_behind_the_end(parts: Parts) -> None:
    parts.data += b"\0" * 64


@hostile("offsets_invalid")
def a_file_cut_short(parts: Parts) -> None:
    parts.data = parts.data[:-1]


@hostile("offsets_invalid")
def offsets_the_wrong_way_round(parts: Parts) -> None:
    parts.first()["data_offsets"].reverse()


@hostile("offsets_invalid")
def offsets_that_are_true(parts: Parts) -> None:
    parts.first()["data_offsets"] = [False, True]


@hostile("metadata_refused")
def metadata_of_its_own(parts: Parts) -> None:
    parts.header["__metadata__"] = {"format": "pt", "code": "x"}


@hostile("metadata_refused")
def endless_metadata(parts: Parts) -> None:
    parts.header["__metadata__"] = {"format": "x" * 20_000}


@hostile("metadata_refused")
def metadata_that_is_nested(parts: Parts) -> None:
    parts.header["__metadata__"] = {"format": {"pt": 1}}


@hostile("digest_mismatch")
def another_digest(parts: Parts) -> None:
    parts.sha256 = "0" * 64


@hostile("not_finite")
def not_a_number(parts: Parts) -> None:
    start = parts.first()["data_offsets"][0]
    parts.data = parts.data[:start] + struct.pack("<f", float("nan")) + parts.data[start + 4 :]


@hostile("not_finite")
def infinite(parts: Parts) -> None:
    end = parts.first()["data_offsets"][1]
    parts.data = parts.data[: end - 4] + struct.pack("<f", float("inf")) + parts.data[end:]


@hostile("canary_failed")
def weights_that_answer_otherwise(parts: Parts) -> None:
    parts.data = struct.pack("<f", 1e6) * (len(parts.data) // 4)


@hostile("shape_mismatch")
def golden_inputs_of_another_shape(parts: Parts) -> None:
    parts.golden = save(
        {"inputs": torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "outputs": torch.zeros(2, 10)}
    )


@hostile("keys_mismatch")
def golden_without_outputs(parts: Parts) -> None:
    parts.golden = save({"inputs": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})


@hostile("not_finite")
def golden_that_is_no_number(parts: Parts) -> None:
    outputs = torch.full((2, 10), float("nan"))
    inputs = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    parts.golden = save({"inputs": inputs, "outputs": outputs})


@hostile("network_refused")
def a_class_by_its_path(parts: Parts) -> None:
    parts.manifest["network"]["name"] = "models.cnn:CNN"


@hostile("network_refused")
def a_class_of_the_system(parts: Parts) -> None:
    parts.manifest["network"] = {"name": "os:system", "options": {"command": "touch /tmp/x"}}


@hostile("network_refused")
def an_unknown_network(parts: Parts) -> None:
    parts.manifest["network"]["name"] = "resnet"


@hostile("network_refused")
def a_giant_network(parts: Parts) -> None:
    parts.manifest["network"]["options"]["width"] = 10**9


@hostile("network_refused")
def an_option_that_is_none(parts: Parts) -> None:
    parts.manifest["network"]["options"]["weights"] = "DEFAULT"


@hostile("manifest_refused")
def a_manifest_that_is_no_json(parts: Parts) -> None:
    parts.manifest_text = b"not json"


@hostile("manifest_refused")
def a_manifest_with_a_key_twice(parts: Parts) -> None:
    text = json.dumps(parts.manifest)
    parts.manifest_text = (text[:-1] + ', "labels": ["x"]}').encode()


@hostile("manifest_refused")
def a_manifest_nested_deeply(parts: Parts) -> None:
    parts.manifest_text = b'{"metrics":' + b"[" * 50_000 + b"]" * 50_000 + b"}"


@hostile("manifest_refused")
def a_field_that_nobody_knows(parts: Parts) -> None:
    parts.manifest["pickle"] = "gASV"


@hostile("manifest_refused")
def a_step_that_nobody_knows(parts: Parts) -> None:
    parts.manifest["preprocessing"]["steps"].append({"step": "eval"})


@hostile("manifest_refused")
def an_input_that_would_fill_the_memory(parts: Parts) -> None:
    for step in parts.manifest["preprocessing"]["steps"]:
        if step["step"] == "resize":
            step["size"] = [4096, 4096]


@hostile("manifest_refused")
def labels_that_do_not_fit(parts: Parts) -> None:
    parts.manifest["labels"] = ["one"]


@hostile("weights_too_large")
def more_than_the_network_has(parts: Parts) -> None:
    parts.data += bytes(2 << 20)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_cnn(ModelStore(tmp_path_factory.mktemp("elsewhere")), "digits", seed=7).folder


@pytest.fixture
def parts(published: Path) -> Parts:
    return Parts(published)


def left_behind(store: ModelStore) -> list[Path]:
    uploads = store.folder.parent / "uploads"
    found = [path for path in uploads.rglob("*") if path.name != ".lock"]
    return [*found, *store.folder.glob("stranger*"), *store.folder.rglob(".staging-*")]


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 45


def test_the_unchanged_upload_is_taken(client: TestClient, parts: Parts) -> None:
    answer = client.post(URL, files=parts.form())
    assert answer.status_code == 200, answer.text


@pytest.mark.changes_nothing
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_has_a_name_and_leaves_no_trace(
    client: TestClient, store: ModelStore, parts: Parts, name: str
) -> None:
    code, change = HOSTILE[name]
    change(parts)
    answer = client.post(URL, files=parts.form())
    found = answer.json()["error"]
    # Too many bytes are refused while they come, where the manifest came first.
    codes = {code, "body_too_large"} if code == "weights_too_large" else {code}
    assert found["code"] in codes, found
    assert answer.status_code == (413 if code == "weights_too_large" else 422)
    assert store.names() == ["digits"]
    assert left_behind(store) == []


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"../weights.safetensors": b"x"}, "archive_refused"),
        ({"/etc/passwd": b"x"}, "archive_refused"),
        ({"weights.pt": b"x"}, "archive_refused"),
        ({"inner.zip": b"x"}, "archive_refused"),
        ({"model.py": b"import os"}, "files_unexpected"),
        ({"deep/weights.safetensors": b"x"}, "files_unexpected"),
        ({"golden.safetensors": bytes(3 << 20)}, "archive_refused"),
        ({WEIGHTS: bytes(5 << 20)}, "archive_refused"),
    ],
)
def test_hostile_archives(
    client: TestClient, store: ModelStore, parts: Parts, members: dict[str, bytes], code: str
) -> None:
    fine = {MANIFEST: json.dumps(parts.manifest).encode(), WEIGHTS: parts.weights_bytes()}
    body = zipped({**fine, **members})
    answer = client.post(URL, content=body, headers={"content-type": "application/zip"})
    assert answer.status_code in (413, 422), answer.text
    codes = {code, "archive_too_large", "body_too_large"} if len(body) > 3000 else {code}
    assert answer.json()["error"]["code"] in codes, answer.text
    assert left_behind(store) == []


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"\x80\x04", "application/x-pytorch", 415),
        (b"no archive", "application/zip", 422),
        (b"", "application/zip", 422),
        (b"{}", "application/json", 415),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"garbage", "multipart/form-data", 400),
        (b"--x\r\nA: b\r\n\r\n\r\n--x--\r\n", "multipart/form-data; boundary=x", 400),
    ],
)
def test_bodies_that_are_no_checkpoint(
    client: TestClient, store: ModelStore, content: bytes, content_type: str, status: int
) -> None:
    answer = client.post(URL, content=content, headers={"content-type": content_type})
    assert answer.status_code == status, answer.text
    assert left_behind(store) == []


def test_a_manifest_cannot_claim_anothers_run(
    client: TestClient, store: ModelStore, parts: Parts
) -> None:
    parts.manifest["lineage"]["run"] = "run-1"
    client.post(URL, files=parts.form())
    assert store.version("stranger", 1).manifest().lineage.run is None


TENSORS = {"a": torch.zeros(2, 3), "b": torch.arange(4), "c": torch.ones(1, dtype=torch.float16)}
VALID = save(TENSORS)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_we_accept_the_reference_accepts(data: st.DataObject) -> None:
    """A valid file with a few bytes changed: we are never the more lenient ones."""
    changed = bytearray(copy.copy(VALID))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        path.write_bytes(changed)
        try:
            check_tensor_file(path, {name: Expected.like(one) for name, one in TENSORS.items()})
        except IntakeRefused:
            return
        try:
            with safe_open(path, framework="pt") as opened:
                assert {*opened.keys()} == TENSORS.keys()
        except SafetensorError as error:
            pytest.fail(f"the reference refuses what we accept: {error}")
