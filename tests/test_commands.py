"""The commands as a person types them: what they print, what they answer, their exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from models import networks
from training.__main__ import commands

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, home: Path | None = None):
    """The command in this process; its exit code, what it printed and what it complained of."""
    at = ["--home", str(home)] if home else []
    return CliRunner().invoke(commands, [*map(str, arguments), *at], env={"COLUMNS": "200"})


@pytest.fixture
def home(tmp_path) -> Path:
    """A home with the model `digits`, an untrained network for grey pictures of 8 pixels."""
    torch.manual_seed(0)
    options = {"channels": 1, "size": 8, "width": 2}
    network = networks.build("cnn", {**options, "num_classes": 10})
    torch.save(network.state_dict(), tmp_path / "digits.pt")
    named = [f"--option={name}={value}" for name, value in options.items()]
    arguments = ["--weights", tmp_path / "digits.pt", "--network", "cnn", "--name", "digits"]
    done = run("import", *arguments, "--resize", 8, "--channels", 1, *named, home=tmp_path / "var")
    assert done.exit_code == 0, done.output
    assert "published      digits:1" in done.output
    assert "grey, shorter side 8 (bilinear), 8x8 from the centre" in done.output
    return tmp_path / "var"


def picture(folder: Path, name: str = "a.png") -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_help_names_every_command():
    done = run("--help")
    assert done.exit_code == 0
    for name in ("import", "export", "quantize", "evaluate", "predict", "info"):
        assert name in done.output
        assert run(name, "--help").exit_code == 0


def test_predict_answers_without_a_server(home, tmp_path):
    done = run("predict", "--model", "digits", picture(tmp_path), "--top-k", 2, home=home)
    assert done.exit_code == 0
    file, _, answer = done.output.partition(": ")
    assert file == str(tmp_path / "a.png")
    assert answer.count("%") == 2


def test_predict_for_machines(home, tmp_path):
    done = run("predict", "-m", "digits:1", picture(tmp_path), "--json", home=home)
    answer = json.loads(done.output)
    assert (answer["model"], answer["version"]) == ("digits", 1)
    assert answer["label"] == answer["top_k"][0]["label"]
    assert len(answer["top_k"]) == 3


def test_a_faulty_file_does_not_stop_the_others(home, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    files = [tmp_path / "bad.png", tmp_path / "absent.png", picture(tmp_path)]
    done = run("predict", "-m", "digits", *files, home=home)
    assert done.exit_code == 1
    assert done.stdout.startswith(str(tmp_path / "a.png"))
    assert "bad.png: the picture is not a JPEG" in done.stderr
    assert "absent.png: No such file" in done.stderr


def test_evaluate(home):
    done = run("evaluate", "-m", "digits", "--dataset", "digits", home=home)
    assert done.exit_code == 0
    assert "digits:1 on all samples of digits" in done.output
    assert "calibration" in done.output


def test_evaluate_for_machines(home):
    done = run("evaluate", "-m", "digits", "--data", "digits", "--json", home=home)
    found = json.loads(done.output)
    assert (found["part"], found["report"]["num_samples"]) == ("train", 1797)
    assert len(found["report"]["classes"]) == 10


def test_export(home, tmp_path):
    done = run("export", "-m", "digits", "-o", tmp_path / "out.pt", home=home)
    assert done.exit_code == 0
    before, after = torch.load(tmp_path / "digits.pt"), torch.load(tmp_path / "out.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_numbers_instead_of_pictures(tmp_path):
    torch.save(
        networks.build("mlp", {"inputs": 4, "num_classes": 3}).state_dict(), tmp_path / "m.pt"
    )
    options = ["--option", "inputs=4", "--input", "4", "--name", "rows", "--network", "mlp"]
    assert run("import", "--weights", tmp_path / "m.pt", *options, home=tmp_path).exit_code == 0
    np.save(tmp_path / "x.npy", np.ones(4))
    (tmp_path / "x.json").write_text("[1, 1, 1, 1]")
    (tmp_path / "y.json").write_text("[1, 1, 1]")
    (tmp_path / "z.json").write_text('[1, 1, 1, "one"]')
    files = [tmp_path / name for name in ("x.npy", "x.json", "y.json", "z.json")]
    done = run("predict", "-m", "rows", *files, home=tmp_path)
    first, second = done.stdout.splitlines()
    assert first.partition(": ")[2] == second.partition(": ")[2]
    assert "y.json: shape [3]; the model takes [4]" in done.stderr
    assert "z.json: no .npy or JSON of numbers" in done.stderr


def test_a_network_from_the_folder_where_one_is(tmp_path, monkeypatch):
    source = "from torch import nn\nclass Net(nn.Linear):\n    pass\n"
    (tmp_path / "net_of_mine.py").write_text(source)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "m.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    options = ["--option", "in_features=2", "--option", "out_features=2", "--input", "2"]
    network = ["--network", "net_of_mine:Net", "--name", "mine"]
    done = run("import", "--weights", "m.pt", *network, *options, home=tmp_path)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["predict", "-m", "digit", "x.png"],
            1,
            "no model is called 'digit'; the nearest are digits",
        ),
        (["predict", "-m", "digits:7", "x.png"], 1, "digits has no version 7"),
        (["predict", "-m", "digits", "x.png", "--device", "tpu"], 1, "not one of auto, cpu"),
        (["evaluate", "-m", "digits", "--data", "nowhere"], 1, "nowhere"),
        (["export", "-m", "digits", "--format", "onxn"], 1, "no format"),
        (["import", "--weights", "no.pt", "--network", "cnn", "--name", "x"], 1, "no.pt cannot be"),
        (["import", "--network", "cnn", "--name", "x"], 2, "--weights"),
        (["predict", "-m", "digits"], 2, "FILE"),
        (["predict", "--no-such-option"], 2, "no-such-option"),
    ],
)
def test_errors_are_one_sentence(home, arguments, code, sentence):
    done = run(*arguments, home=home)
    assert done.exit_code == code
    assert sentence in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "option",
    [["--mean", "red"], ["--option", "width"], ["--option", "a b=1"], ["--input", "8xeight"]],
)
def test_options_that_are_no_numbers_or_names(option):
    done = run("import", "--weights", "m.pt", "--network", "cnn", "--name", "x", *option)
    assert done.exit_code == 2
    assert option[0] in done.stderr


def test_a_fault_of_the_program_keeps_its_traceback(home, monkeypatch):
    monkeypatch.setattr("training.predict.predict_files", None)
    done = run("predict", "-m", "digits", "x.png", home=home)
    assert isinstance(done.exception, TypeError)


def test_home_comes_from_the_environment(home, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCHLIB_HOME", str(home))
    assert run("predict", "-m", "digits", picture(tmp_path)).exit_code == 0


@pytest.mark.slow  # imports torchvision in a fresh process
def test_info_in_a_process_of_its_own():
    command = [sys.executable, "-m", "training", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"][0]["sample"]) == 3


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from training.__main__ import commands\n"
        "try: commands(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0


@pytest.mark.slow  # real weights
def test_a_photograph_in_imagenets_classes(real_data, tmp_path):
    for name in ("mobilenet_v2", "squeezenet1_1"):
        file = real_data / "weights" / f"{name}.pth"
        network = ["--network", f"torchvision/{name}", "--name", name]
        done = run("import", "--weights", file, *network, home=tmp_path)
        assert done.exit_code == 0, done.output
        assert "1000 classes: tench, goldfish" in done.output
        photograph = real_data / "hymenoptera" / "val" / "ants" / "1440002809_b268d9a66a.jpg"
        done = run("predict", "-m", name, photograph, "--json", home=tmp_path)
        assert json.loads(done.output)["label"] == "ant"
