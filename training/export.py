"""A version's weights as a file that plain torch, or anything that reads safetensors, loads."""

import io
import os
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from safetensors.torch import save

from models.checkpoint import Checkpoint
from models.networks import TORCHVISION

Format: TypeAlias = Literal["pt", "safetensors"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors"}


class ExportRefused(Exception):
    """A file cannot be written."""


def export(checkpoint: Checkpoint, path: Path, form: str) -> None:
    """Write the weights of `checkpoint` to `path`, whole or not at all.

    Args:
        checkpoint: from `models.checkpoint.load`.
        path: must not be there yet.
        form: `pt` is read by `load_state_dict(torch.load(path))`; `safetensors` by
            `safetensors.torch.load_file(path)`.

    Raises:
        ExportRefused: an unknown form, or the file is there already or cannot be written.
    """
    if form not in FORMATS:
        raise ExportRefused(f"{form!r} is no format; there are {', '.join(FORMATS)}")
    state = checkpoint.network.state_dict()
    if form == "pt":
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content: bytes | memoryview = buffer.getbuffer()
    else:
        content = save({name: tensor.contiguous() for name, tensor in state.items()})
    _write(path, content)


def how_to_load(checkpoint: Checkpoint, path: Path) -> str | None:
    """Lines of Python that load the file into torchvision's own network; None for other ones."""
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
        raise ExportRefused(f"{path} is there already; name another file") from None
    except OSError as error:
        raise ExportRefused(f"{path} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
