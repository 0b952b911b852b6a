"""A version as a file: its weights for plain torch or safetensors, or its graph for runtimes."""

import io
import os
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from safetensors.torch import save

from models.checkpoint import Checkpoint
from models.networks import TORCHVISION

Format: TypeAlias = Literal["pt", "safetensors", "pt2", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIXES = {form: f".{form}" for form in FORMATS}
GRAPHS = ("pt2", "onnx")
"""Formats that hold the network as well, not its weights alone."""


class ExportRefused(Exception):
    """A file cannot be written."""


def export(checkpoint: Checkpoint, path: Path, form: str) -> None:
    """Write `checkpoint` to `path`, whole or not at all.

    Args:
        checkpoint: from `models.checkpoint.load`.
        path: must not be there yet.
        form: `pt` is read by `load_state_dict(torch.load(path))`; `safetensors` by
            `safetensors.torch.load_file(path)`; `pt2` by `torch.export.load(path)`; `onnx` by any
            runtime for it. The last two are checked to answer as the network does.

    Raises:
        training.graph_export.GraphRefused: there is no such graph, or it answers differently.
        ExportRefused: an unknown form, or the file is there already or cannot be written.
    """
    if form not in FORMATS:
        raise ExportRefused(f"{form!r} is no format; there are {', '.join(FORMATS)}")
    if path.exists():
        raise _taken(path)  # at once: a graph takes seconds
    _write(path, _content(checkpoint, form))


def _content(checkpoint: Checkpoint, form: str) -> bytes | memoryview:
    if form in GRAPHS:
        from training import graph_export

        return graph_export.pt2(checkpoint) if form == "pt2" else graph_export.onnx(checkpoint)
    state = checkpoint.network.state_dict()
    if form == "safetensors":
        return save({name: tensor.contiguous() for name, tensor in state.items()})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def how_to_load(checkpoint: Checkpoint, path: Path) -> str | None:
    """Lines of Python that load weights into torchvision's own network; None for other ones."""
    spec = checkpoint.manifest.network
    if not spec.name.startswith(TORCHVISION) or {"head", "channels"} & spec.options.keys():
        return None
    name = spec.name.removeprefix(TORCHVISION)
    options = dict(spec.options)
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    arguments = ", ".join(f"{option}={value!r}" for option, value in sorted(options.items()))
    read = f'torch.load("{path}")'
    if path.suffix == ".safetensors":
        read = f'safetensors.torch.load_file("{path}")'
    return f"network = torchvision.models.{name}({arguments})\nnetwork.load_state_dict({read})"


def _write(path: Path, content: bytes | memoryview) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)  # unlike a rename, never over a file that is there
    except FileExistsError:
        raise _taken(path) from None
    except OSError as error:
        raise ExportRefused(f"{path} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _taken(path: Path) -> ExportRefused:
    return ExportRefused(f"{path} is there already; name another file")
