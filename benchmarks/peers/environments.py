"""A virtual environment for each peer, outside the project's, installed by uv.

The torch and torchvision of the project go into each, so that every system computes with the same
kernels. uv links files from its cache: an environment on the cache's file system costs little disk.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

INSTALL_DEADLINE_S = 3600
MIN_FREE_BYTES = 20 * 1024**3
SHARED = ("torch", "torchvision", "pillow", "safetensors")


class EnvironmentFailed(Exception):
    """A peer's environment cannot be made here."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One virtual environment.

    Attributes:
        folder: where it is, made when it is first installed.
        requirements: what is installed besides the project's torch, as pip writes it.
    """

    folder: Path
    requirements: tuple[str, ...]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def wanted(self) -> tuple[str, ...]:
        """Everything that is installed, with the project's own versions."""
        return (*self.requirements, *(f"{name}=={_public_version(name)}" for name in SHARED))

    def install(self) -> None:
        """Make it, unless the same requirements were installed already.

        Raises:
            EnvironmentFailed: no uv, too little disk, or uv's own words.
        """
        marker, wanted = self.folder / "installed", "\n".join(self.wanted)
        if marker.is_file() and marker.read_text() == wanted:
            return
        _check_disk(self.folder)
        uv = _uv()
        _run([uv, "venv", "--clear", "--python", sys.executable, str(self.folder)])
        _run([uv, "pip", "install", "--python", str(self.python), *self.wanted])
        marker.write_text(wanted)

    def environ(self) -> dict[str, str]:
        """Environment variables of a process in it, without those that lead to the project's."""
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environ = {name: value for name, value in os.environ.items() if name not in left_out}
        environ["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{environ.get('PATH', '')}"
        return environ


def _public_version(name: str) -> str:
    return version(name).partition("+")[0]


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise EnvironmentFailed("uv is neither beside this Python nor on the PATH")
    return found


def _check_disk(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < MIN_FREE_BYTES:
        raise EnvironmentFailed(
            f"{free / 1024**3:.0f} GiB are free where the peers are installed; "
            f"{MIN_FREE_BYTES / 1024**3:.0f} are wanted"
        )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFailed(f"uv took longer than {INSTALL_DEADLINE_S} s") from None
    if done.returncode:
        raise EnvironmentFailed(done.stderr.strip()[-2000:] or f"uv ended with {done.returncode}")
