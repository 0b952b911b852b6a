"""What can be tuned, and what a run would do: told without leaving anything behind."""

from pathlib import Path

import pytest

from models.store import ModelStore
from tests.conftest import publish_cnn
from training.bases import bases
from training.estimate import dry_run


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("method", ["linear_probe", "fine_tune", "from_scratch"])
def test_a_dry_run_tells_what_would_happen_and_leaves_nothing(
    method: str, store: ModelStore
) -> None:
    home = store.folder.parent
    before = files(home)
    told = dry_run({"base": "digits", "dataset": "digits", "method": method}, home)
    assert files(home) == before
    assert told["num_samples"] == 1797
    assert told["resolved"]["validation"]["value"] == "cross_validation"
    assert told["memory_bytes"] > 0
    assert (told["seconds_per_epoch"] > 0) == (method != "linear_probe")
    assert (told["backbone_seconds"] > 0) == (method != "from_scratch")
    assert any("trains 6 times" in one for one in told["warnings"]) == (method == "fine_tune")


def test_bases_are_versions_and_weights_that_were_put_here(store: ModelStore) -> None:
    publish_cnn(store, "digits", seed=2)
    folder = store.folder.parent / "weights"
    folder.mkdir()
    (folder / "resnet18-f37072fd.pth").write_bytes(b"12345")
    found = {one["base"]: one for one in bases(store.folder.parent)}
    assert list(found) == ["torchvision/resnet18", "digits:2", "digits:1"]
    assert found["torchvision/resnet18"]["size_bytes"] == 5
    assert found["digits:1"]["input_shape"] == [1, 8, 8]
    assert found["digits:1"]["parameters"] > 100
    assert "fresh weights" in found["digits:1"]["licence"]
    assert "not known" in found["torchvision/resnet18"]["licence"]
