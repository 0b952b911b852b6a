"""`pytorchlib finetune` on a model of the store, through the entry that jobs use."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.store import ModelStore
from training.__main__ import commands


@pytest.mark.parametrize(
    ("options", "measured_on", "method"),
    [
        ([], "out-of-fold", "linear_probe"),
        (["--validation-fraction", "0.2"], "test", "linear_probe"),
        (["--unfreeze-epochs", "1", "--validation-fraction", "0.2"], "test", "fine_tune"),
    ],
)
def test_a_version_is_fine_tuned_and_published(
    options: list[str], measured_on: str, method: str, store: ModelStore
) -> None:
    given = ["--backbone", "digits", "--data", "digits", "--epochs", "2", "--name", "tuned"]
    home = ["--home", str(store.folder.parent)]
    done = CliRunner().invoke(commands, ["finetune", *given, *home, *options, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["version"] == "tuned:1"
    manifest = store.resolve("tuned").manifest()
    assert manifest.metrics["measured_on"] == measured_on
    assert (manifest.lineage.method, manifest.lineage.parent) == (method, "digits:1")


def test_the_cache_of_features_lies_in_the_home_folder(store: ModelStore) -> None:
    home = store.folder.parent
    given = ["--backbone", "digits", "--data", "digits", "--epochs", "1", "--home", str(home)]
    assert CliRunner().invoke(commands, ["finetune", *given]).exit_code == 0
    assert list(Path(home / "cache" / "features").glob("*/*.safetensors"))
