"""Datasets over HTTP: sent, checked, looked at, changed; hostile ones refused by name."""

import base64
import csv
import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from training.config import DataConfig
from training.dataset_manifest import SampleRecord
from training.dataset_store import DatasetStore, fingerprint_of
from training.datasets import open_dataset
from training.progress import drive

URL = "/v1/datasets"
ZIP = {"content-type": "application/zip"}


def picture(seed: int, size: tuple[int, int] = (40, 32), kind: str = "PNG") -> bytes:
    """Smooth noise, so that no two look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def zipped(files: dict[str, bytes], order: int = 1) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in list(files.items())[::order]:
            archive.writestr(name, data)
    return file.getvalue()


def two_classes(num: int = 12) -> dict[str, bytes]:
    files = {f"set/train/ant/{index}.png": picture(index) for index in range(num)}
    files |= {f"set/train/bee/{index}.png": picture(100 + index) for index in range(num)}
    return files | {
        "set/val/ant/a.png": picture(201),
        "set/val/bee/b.jpg": picture(202, kind="JPEG"),
    }


def send(client: TestClient, files: dict[str, bytes], **params: str) -> Any:
    return client.post(URL, content=zipped(files), headers=ZIP, params=params)


def kinds(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {fault["kind"]: fault for fault in document["report"]["faults"]}


def test_a_zip_of_class_folders_becomes_a_dataset(client: TestClient) -> None:
    answer = send(client, two_classes(), name="insects")
    assert answer.status_code == 201, answer.text
    document = answer.json()
    assert document["report"]["usable"]
    assert document["report"]["classes"] == {
        "ant": {"train": 12, "validation": 1},
        "bee": {"train": 12, "validation": 1},
    }
    listed = client.get(URL).json()
    assert [one["name"] for one in listed["data"]] == ["insects"]
    assert client.get(f"{URL}/{document['id']}").json() == document


def test_the_same_samples_are_the_same_dataset_in_whatever_order(client: TestClient) -> None:
    first = send(client, two_classes()).json()
    body = zipped(two_classes(), order=-1)
    again = client.post(URL, files={"file": ("other.zip", body, "application/zip")})
    assert again.status_code == 200
    assert again.json()["fingerprint"] == first["fingerprint"]
    assert again.json()["id"] == first["id"]


def test_all_faults_are_told_at_once(client: TestClient) -> None:
    files = two_classes()
    files["set/train/ant/cut.png"] = picture(300)[:200]
    files["set/train/ant/moving.gif"] = b"GIF89a"
    files["set/train/bee/words.png"] = b"not a picture at all"
    files["set/train/bee/again.png"] = files["set/train/bee/0.png"]
    files["set/train/bee/stray.png"] = files["set/train/ant/1.png"]
    files["set/val/ant/seen.png"] = files["set/train/ant/2.png"]
    files["set/.DS_Store"] = b"x"
    answer = send(client, files)
    assert answer.status_code in (201, 422), answer.text
    document = answer.json().get("dataset", answer.json())
    found = kinds(document)
    assert "set/train/ant/cut.png" in found["unreadable"]["files"][0]
    assert "words.png" in found["wrong_type"]["files"][0]
    assert found["skipped"]["files"] == ["set/train/ant/moving.gif"]
    assert set(found["exact_duplicates"]["files"]) == {
        "set/train/bee/0.png",
        "set/train/bee/again.png",
    }
    assert "set/train/bee/stray.png" in found["exact_conflicts"]["files"]
    assert "set/val/ant/seen.png" in found["exact_leakage"]["files"]
    assert found["litter"]["severity"] == "note"


def test_pictures_that_look_alike_are_found_across_parts(client: TestClient) -> None:
    files = two_classes()
    image = Image.open(io.BytesIO(files["set/train/ant/3.png"]), formats=["PNG"])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    files["set/val/ant/near.jpg"] = file.getvalue()
    found = kinds(send(client, files).json())
    assert set(found["near_leakage"]["files"]) == {"set/train/ant/3.png", "set/val/ant/near.jpg"}


def test_nothing_to_learn_is_refused_and_can_be_mended(client: TestClient) -> None:
    files = {f"ant/{index}.png": picture(index) for index in range(3)} | {"bee/x.png": b"words"}
    answer = send(client, files)
    assert answer.status_code == 422
    body = answer.json()
    assert "bee has no sample to learn from" in body["error"]["message"]
    add = [
        {"name": "b.png", "label": "bee", "picture": base64.b64encode(picture(50)).decode()},
    ]
    mended = client.post(f"{URL}/{body['dataset']['id']}/derive", json={"add": add})
    assert mended.status_code == 200, mended.text
    assert mended.json()["parent"] == body["dataset"]["id"]
    assert mended.json()["report"]["usable"]


def test_derive_drops_relabels_renames_and_moves(client: TestClient, store: Any) -> None:
    files = two_classes() | {"set/train/bee/again.png": two_classes()["set/train/bee/0.png"]}
    base = send(client, files).json()
    changes = {
        "drop": ["set/train/ant/0.png"],
        "drop_faults": ["exact_duplicates"],
        "relabel": {"set/train/ant/1.png": "bee"},
        "rename": {"ant": "formica"},
        "move": {"set/train/ant/2.png": "validation"},
    }
    answer = client.post(f"{URL}/{base['id']}/derive", json=changes)
    assert answer.status_code == 200, answer.text
    assert answer.json()["report"]["classes"] == {
        "bee": {"train": 13, "validation": 1},
        "formica": {"train": 9, "validation": 2},
    }
    home = store.folder.parent / "datasets"
    one = DatasetStore(home).get(answer.json()["id"])
    assert all(one.file(sample).stat().st_nlink == 2 for sample in one.samples())


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": ["nothing.png"]}, "no sample 'nothing.png'"),
        ({"rename": {"wasp": "bee"}}, "no class 'wasp'"),
        ({"move": {"set/train/ant/0.png": "nowhere"}}, "none of train"),
        ({"drop_faults": ["magic"]}, "no fault 'magic'"),
        ({"colour": 1}, "colour"),
        ({"add": [{"name": "a", "label": "b", "picture": "%"}]}, "not base64"),
        ({"add": [{"name": "a", "label": "b", "picture": "aGk="}]}, ""),
    ],
)
def test_changes_that_cannot_be_made(
    client: TestClient, changes: dict[str, Any], words: str
) -> None:
    base = send(client, two_classes()).json()
    answer = client.post(f"{URL}/{base['id']}/derive", json=changes)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_stored_dataset_is_opened_by_training(client: TestClient, store: Any) -> None:
    document = send(client, two_classes()).json()
    folder = store.folder.parent / "datasets" / document["id"]
    dataset = drive(open_dataset(DataConfig.of(dataset=str(folder), picture_size=16)))
    assert dataset.classes == ("ant", "bee")
    assert {name: len(part) for name, part in dataset.parts.items()} == {
        "train": 24,
        "validation": 2,
    }
    assert dataset.train.samples.name(0) == "set/train/ant/0.png"


def test_a_table_of_labels_in_a_zip(client: TestClient) -> None:
    files = {f"pictures/{index}.png": picture(index) for index in range(24)}
    rows = ["file,label,split"]
    rows += [f"{name},{'even' if i % 2 == 0 else 'odd'},train" for i, name in enumerate(files)]
    rows.append("pictures/gone.png,odd,val")
    files["labels.csv"] = "\n".join(rows).encode()
    document = send(client, files).json()
    assert document["report"]["classes"] == {"even": {"train": 12}, "odd": {"train": 12}}
    assert kinds(document)["missing"]["files"] == ["line 26: pictures/gone.png"]


def rows(kind: str) -> tuple[str, bytes]:
    """Thirty rows of three classes, as an NPZ or a CSV."""
    x = np.random.default_rng(0).random((30, 4), dtype=np.float32)
    if kind == "npz":
        return "numbers.npz", npz(x=x, y=np.arange(30) % 3 + 8)
    lines = [",".join(map(str, [*row, f"c{index % 3}"])) for index, row in enumerate(x)]
    return "numbers.csv", "\n".join(lines).encode()


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_rows_of_numbers_are_dropped_relabelled_renamed_and_moved(
    client: TestClient, store: Any, kind: str
) -> None:
    names = ["8", "9", "10"] if kind == "npz" else ["c0", "c1", "c2"]
    base = client.post(URL, files={"file": rows(kind)}).json()
    assert base["classes"] == names
    listed = client.get(f"{URL}/{base['id']}/samples").json()["data"]
    changes = {
        "drop": ["train 0", listed[1]["sha256"]],
        "relabel": {"train 3": names[1]},
        "rename": {names[2]: "rest"},
        "move": {"train 4": "validation", "train 5": "validation"},
    }
    answer = client.post(f"{URL}/{base['id']}/derive", json=changes)
    assert answer.status_code == 200, answer.text
    derived = answer.json()
    assert (derived["parent"], derived["num_samples"]) == (base["id"], 28)
    assert derived["report"]["classes"]["rest"] == {"train": 9, "validation": 1}
    after = client.get(f"{URL}/{derived['id']}/samples").json()["data"]
    assert {one["sha256"] for one in after} == {one["sha256"] for one in listed[2:]}
    labels = {one["sha256"]: (one["label"], one["part"]) for one in after}
    assert labels[listed[3]["sha256"]] == (names[1], "train")
    assert labels[listed[5]["sha256"]] == ("rest", "validation")
    # It opens like any other, and once more.
    folder = store.folder.parent / "datasets" / derived["id"]
    opened = drive(open_dataset(DataConfig.of(dataset=str(folder))))
    assert len(opened.parts["validation"]) == 2
    again = client.post(f"{URL}/{derived['id']}/derive", json={"drop": ["train 0"]})
    assert again.json()["num_samples"] == 27


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"drop": ["train 99"]}, "there is no sample 'train 99'"),
        ({"move": {f"train {index}": "test" for index in range(30)}}, "x_train"),
        ({"drop": [f"train {index}" for index in range(30)]}, "x and y"),
        (
            {"add": [{"name": "a", "label": "8", "picture": base64.b64encode(b"x").decode()}]},
            "can be dropped, relabelled, renamed and moved",
        ),
    ],
)
def test_what_rows_of_numbers_cannot_do_is_said(
    client: TestClient, changes: dict[str, Any], words: str
) -> None:
    base = client.post(URL, files={"file": rows("npz")}).json()
    answer = client.post(f"{URL}/{base['id']}/derive", json=changes)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["error"]["message"]


def test_grey_pictures_in_arrays_stay_what_they_were(client: TestClient) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 5, 3), dtype=np.uint8)
    grey = np.random.default_rng(1).integers(0, 256, (20, 3, 3), dtype=np.uint8)
    for x in (pixels, grey):
        base = client.post(URL, files={"file": ("a.npz", npz(x=x, y=np.arange(20) % 2))}).json()
        before = client.get(f"{URL}/{base['id']}/samples").json()["data"]
        one = client.post(f"{URL}/{base['id']}/derive", json={"drop": ["train 0"]}).json()
        after = client.get(f"{URL}/{one['id']}/samples").json()["data"]
        assert [sample["sha256"] for sample in after] == [s["sha256"] for s in before[1:]]


def test_numbers_come_as_npz_or_csv(client: TestClient) -> None:
    file = io.BytesIO()
    generator = np.random.default_rng(0)
    np.savez(file, x=generator.random((30, 4), dtype=np.float32), y=np.arange(30) % 3)
    answer = client.post(URL, files={"file": ("numbers.npz", file.getvalue())})
    assert answer.status_code == 201, answer.text
    assert answer.json()["classes"] == ["0", "1", "2"]
    text = "a,b,kind\n" + "\n".join(f"{i},{i * 2},{'x' if i % 2 else 'y'}" for i in range(30))
    answer = client.post(URL, content=text, headers={"content-type": "text/csv"})
    assert (answer.status_code, answer.json()["classes"]) == (201, ["x", "y"])


def test_an_idempotency_key_leads_to_one_dataset(client: TestClient) -> None:
    headers = ZIP | {"idempotency-key": "k1"}
    body = zipped(two_classes())  # once: a zip holds the time it was made at
    first = client.post(URL, content=body, headers=headers)
    again = client.post(URL, content=body, headers=headers)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = client.post(URL, content=zipped(two_classes(11)), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "conflict")


def test_samples_thumbnails_preview_and_download(client: TestClient) -> None:
    document = send(client, two_classes()).json()
    url = f"{URL}/{document['id']}"
    page = client.get(f"{url}/samples", params={"limit": 5, "label": "bee", "part": "train"}).json()
    assert len(page["data"]) == 5
    assert page["has_more"]
    assert {one["label"] for one in page["data"]} == {"bee"}
    small = client.get(page["data"][0]["thumbnail"])
    assert Image.open(io.BytesIO(small.content), formats=["JPEG"]).size == (40, 32)
    sheet = client.get(f"{url}/preview")
    assert Image.open(io.BytesIO(sheet.content), formats=["JPEG"]).width > 500
    taken = client.get(f"{url}/download")
    assert taken.content == client.get(f"{url}/download").content
    again = client.post(URL, content=taken.content, headers=ZIP)
    assert again.json()["fingerprint"] == document["fingerprint"]


def test_a_deleted_dataset_is_gone(client: TestClient) -> None:
    document = send(client, two_classes()).json()
    assert client.delete(f"{URL}/{document['id']}").json()["deleted"]
    answer = client.get(f"{URL}/{document['id']}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert client.get(URL).json()["data"] == []


def test_what_a_model_sees_is_compared(client: TestClient) -> None:
    document = send(client, two_classes(), model="digits").json()
    assert "colours" in kinds(document)
    assert send(client, two_classes(), model="wasps").status_code == 404


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def lying_npz(shape: str) -> bytes:
    """An array whose header says more than it holds."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    return zipped({"x.npy": array + b"\0" * 16, "y.npy": array + b"\0" * 16})


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("a.zip", b"", 422),
        ("a.zip", b"no zip", 422),
        ("a.zip", zipped({"../x/a.png": picture(1)}), 422),
        ("a.zip", zipped({"/etc/a.png": picture(1)}), 422),
        ("a.zip", zipped({}), 422),
        ("a.zip", zipped({"a.png": picture(1)}), 422),
        ("a.npz", npz(x=np.zeros((4, 2)), z=np.zeros(4)), 422),
        ("a.npz", npz(x=np.array([{}, {}], dtype=object), y=np.zeros(2)), 422),
        ("a.npz", lying_npz("(1000000000000, )"), 422),
        ("a.npz", lying_npz("(1000000000, 0)"), 422),
        ("a.npz", lying_npz("(" * 2000), 422),
        ("a.csv", b"a,b\n1,2\n1\n", 422),
        ("a.csv", b"\xff\xfe\x00", 422),
        ("a.csv", b"a,b\n1,\x00\n2,3\n", 422),
        ("a.csv", b"file,label\n../../etc/passwd,a\n/etc/hosts,b\n", 422),
        ("a.tar", b"x", 415),
    ],
)
def test_hostile_and_broken_files(
    client: TestClient, store: Any, name: str, body: bytes, status: int
) -> None:
    answer = client.post(URL, files={"file": (name, body, "application/x-unknown")})
    assert answer.status_code == status, answer.text
    assert "error" in answer.json()
    folder = store.folder.parent / "datasets"
    left = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    assert not [one for one in left if one.startswith(".staging") or one.endswith(".upload")]


def test_two_files_in_one_form_and_none(client: TestClient) -> None:
    body = zipped(two_classes())
    two = [("file", ("a.zip", body)), ("file", ("b.zip", body))]
    assert "holds 2 files" in client.post(URL, files=two).json()["error"]["message"]
    none = client.post(URL, files={"picture": ("a.zip", b"x")})
    assert "holds 0 files" in none.json()["error"]["message"]


def test_the_corpus_as_a_dataset_names_every_file(client: TestClient, real_data: Path) -> None:
    with (real_data / "images" / "MANIFEST.tsv").open() as file:
        names = [row["file"] for row in csv.DictReader(file, delimiter="\t")]
    files = {f"odd/{Path(name).name}": (real_data / "images" / name).read_bytes() for name in names}
    files |= {f"even/{index}.png": picture(index) for index in range(200)}
    document = send(client, files).json()
    document = document.get("dataset", document)
    told = [text for fault in document["report"]["faults"] for text in fault["files"]]
    readable = document["report"]["classes"]["odd"]["train"]
    named = {name for name in map(Path, names) if any(name.name in text for text in told)}
    assert readable + len(named) >= len(names)


@pytest.mark.slow
def test_ants_and_bees(client: TestClient, real_data: Path) -> None:
    root = real_data / "hymenoptera"
    files = {
        path.relative_to(real_data).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    document = send(client, files).json()
    assert document["num_samples"] == 397
    assert kinds(document)["skipped"]["files"] == ["hymenoptera/train/ants/imageNotFound.gif"]
    assert document["report"]["usable"]


def test_the_example_of_mending_works(client: TestClient) -> None:
    page = (ROOT / "docs" / "datasets.md").read_text("utf-8")
    changes = json.loads(page.split("/derive")[1].split("-d '")[1].split("'")[0])
    files = {f"ants/{index}.jpg": picture(index, kind="JPEG") for index in range(12)}
    files |= {f"bee/{index}.jpg": picture(50 + index, kind="JPEG") for index in range(12)}
    files["ants/again.jpg"] = files["ants/0.jpg"]
    base = send(client, files).json()
    document = client.post(f"{URL}/{base['id']}/derive", json=changes).json()
    assert document["report"]["classes"] == {"ants": {"train": 11}, "bees": {"train": 13}}


def arrays(name: str, x: np.ndarray, y: np.ndarray | None = None) -> tuple[str, bytes]:
    return f"{name}.npz", npz(x=x, y=np.arange(len(x)) % 2 if y is None else y)


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


ODD_NUMBERS = {
    "long doubles": arrays("a", np.zeros((4, 2), np.longdouble)),
    "complex": arrays("a", np.zeros((4, 2), np.complex64)),
    "half a surrogate": arrays("a", np.zeros((2, 2)), np.array(["\ud800", "b"])),
    "an endless label": arrays("a", np.zeros((2, 2)), np.array(["a" * 9999, "b"])),
    "a terminal's label": ("a.csv", b"a,b\n1,\x1b[2J\n2,x\n"),
    "labels short": arrays("a", np.zeros((4, 2)), np.zeros(3, int)),
    "a shape of truth": ("a.npz", zipped({"x.npy": header("(4, True)") + b"\0" * 16})),
    "a type of types": ("a.npz", zipped({"x.npy": header("(4,)", "[('a', '<f4')]") + b"\0" * 16})),
    "a path too long": ("a.csv", b"a,b\n" + b"x" * 5000 + b",1\n" + b"y" * 5000 + b",2\n"),
    "beyond 32 bits": ("a.csv", b"a,b\n1e39,x\n2,y\n"),
    "infinite": ("a.csv", b"a,b\n1e999,x\n2,y\n"),
    "Python's number": ("a.csv", b"a,b\n1_000,x\n2,y\n"),
    "a field of ten megabytes": ("a.csv", b"a,b\n1," + b"x" * 10_000_000 + b"\n"),
    "an open quote": ("a.csv", b'a,b\n"1,x\n2,y\n'),
}


@pytest.mark.changes_nothing
@pytest.mark.parametrize("case", ODD_NUMBERS)
def test_odd_numbers_are_the_sender_s_fault(client: TestClient, store: Any, case: str) -> None:
    answer = client.post(URL, files={"file": ODD_NUMBERS[case]})
    assert answer.status_code == 422, answer.text
    assert str(store.folder.parent) not in answer.text
    assert ".staging" not in answer.text


def test_parts_of_an_npz_must_be_alike(client: TestClient) -> None:
    one, other = np.zeros((4, 2)), np.ones((4, 3))
    y = np.arange(4) % 2
    body = npz(x_train=one, y_train=y, x_test=other, y_test=y)
    answer = client.post(URL, files={"file": ("a.npz", body)})
    assert "the parts differ" in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_table_of_words_takes_no_memory_for_its_faults(client: TestClient) -> None:
    text = b"a,b,c\n" + b"x,y,z\n" * 200_000
    started = time.monotonic()
    answer = client.post(URL, content=text, headers={"content-type": "text/csv"})
    assert answer.status_code == 422
    assert len(answer.content) < 20_000
    assert time.monotonic() - started < 20


def test_a_csv_cannot_ask_which_files_there_are(client: TestClient) -> None:
    """A first line is names or numbers by what it says, not by what lies on this disk."""
    answers = []
    for path in ("/etc/passwd", "/etc/no-such-file"):
        text = f"{path},kind\n1,x\n2,y\n".encode()
        answer = client.post(URL, content=text, headers={"content-type": "text/csv"})
        answers.append((answer.json()["num_samples"], answer.json()["classes"]))
    assert answers[0] == answers[1]


def test_deleting_from_a_store_that_is_not_there(client: TestClient) -> None:
    assert client.delete(f"{URL}/dset-{'0' * 24}").status_code == 404


def test_numbers_keep_their_names_in_training(client: TestClient, store: Any) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 12, 12), dtype=np.uint8)
    document = client.post(URL, files={"file": arrays("a", pixels)}).json()
    folder = store.folder.parent / "datasets" / document["id"]
    listed = {
        one.name: one.sha256 for one in DatasetStore(folder.parent).get(folder.name).samples()
    }
    for size in (0, 8):  # as they are, and through Pillow
        config = DataConfig.of(dataset=str(folder), picture_size=size)
        part = drive(open_dataset(config)).train
        for index in range(len(part)):
            assert part.samples.read(index)[1].hex() == listed[part.samples.name(index)]


def test_a_label_cannot_pass_for_two_samples() -> None:
    def one(sha256: str, label: str) -> SampleRecord:
        return SampleRecord(name="n", part="train", label=label, sha256=sha256)

    honest = [one("a" * 64, "x"), one("b" * 64, "y")]
    forged = [one("a" * 64, f"x\n{'b' * 64} train y")]
    assert fingerprint_of("pictures", honest) != fingerprint_of("pictures", forged)


def test_exact_duplicates_go_but_for_the_first(client: TestClient) -> None:
    """Also where two groups of them look alike, and where a group has several copies."""
    files = two_classes()
    first = picture(1000)
    image = Image.open(io.BytesIO(first), formats=["PNG"])
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    for index in range(3):
        files[f"set/train/ant/copy{index}.png"] = first
        files[f"set/train/ant/kopie{index}.jpg"] = file.getvalue()
    base = send(client, files).json()
    gone = {"drop_faults": ["exact_duplicates"]}
    one = client.post(f"{URL}/{base['id']}/derive", json=gone).json()
    assert one["num_samples"] == base["num_samples"] - 4
    assert "exact_duplicates" not in kinds(one)
    gone = {"drop_faults": ["near_duplicates"]}
    other = client.post(f"{URL}/{one['id']}/derive", json=gone).json()
    assert other["num_samples"] == one["num_samples"] - 1
    assert "near_duplicates" not in kinds(other)


def test_what_leaks_stays_where_it_is_measured(client: TestClient) -> None:
    files = two_classes()
    files["set/val/ant/seen.png"] = files["set/train/ant/5.png"]
    base = send(client, files).json()["dataset"]  # two of 27 are too many
    gone = {"drop_faults": ["exact_leakage"]}
    document = client.post(f"{URL}/{base['id']}/derive", json=gone).json()
    assert document["report"]["classes"]["ant"] == {"train": 11, "validation": 2}
    assert "exact_leakage" not in kinds(document)


def test_a_report_is_of_what_was_just_asked(client: TestClient) -> None:
    plain = send(client, two_classes())
    compared = send(client, two_classes(), model="digits")
    assert plain.json()["id"] == compared.json()["id"]
    assert "colours" not in kinds(plain.json())
    assert "colours" in kinds(compared.json())


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    "changes",
    [
        {"rename": {"ant": ""}},
        {"relabel": {"set/train/ant/0.png": "a" * 300}},
        {"rename": {"ant": "a\nb"}},
        {"add": [{"name": "set/train/ant/0.png", "label": "ant", "picture": ""}]},
    ],
)
def test_changes_hold_to_what_an_upload_may_say(client: TestClient, changes: Any) -> None:
    base = send(client, two_classes()).json()
    if "add" in changes:
        changes["add"][0]["picture"] = base64.b64encode(picture(77)).decode()
    answer = client.post(f"{URL}/{base['id']}/derive", json=changes)
    assert answer.status_code == 422, answer.text


def test_a_change_is_no_way_around_the_limit_of_a_body(client: TestClient) -> None:
    """A dataset streams to disk; what is held in memory keeps to the smaller limit."""
    headers = {"content-type": "application/json", "content-length": str(100 << 20)}
    answer = client.post(f"{URL}/dset-{'0' * 24}/derive", content=b"{}", headers=headers)
    assert answer.status_code == 413


def test_a_check_that_takes_too_long_is_given_up(store: Any) -> None:
    home = store.folder.parent
    settings = Settings(home=home, device="cpu", threads=1, dataset_check_timeout_s=0.01)
    app = create_app(settings)
    files = {f"set/{label}/{i}.png": picture(i) for i in range(200) for label in "ab"}
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = send(client, files)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert [path.name for path in (home / "datasets").iterdir()] == [".lock"]


def test_what_a_killed_server_left_of_an_upload_is_swept(store: Any) -> None:
    datasets = DatasetStore(store.folder.parent / "datasets")
    with datasets.staging() as arrival:
        left = arrival.parent / ".staging-dead"
        left.mkdir()
        (left / "upload").write_bytes(b"half of it")
    datasets.sweep()
    assert not left.exists()
