"""Datasets: every form gives the same thing, and everything wrong is said at once, with names."""

import contextlib
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from models.backbones import picture_preprocessing
from training.config import DataConfig
from training.datasets import Dataset, open_dataset
from training.faults import DatasetFaults, DatasetUnavailable
from training.feed import feed_for, in_batches
from training.order import in_turn
from training.progress import drive
from training.samples import InMemory
from training.source import class_names
from training.split import hold_out

CPU = torch.device("cpu")


def opened(path: Path | str, pairs: Any = None, **settings: Any) -> Dataset:
    return drive(open_dataset(DataConfig.of(dataset=str(path), **settings), pairs=pairs))


def faults_of(path: Path, **settings: Any) -> tuple[str, ...]:
    with pytest.raises(DatasetFaults) as caught:
        opened(path, **settings)
    for fault in caught.value.faults:
        assert fault in str(caught.value)
    return caught.value.faults


def noise(seed: int, side: int = 12, channels: int = 3) -> Image.Image:
    shape = (side, side, channels) if channels == 3 else (side, side)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_folder(root: Path, num: int = 6, suffix: str = "png", **look: Any) -> Path:
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for index in range(num):
            noise(index + 100 * (name == "dogs"), **look).save(root / name / f"{index}.{suffix}")
    return root


def all_inputs(dataset: Dataset, part: str = "train", num_workers: int = 0) -> Tensor:
    batches = in_batches(dataset.parts[part], dataset.preprocessing.finish, 4, num_workers)
    return torch.cat([inputs for inputs, _ in batches])


# Forms


def test_digits_are_read_without_scikit_learn_and_split_alike_every_time() -> None:
    dataset = opened("digits")
    sizes = {name: len(part) for name, part in dataset.parts.items()}
    assert dataset.classes == tuple("0123456789")
    assert sizes == {"train": 1458, "validation": 160, "test": 179}
    assert dataset.preprocessing.raw_shape == (1, 8, 8)
    assert dataset.fingerprint == opened("digits", validation_fraction=0).fingerprint
    assert torch.equal(dataset.train.targets, opened("digits").train.targets)


@pytest.mark.slow
def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train = opened("digits", validation_fraction=0, test_fraction=0).train
    assert isinstance(train.samples, InMemory)
    pixels = train.samples.data.view(-1, 64).double()
    assert torch.allclose(pixels / 255, torch.from_numpy(images) / 16, atol=0.5 / 255)
    assert train.targets.tolist() == labels.tolist()


@pytest.mark.slow
def test_mnist_is_read_where_it_lies(real_data: Path) -> None:
    if not (real_data / "mnist").is_dir():
        pytest.skip("no MNIST among the real data")
    dataset = opened("mnist", data_root=str(real_data))
    assert {name: len(part) for name, part in dataset.parts.items()} == {
        "train": 54_001,
        "validation": 5_999,
        "test": 10_000,
    }
    normalize = dataset.preprocessing.steps[-1]
    assert (normalize.mean, normalize.std) == ((0.1303,), (0.3076,))


def test_a_picture_folder_is_decoded_and_normalised(tmp_path: Path) -> None:
    dataset = opened(picture_folder(tmp_path / "pets"))
    assert (dataset.name, dataset.classes) == ("pets", ("cats", "dogs"))
    assert dataset.preprocessing.raw_shape == (3, 12, 12)
    inputs = all_inputs(dataset)
    assert torch.allclose(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-2)


def test_a_folder_may_hold_its_own_parts(tmp_path: Path) -> None:
    for part in ("train", "val"):
        picture_folder(tmp_path / part)
    dataset = opened(tmp_path)
    assert {name: len(part) for name, part in dataset.parts.items()} == {
        "train": 12,
        "validation": 12,
    }
    assert dataset.measured_on == "validation"


def test_large_or_oblong_pictures_are_brought_to_one_size(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "a", side=80)
    noise(1).resize((100, 60)).save(folder / "cats" / "oblong.png")
    assert opened(folder).preprocessing.raw_shape == (3, 64, 64)
    assert opened(folder, picture_size=24).preprocessing.raw_shape == (3, 24, 24)


def test_grey_pictures_stay_grey(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "a", channels=1)
    assert opened(folder).preprocessing.raw_shape == (1, 12, 12)
    noise(1).save(folder / "cats" / "colour.png")
    assert opened(folder).preprocessing.raw_shape == (3, 12, 12)


def test_a_csv_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "flowers.csv"
    rows = [[i, i * i, "late" if i > 20 else "early"] for i in range(40)]
    path.write_text("width,length,kind\n" + "\n".join(",".join(map(str, row)) for row in rows))
    dataset = opened(path, label_column="kind")
    assert dataset.classes == ("early", "late")
    assert dataset.preprocessing.raw_shape == (2,)
    assert torch.allclose(all_inputs(dataset).mean(0), torch.zeros(2), atol=1e-2)


def test_a_csv_of_paths_and_without_a_header(tmp_path: Path) -> None:
    picture_folder(tmp_path / "pets")
    lines = [f"pets/{kind}/{i}.png,{kind}" for kind in ("dogs", "cats") for i in range(6)]
    (tmp_path / "pets.csv").write_text("\n".join(lines))
    by_table, by_folder = opened(tmp_path / "pets.csv"), opened(tmp_path / "pets")
    assert by_table.classes == by_folder.classes
    assert len(by_table.train) == len(by_folder.train)


def test_an_npz_of_pictures_in_any_order_of_dimensions(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (30, 10, 10), dtype=np.uint8)
    labels = np.arange(30) % 3
    np.savez(tmp_path / "a.npz", x=grey, y=labels)
    np.savez(tmp_path / "b.npz", x=grey[..., None], y=labels.astype(str))
    np.savez(tmp_path / "c.npz", x_train=grey[:, None], y_train=labels, x_test=grey, y_test=labels)
    datasets = [opened(tmp_path / f"{name}.npz") for name in "abc"]
    assert {dataset.preprocessing.raw_shape for dataset in datasets} == {(1, 10, 10)}
    assert datasets[0].fingerprint == datasets[1].fingerprint
    assert torch.equal(all_inputs(datasets[0]), all_inputs(datasets[1]))
    assert len(datasets[2].test or ()) == 30


def test_pairs_of_anything_and_a_torch_dataset_are_one_dataset() -> None:
    images = [noise(index, channels=1) for index in range(20)]
    labels = [index % 2 for index in range(20)]
    pixels = torch.stack([torch.from_numpy(np.array(image))[None] for image in images])
    forms: list[Any] = [
        list(zip(images, labels, strict=True)),
        list(zip(pixels, labels, strict=True)),
        TensorDataset(pixels, torch.tensor(labels)),
    ]
    inputs = [all_inputs(opened("digits", pairs=form)) for form in forms]
    assert torch.equal(inputs[0], inputs[1])
    assert torch.equal(inputs[1], inputs[2])


# Held in memory or streamed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_is_resident(num_workers: int, tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    resident = opened(folder)
    streamed = opened(folder, memory_budget_mb=0, num_workers=num_workers)
    assert isinstance(resident.train.samples, InMemory)
    assert not isinstance(streamed.train.samples, InMemory)
    assert streamed.fingerprint == resident.fingerprint
    assert streamed.preprocessing == resident.preprocessing
    assert torch.equal(all_inputs(resident), all_inputs(streamed, num_workers=num_workers))


def test_training_and_serving_see_the_same_tensor(tmp_path: Path) -> None:
    dataset = opened(picture_folder(tmp_path / "pets", suffix="jpg", side=40), picture_size=16)
    inputs = all_inputs(dataset)
    steps = dataset.preprocessing
    for index, kept in enumerate(_kept_files(dataset, tmp_path / "pets")):
        served = steps.finish(steps.picture(kept.read_bytes()).unsqueeze(0))
        assert torch.equal(inputs[index], served[0])


def _kept_files(dataset: Dataset, folder: Path) -> list[Path]:
    """The files of the training part: those whose pixels are in it, in its order."""
    files = sorted(folder.rglob("*.jpg"))
    by_pixels = {dataset.preprocessing.picture(f.read_bytes()).numpy().tobytes(): f for f in files}
    samples = dataset.train.samples
    return [by_pixels[samples.read(i)[0].numpy().tobytes()] for i in range(len(samples))]


def test_pixels_in_memory_are_what_their_file_would_be() -> None:
    dataset = opened("digits")
    pixels = dataset.train.samples.read(0)[0]
    file = io.BytesIO()
    Image.fromarray(pixels[0].numpy()).save(file, "PNG")
    assert torch.equal(dataset.preprocessing.picture(file.getvalue()), pixels)


def test_a_models_own_preprocessing_is_used_where_one_is_given() -> None:
    steps = picture_preprocessing(20, 16, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    dataset = drive(open_dataset(DataConfig.of(dataset="digits"), steps))
    assert dataset.preprocessing is steps
    sample = dataset.train.samples.read(0)[0]
    assert sample.shape == (3, 16, 16)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    dataset = opened(picture_folder(tmp_path / "pets"), memory_budget_mb=0)
    for path in (tmp_path / "pets" / "cats").iterdir():
        path.unlink()
    with pytest.raises(DatasetFaults, match=r"cats/\d\.png"):
        list(feed_for(dataset.train, CPU, 0)(in_turn(len(dataset.train), 4)))


# The split


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
)
def test_a_split_is_complete_seeded_and_alike_in_every_class(
    counts: list[int], fraction: float, seed: int
) -> None:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    kept, held = hold_out(targets, fraction, seed, "test")
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(len(targets)))
    assert torch.equal(held, hold_out(targets, fraction, seed, "test")[1])
    for label, count in enumerate(counts):
        num_held = int((targets[held] == label).sum())
        assert num_held < count
        assert abs(num_held - count * fraction) <= 1


def test_validation_and_test_are_drawn_independently() -> None:
    targets = torch.zeros(100, dtype=torch.int64)
    draws = [hold_out(targets, 0.5, 0, purpose)[1].tolist() for purpose in ("test", "validation")]
    assert draws[0] != draws[1]


def test_class_names_keep_the_order_of_numbers() -> None:
    assert class_names([10, 9, 2]) == ("2", "9", "10")
    assert class_names(["b10", "b9", "a"]) == ("a", "b10", "b9")


# Faults


def test_every_fault_of_a_folder_is_listed_at_once(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    (folder / "birds").mkdir()
    (folder / "cats" / "notes.txt").write_text("hello")
    (folder / "dogs" / "list.csv").write_text("a,b")
    assert faults_of(folder) == (
        "birds: no pictures in this class folder",
        "cats/notes.txt: not a picture; JPEG, PNG and WebP are read",
        "dogs/list.csv: not a picture; JPEG, PNG and WebP are read",
    )


@pytest.mark.parametrize("memory_budget_mb", [0, 100])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_picture_that_cannot_be_read_is_listed_at_once(
    memory_budget_mb: int, num_workers: int, tmp_path: Path
) -> None:
    folder = picture_folder(tmp_path / "pets", num=40)
    (folder / "cats" / "3.png").write_bytes(b"")
    (folder / "dogs" / "7.png").write_bytes((folder / "dogs" / "7.png").read_bytes()[:200])
    (folder / "dogs" / "text.jpg").write_text("this is no picture")
    faults = faults_of(folder, memory_budget_mb=memory_budget_mb, num_workers=num_workers)
    assert [fault.partition(": ")[0] for fault in faults] == [
        "cats/3.png",
        "dogs/7.png",
        "dogs/text.jpg",
    ]


def test_a_stray_gif_is_skipped_with_a_word(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    noise(5).save(folder / "cats" / "stray.gif")
    (folder / "cats" / ".DS_Store").write_bytes(b"x")
    dataset = opened(folder)
    assert dataset.notes == ("cats/stray.gif: skipped; JPEG, PNG and WebP are read",)


def test_a_class_that_training_lacks_is_a_fault(tmp_path: Path) -> None:
    for part in ("train", "test"):
        picture_folder(tmp_path / part)
    (tmp_path / "test" / "dogs").rename(tmp_path / "test" / "wolves")
    assert faults_of(tmp_path) == (
        "test/wolves: no class of this name among the training ones",
        "test/dogs: no pictures in this class folder",
    )


def test_one_label_is_no_dataset(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,a\n2,a\n")
    assert faults_of(path) == ("all labels are 'a'; two are needed",)
    path.write_text("x\na\nb\n")
    assert faults_of(path) == ("a.csv: a label and another column are needed",)


def test_one_class_is_none(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pets")
    for path in (folder / "dogs").iterdir():
        path.unlink()
    (folder / "dogs").rmdir()
    assert "two class folders or more are needed; there is only 'cats'" in faults_of(folder)[0]


def test_every_fault_of_a_csv_is_listed_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y,kind\n1,2,a\n1,2\n1,b,a\n1,2,\n1,inf,b\n1,2,3,4\n")
    assert faults_of(path) == (
        "line 3: 2 cells where 3 are wanted",
        "line 4, column y: 'b' is not a finite number",
        "line 5: the label in column kind is empty",
        "line 6, column y: 'inf' is not a finite number",
        "line 7: 4 cells where 3 are wanted",
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "there are no rows"),
        (b"\xff\xfe\x00", "not a CSV file in UTF-8"),
        (b"a.png,cat\nb.png,dog\nc.png,dog\n", "no file 'b.png' beside the CSV"),
        (b"file,kind\n../../etc/passwd,dog\n", "no file '../../etc/passwd' beside the CSV"),
    ],
)
def test_a_csv_that_is_wrong_as_a_whole(content: bytes, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert any(fault in found for found in faults_of(path))


def test_a_missing_label_column_names_those_there_are(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n1,a\n")
    assert faults_of(path, label_column="z") == ("a.csv: no column 'z'; there are x, y",)


@given(text=st.text(max_size=200))
def test_any_text_as_csv_is_a_dataset_or_faults(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(DatasetFaults):
        assert len(opened(path).classes) >= 2


def bad_npz() -> dict[str, tuple[Callable[[Path], None], str]]:
    x, y = np.zeros((4, 3), dtype=np.float32), np.arange(4)
    hole = x.copy()
    hole[2, 1] = np.nan
    return {
        "text": (lambda p: p.write_bytes(b"PK nothing") and None, "not a readable NPZ file"),
        "no y": (lambda p: np.savez(p, x=x), "arrays x and y"),
        "lengths": (lambda p: np.savez(p, x=x, y=y[:3]), "x has 4 samples and y has 3"),
        "objects": (
            lambda p: np.savez(p, x=x, y=np.array([{}] * 4, dtype=object)),
            "not a readable NPZ file",
        ),
        "float labels": (lambda p: np.savez(p, x=x, y=y / 2), "y must be whole numbers or texts"),
        "hole": (lambda p: np.savez(p, x=hole, y=y), "train sample 2: a number in it"),
        "flat": (lambda p: np.savez(p, x=y, y=y), "x must be numbers [N, ...]"),
    }


@pytest.mark.parametrize("kind", bad_npz())
def test_a_wrong_npz_is_refused_by_a_sentence(kind: str, tmp_path: Path) -> None:
    write, fault = bad_npz()[kind]
    write(tmp_path / "a.npz")
    assert any(fault in found for found in faults_of(tmp_path / "a.npz"))


def test_items_that_differ_in_shape_are_named() -> None:
    pairs = [(torch.zeros(3), 0), (torch.zeros(3), 1), (torch.zeros(4), 0), (torch.zeros(3), 1)]
    with pytest.raises(DatasetFaults, match=r"item 2: shape \[4\] where others have \[3\]"):
        opened("digits", pairs=pairs)


def test_nothing_is_no_dataset() -> None:
    with pytest.raises(DatasetFaults, match="there are no pairs"):
        opened("digits", pairs=[])
    with pytest.raises(DatasetUnavailable, match="neither one of digits, mnist"):
        opened("no-such-thing")


def test_a_long_list_of_faults_is_cut_in_the_message_only() -> None:
    error = DatasetFaults("x", [f"line {number}: wrong" for number in range(150)])
    assert len(error.faults) == 150
    assert str(error).endswith("and 50 more")


def test_a_row_of_a_csv_may_hold_quotes(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["x", "kind"], *([i, 'a "b", c'] for i in range(4)), [9, "d"]])
    assert opened(tmp_path / "a.csv").classes == ('a "b", c', "d")
