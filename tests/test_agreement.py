"""What publishing asks of held-out samples, so that a server that loads a version need not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_execution import CPU, Cancelling, Convolutions, network_of, version_of
from torch import Tensor

from app.engine.loading import load_version
from models import checkpoint
from models.checkpoint import MANIFEST
from models.manifest import Manifest
from training import agreement as asked
from training.agreement import agreement
from training.samples import InMemory
from training.source import Part


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated where the processor has none; the numbers are the same."""
    monkeypatch.setattr(asked, "supports_bf16", lambda _: True)


def part_of(num_samples: int) -> Part:
    torch.manual_seed(0)
    return Part(InMemory(torch.rand(num_samples, 3, 24, 24)), torch.zeros(num_samples).long())


def as_they_are(x: Tensor) -> Tensor:
    return x


@pytest.mark.slow
def test_of_every_sample_it_is_told_whether_the_class_stays() -> None:
    found = agreement(network_of(Convolutions), part_of(240), as_they_are)["bf16"]
    assert found["num_samples"] == 240
    assert found["share"] > 0.9
    lost = agreement(network_of(Cancelling), part_of(240), as_they_are)["bf16"]
    assert lost["share"] < found["share"]


@pytest.mark.slow
def test_at_most_so_many_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = agreement(network_of(Convolutions), part_of(900), as_they_are)["bf16"]
    assert found["num_samples"] == asked.MAX_SAMPLES
    monkeypatch.setattr(asked, "MAX_S", 0.0)
    assert agreement(network_of(Convolutions), part_of(900), as_they_are) == {}


def test_few_samples_and_small_networks_are_not_asked() -> None:
    assert agreement(network_of(Convolutions), part_of(199), as_they_are) == {}
    tiny = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 2)).eval()
    assert agreement(tiny, part_of(240), as_they_are) == {}


def test_a_server_heeds_what_the_manifest_says(tmp_path: Path) -> None:
    version = version_of(tmp_path)
    document = json.loads((version.folder / MANIFEST).read_text())
    document |= {"metrics": {"agreement": {"bf16": {"share": 0.9, "num_samples": 300}}}}
    changed = Manifest.model_validate({**document, "files": {}, "digest": None, "checksum": None})
    folder = tmp_path / "changed"
    checkpoint.save(
        folder,
        checkpoint.load(version.folder).network,
        changed,
        torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
    )
    loaded = load_version(replace(version, folder=folder), CPU, "bf16")
    assert loaded.execution.form.precision == "fp32"
    assert "90.00% of 300 samples" in loaded.execution.trials[1].verdict
