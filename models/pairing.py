"""torch and torchvision must be a matching pair; found out where torchvision is imported.

A torchvision built for another torch fails at import with `operator torchvision::nms does not
exist`, which tells nobody what to do.
"""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any


class TorchvisionMismatch(Exception):
    """torch and torchvision do not belong together, or torchvision is missing."""


def import_torchvision(module: str = "torchvision") -> Any:
    """`torchvision` or one of its modules; the first import takes seconds.

    Raises:
        TorchvisionMismatch: what is installed does not work together; the sentence says what to
            install.
    """
    try:
        return importlib.import_module(module)
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        sentence = advice(installed("torch"), installed("torchvision"), reason)
        raise TorchvisionMismatch(sentence) from error


def installed(package: str) -> str | None:
    """The package's version with its build, such as `2.15.0+cpu`; None where it is absent.

    Read from the package's `version.py` and not by importing it: this must work where that fails,
    and the installer's own record does not have the build.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return "of an unknown version"
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    return found.group(1) if found else "of an unknown version"


def advice(torch: str | None, torchvision: str | None, reason: str) -> str:
    """What is wrong with this pair, and the command that mends it."""
    if torchvision is None:
        return f"torchvision is not installed; install the release that goes with torch {torch}"
    release, _, vision_build = torchvision.partition("+")
    build = (torch or "").partition("+")[2]
    if build != vision_build:
        wanted = f"{release}+{build}" if build else release
        return (
            f"torch {torch} and torchvision {torchvision} are different builds and do not work "
            f"together ({reason}); from the package index that torch came from, run: "
            f'pip install --force-reinstall --no-deps "torchvision=={wanted}"'
        )
    return (
        f"torch {torch} and torchvision {torchvision} do not work together ({reason}); install "
        "the two releases that belong together, from one package index, in one command: "
        "pip install --upgrade torch torchvision"
    )
