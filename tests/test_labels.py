"""Class names from files."""

import json

import pytest

from training.labels import LabelsInvalid, labels_for, read_labels


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "ant\nbee\nWespe é\n"),
        ("labels.txt", "\ufeffant\r\nbee\r\nWespe é\r\n\r\n"),
        ("labels.json", ["ant", "bee", "Wespe é"]),
        ("labels.json", {"1": "bee", "0": "ant", "2": "Wespe é"}),
        ("labels.json", {"bee": 1, "ant": 0, "Wespe é": 2}),
    ],
)
def test_forms_of_label_files(tmp_path, name, content):
    assert read_labels(written(tmp_path, name, content)) == ("ant", "bee", "Wespe é")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("labels.txt", "", "holds no labels"),
        ("labels.txt", "ant\n\nbee", "label 2 must have 1 to 256 characters"),
        ("labels.txt", "ant\nbee\nant", "label 3 is 'ant', and so is label 1"),
        ("labels.txt", "x" * 257, "not 257"),
        ("labels.json", "[", "is not JSON"),
        ("labels.json", "[" * 100_000, "is not JSON"),
        ("labels.json", ["ant", 3], "a list of texts"),
        ("labels.json", {"0": "ant", "2": "bee"}, "every position from 0 to 1"),
        ("labels.json", {"first": "ant"}, "map positions to names"),
        ("labels.json", 7, "a list of texts"),
    ],
)
def test_faults_are_named(tmp_path, name, content, sentence):
    with pytest.raises(LabelsInvalid, match=sentence):
        read_labels(written(tmp_path, name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LabelsInvalid, match="cannot be read"):
        read_labels(tmp_path / "absent.txt")
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabelsInvalid, match="UTF-8"):
        read_labels(tmp_path / "labels.txt")


def test_labels_must_be_as_many_as_classes(tmp_path):
    path = written(tmp_path, "labels.txt", "ant\nbee")
    assert labels_for(path, 2) == ("ant", "bee")
    with pytest.raises(LabelsInvalid, match="2 labels and the network has 3 outputs"):
        labels_for(path, 3)


def test_without_a_file():
    assert labels_for(None, 3) == ("0", "1", "2")
    assert labels_for(None, 1000)[:2] == ("tench", "goldfish")
