"""A torchvision that does not match torch is answered with what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

from models.pairing import advice, import_torchvision, installed

ROOT = Path(__file__).resolve().parent.parent


def run_with_torchvision(folder: Path, init: str) -> str:
    """What a fresh interpreter says that finds this torchvision first."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    (package / "version.py").write_text("__version__ = '0.29.2+cu999'\n")
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from models.pairing import TorchvisionMismatch, import_torchvision\n"
        "try: import_torchvision('torchvision')\n"
        "except TorchvisionMismatch as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_a_mismatched_pair_says_what_to_install(tmp_path):
    failure = "raise RuntimeError('operator torchvision::nms does not exist')"
    said = run_with_torchvision(tmp_path, failure)
    assert "torchvision 0.29.2+cu999" in said
    assert "operator torchvision::nms does not exist" in said
    assert "pip install --force-reinstall" in said


def test_a_matching_pair_is_silent(tmp_path):
    assert run_with_torchvision(tmp_path, "") == ""


@pytest.mark.parametrize(
    ("torch", "torchvision", "command"),
    [
        ("2.15.0+cpu", "0.29.2+cu132", '"torchvision==0.29.2+cpu"'),
        ("2.15.0", "0.29.2+cu132", '"torchvision==0.29.2"'),
        ("2.15.0+cpu", "0.20.0+cpu", "pip install --upgrade torch torchvision"),
        ("2.15.0+cpu", None, "not installed"),
    ],
)
def test_the_advice_fits_the_pair(torch, torchvision, command):
    assert command in advice(torch, torchvision, "no operator")


def test_versions_carry_their_build():
    import torch

    assert installed("torch") == torch.__version__
    assert installed("no_such_package") is None


@pytest.mark.slow  # imports the real torchvision
def test_the_installed_pair_matches():
    assert import_torchvision("torchvision").__version__ == installed("torchvision")
