"""How our own systems are started: the server as users start it, and the limits it is held to."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.system import Launch, free_port

ROOT = Path(__file__).resolve().parent.parent


def server(
    name: str, home: Path, preload: Sequence[str], settings: Mapping[str, str] | None = None
) -> Launch:
    """`pytorchlib serve` over the models in `home`.

    Args:
        preload: models that are live before it is ready.
        settings: further ones, by the names that `app/settings.py` gives them.
    """
    port = free_port()
    wanted = {
        "home": str(home),
        "port": str(port),
        "device": "cpu",
        "preload": ",".join(preload),
        "drain_s": "0",
        **(settings or {}),
    }
    environ = _environ()
    environ |= {f"PYTORCHLIB_{key.upper()}": value for key, value in wanted.items()}
    # in the home folder, where no `.env` of the project is read
    return Launch(name, [sys.executable, "-m", "app", "serve"], port, "/readyz", environ, home)


def echo(name: str, sizes: Sequence[int]) -> Launch:
    """`benchmarks.echo`, answering so many bytes."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.echo", str(port), *map(str, sorted(set(sizes)))]
    return Launch(name, command, port, "/", _environ())


def bare_loop(name: str, home: Path, model: str, body: Path, precision: str = "fp32") -> Launch:
    """`benchmarks.in_process` on one model; it compiles first where `precision` is auto."""
    port = free_port()
    arguments = [str(home / "models"), model, str(body), str(port), precision]
    command = [sys.executable, "-m", "benchmarks.in_process", *arguments]
    # Compiling on a machine that has never compiled reads gigabytes of headers and libraries first.
    return Launch(name, command, port, "", _environ(), ready_within_s=600.0)


def _environ() -> dict[str, str]:
    """Without settings that somebody's shell holds, and with the project importable anywhere."""
    kept = {name: value for name, value in os.environ.items() if "PYTORCHLIB_" not in name}
    return {**kept, "PYTHONPATH": str(ROOT)}
