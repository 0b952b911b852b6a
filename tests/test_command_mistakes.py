"""Every mistake at the command line is a sentence that a person can act on, never a traceback."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from app.__main__ import commands
from models.store import ModelStore
from training.commands import sentence_of

ROOT = Path(__file__).resolve().parent.parent
IMPORT = [
    "import",
    "--network",
    "cnn",
    "--name",
    "new",
    "--option",
    "size=8",
    "--option",
    "channels=1",
    "--weights",
]
TRAIN = ["train", "--epochs", "1", "--dataset"]
EVALUATE = ["evaluate", "--model", "digits", "--dataset"]
PREDICT = ["predict", "--model", "digits"]


class Trap:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch sprung",)


@pytest.fixture
def desk(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one of every wrong file, where the command is typed; `models` is its store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTORCHLIB_HOME", str(store.folder.parent))
    for folder in ("empty", "classes/a", "classes/b", "single/a"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("L", (8, 8)).save("picture.png")
    for folder in ("classes/a", "single/a"):
        Image.new("L", (8, 8)).save(f"{folder}/picture.png")
    Path("text.txt").write_text("hello\n")
    Path("nothing").write_bytes(b"")
    Path("ragged.csv").write_text("a,b,label\n1,2,x\n1,y\n3,4,y\n")
    Path("plain.csv").write_text("a,b,c\n1,2,x\n1,3,y\n3,4,y\n")
    Path("words.csv").write_text("a,b,label\n1,two,x\n1,3,y\n")
    Path("binary.csv").write_bytes(bytes(range(256)))
    np.savez("no_x.npz", y=np.arange(5))
    np.savez("no_y.npz", x=np.zeros((5, 4)))
    np.savez("short.npz", x=np.zeros((5, 4)), y=np.arange(4))
    Path("damaged.npz").write_bytes(b"PK\x03\x04")
    torch.save(Trap(), "trap.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Trap(), protocol=4))
    weights = {"body.0.weight": torch.zeros(2, 1, 3, 3), "head.weight": torch.zeros(3, 2)}
    save_file(weights, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-8])
    torch.save(weights, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:400])
    Path("labels.txt").write_text("one\ntwo\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        # Weights.
        ([*IMPORT, "absent.pt"], "absent.pt cannot be opened: No such file"),
        ([*IMPORT, "empty"], "empty cannot be opened: Is a directory"),
        ([*IMPORT, "nothing"], "nothing is damaged, or no file of weights"),
        ([*IMPORT, "text.txt"], "text.txt is damaged, or no file of weights"),
        ([*IMPORT, "picture.png"], "picture.png is damaged, or no file of weights"),
        ([*IMPORT, "trap.pt"], "trap.pt holds other Python objects beside the weights"),
        ([*IMPORT, "pickle.pt"], "pickle.pt is damaged, or no file of weights"),
        ([*IMPORT, "cut.pt"], "cut.pt is a damaged zip file"),
        ([*IMPORT, "cut.safetensors"], "cut.safetensors is no readable safetensors file"),
        ([*IMPORT, "whole.pt", "--option", "width=-1"], "width must be a whole number from 1"),
        # Labels.
        (
            [*IMPORT, "whole.pt", "--resize", "8", "--labels", "absent"],
            "absent cannot be read: No such file",
        ),
        (
            [*IMPORT, "whole.pt", "--resize", "8", "--labels", "empty"],
            "empty cannot be read: Is a directory",
        ),
        ([*IMPORT, "whole.pt", "--resize", "8", "--labels", "nothing"], "nothing holds no labels"),
        (
            [*IMPORT, "whole.pt", "--resize", "8", "--labels", "binary.csv"],
            "binary.csv is no text in UTF-8",
        ),
        (
            [*IMPORT, "whole.pt", "--resize", "8", "--labels", "labels.txt"],
            "2 labels and the network has 3 outputs",
        ),
        # Networks.
        (
            ["import", "--weights", "whole.pt", "--name", "x", "--network", "nn"],
            "did you mean cnn?",
        ),
        ([*TRAIN, "digits", "--network", "nn"], "no network is called 'nn'; did you mean cnn?"),
        ([*TRAIN, "digits", "--network", "absent:Net"], "No module named 'absent'"),
        ([*TRAIN, "digits", "--option", "wide=1"], "unexpected keyword argument 'wide'"),
        # Models.
        (
            [*PREDICT[:2], "digit", "picture.png"],
            "no model is called 'digit'; the nearest are digits",
        ),
        ([*PREDICT, "picture.png", "--home", "empty"], "'digits'; the store is empty"),
        ([*PREDICT, "picture.png", "--home", "text.txt"], "Not a directory: text.txt"),
        (["finetune", "--backbone", "digits:9", "--data", "digits"], "digits has no version 9"),
        (["export", "--model", "digits", "--output", "empty"], "empty is there already"),
        (["export", "--model", "digits", "--output", "a/b.pt"], "a/b.pt cannot be written"),
        # Pictures.
        ([*PREDICT, "empty"], "empty: Is a directory"),
        ([*PREDICT, "nothing"], "the picture is empty"),
        ([*PREDICT, "ragged.csv"], "not a JPEG, PNG or WebP"),
        # Datasets.
        ([*TRAIN, "mnits"], "'mnits' is neither one of digits, mnist"),
        ([*TRAIN, "text.txt"], "'text.txt' is neither one of digits, mnist"),
        ([*TRAIN, "empty"], "two class folders or more are needed; there is none"),
        ([*TRAIN, "single"], "there is only 'a'"),
        ([*TRAIN, "classes"], "b: no pictures in this class folder"),
        ([*TRAIN, "ragged.csv"], "line 3: 2 cells where 3 are wanted"),
        ([*TRAIN, "words.csv"], "line 2, column b: 'two' is not a finite number"),
        ([*TRAIN, "binary.csv"], "not a CSV file in UTF-8"),
        ([*TRAIN, "nothing.csv"], "'nothing.csv' is neither"),
        ([*TRAIN, "plain.csv", "--label-column", "label"], "no column 'label'; there are a, b, c"),
        ([*TRAIN, "no_x.npz"], "arrays x and y (or x_train and y_train) are needed; there is y"),
        ([*TRAIN, "no_y.npz"], "arrays x and y (or x_train and y_train) are needed; there is x"),
        ([*TRAIN, "short.npz"], "x has 5 samples and y has 4"),
        ([*TRAIN, "damaged.npz"], "not a readable NPZ file"),
        ([*EVALUATE, "plain.csv"], "it holds rows of numbers, and the model takes pictures"),
        ([*EVALUATE, "digits", "--part", "tset"], "digits has no part 'tset'; it has train"),
        # Settings.
        ([*TRAIN, "digits", "--optimizer", "adam"], "--optimizer: it should be 'sgd' or 'adamw'"),
        ([*TRAIN, "digits", "--lr", "-1"], "--lr: it should be greater than 0; it is -1.0"),
        ([*TRAIN, "plain.csv", "--recipe", "fast"], "--recipe: plain.csv has none; there is one"),
        ([*TRAIN, "digits", "--recipe", "slow"], "--recipe: it should be auto, fast, none; it is"),
        ([*TRAIN, "digits", "--device", "tpu"], "'tpu' is not one of auto, cpu"),
        ([*TRAIN, "digits", "--name", "../x"], "'../x' is no name here"),
        ([*TRAIN, "digits", "--home", "text.txt"], "Not a directory: text.txt"),
        (["train", "--resume", "empty"], "empty holds no run that could be gone on with"),
        # The service and its keys.
        (
            ["serve", "--port", "0", "--max-inputs", "0"],
            "--max-inputs or PYTORCHLIB_MAX_INPUTS is 0",
        ),
        (["serve", "--host", "0.0.0.0"], "there is no valid key"),
        (["keys", "revoke", "nobody"], "no key that could be revoked has the id or name 'nobody'"),
        (["keys", "create", "--name", "ci", "--scope", "all", "--home", "text.txt"], "text.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_told_in_a_sentence(desk: Path, arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(commands, arguments, env={"COLUMNS": "200"})
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert not (desk / "sprung").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sevre"], "Did you mean 'serve'?"),
        (["train", "--epoch", "1"], "No such option: --epoch"),
        (["train", "--epochs", "ten"], "Invalid value for '--epochs'"),
        (["predict", "picture.png"], "Missing option '--model'"),
        (["serve", "--network", "cnn"], "--network, --name and --labels go with --import"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("desk")
def test_a_mistake_of_usage(arguments: list[str], sentence: str) -> None:
    done = CliRunner().invoke(commands, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_name_is_looked_at_before_the_training(desk: Path) -> None:
    CliRunner().invoke(commands, [*TRAIN, "digits", "--name", "No name"])
    assert not (desk / "runs").exists()


def test_a_full_disk_is_told_though_its_error_names_no_file() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (
        sentence_of(full)
        == "No space left on device: make room, or name another folder with --home"
    )
    assert sentence_of(OSError(errno.EIO, os.strerror(errno.EIO))) is None


def test_keys_of_the_default_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(commands, ["keys", "create", "--name", "ci", "--scope", "predict"])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "var" / "keys.json").is_file()


@pytest.mark.slow  # processes of their own
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--tracing"], "install pytorchlib[tracing], or turn it off"),
        (["serve", "--device", "tpu"], "'tpu' is not one of auto, cpu"),
        (["serve", "--home", "text.txt"], "text.txt/keys.json cannot be read: Not a directory"),
        (
            ["serve", "--import", "absent.pt", "--network", "cnn", "--name", "x"],
            "absent.pt cannot be",
        ),
        (["worker", "--home", "text.txt"], "text.txt is a file, and a folder is needed there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_service_that_cannot_start(desk: Path, arguments: list[str], sentence: str) -> None:
    (desk / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.sdk'] = None")
    command = [sys.executable, "-m", "app", *arguments, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": f"{desk}:{ROOT}"}
    done = subprocess.run(
        command, cwd=desk, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
