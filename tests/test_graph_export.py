"""A version as a graph: `pt2` and `onnx` answer as the network does, or nothing is written."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from test_commands import home as home
from test_commands import run
from torch import Tensor, nn

from models import checkpoint
from models.checkpoint import Checkpoint
from models.store import ModelStore
from training import graph_export
from training.graph_export import GraphRefused, onnx, pt2


@pytest.fixture
def digits(home: Path) -> Checkpoint:
    return checkpoint.load(ModelStore(home / "models").resolve("digits").folder)


def batch(loaded: Checkpoint, num_rows: int) -> Tensor:
    pixels = torch.randint(0, 256, (num_rows, *loaded.manifest.preprocessing.raw_shape))
    return loaded.manifest.preprocessing.finish(pixels.to(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_a_graph_takes_batches_of_any_size(home: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"digits.{form}"
    done = run("export", "-m", "digits", "--format", form, "-o", path, home=home)
    assert done.exit_code == 0, done.output
    assert "the graph of digits:1, cnn" in done.output
    loaded = checkpoint.load(ModelStore(home / "models").resolve("digits").folder)
    for num_rows in (1, 2, 5):
        inputs = batch(loaded, num_rows)
        with torch.inference_mode():
            wanted = loaded.network(inputs)
            found = answer(path, inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def answer(path: Path, inputs: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


@pytest.mark.slow
def test_a_graph_that_answers_differently_is_not_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_export, "TOLERANCE", -1.0)
    done = run("export", "-m", "digits", "--format", "pt2", "-o", tmp_path / "a.pt2", home=home)
    assert done.exit_code == 1
    assert "answers its golden inputs differently than the network" in done.output
    assert not list(tmp_path.glob("*a.pt2*"))


def test_a_batch_size_that_was_built_in_is_found(digits: Checkpoint) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return digits.network(x).reshape(2, -1)

    built_in = Checkpoint(digits.manifest, Two(), digits.golden)
    with pytest.raises(GraphRefused, match="cnn has no graph: "):
        pt2(built_in)
    with pytest.raises(GraphRefused, match="a batch of 1 with shape"):
        graph_export._check(
            Checkpoint(digits.manifest, digits.network, None), lambda x: digits.network(x).T
        )


def test_a_network_without_a_graph(digits: Checkpoint) -> None:
    class Capricious(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return digits.network(x if float(x.sum()) > 0 else -x)

    with pytest.raises(GraphRefused, match="cnn has no graph: "):
        pt2(Checkpoint(digits.manifest, Capricious(), digits.golden))


def test_without_the_extra_it_is_said(digits: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    with pytest.raises(GraphRefused, match=r"ONNX needs onnxruntime; .*pytorchlib\[export\]"):
        onnx(digits)
    assert pt2(digits)


def test_int8_is_exported_from_its_parent(digits: Checkpoint) -> None:
    manifest = json.loads(digits.manifest.model_dump_json())
    manifest["network"]["name"] = "int8/cnn"
    manifest["lineage"]["parent"] = "digits:1"
    small = Checkpoint(digits.manifest.model_validate(manifest), digits.network, None)
    with pytest.raises(GraphRefused, match="export digits:1"):
        pt2(small)
