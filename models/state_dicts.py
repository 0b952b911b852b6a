"""State dicts that people arrive with: `.pt` and `.pth` (weights only, no fallback), safetensors.

A `.pt` file is a pickle. torch's weights-only reader runs none of its code; what it does not
understand is refused here, with the two lines that write the weights alone. The file's container
and the tensors in it are checked too, so that a small file cannot claim a large memory.
"""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

ENTRIES = ("state_dict", "model", "model_ema")
"""Where training scripts put the weights inside what they save; looked for in this order."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel, AveragedModel and torch.compile put before every name."""
AVERAGED_COUNT = "n_averaged"
MAX_PICKLE_BYTES = 64 * 1024 * 1024
MAX_PICKLE_STEPS = 10_000_000
MAX_EXPANSION = 4
"""Tied weights name the same bytes more than once; more often than this is an attack."""
_ZIP = b"PK\x03\x04"
_LEGACY_PICKLES = 3
"""Magic number, protocol version and system: the pickles before the object in a legacy file."""
_BOOKKEEPING = frozenset({"PROTO", "FRAME", "BINPUT", "LONG_BINPUT", "MEMOIZE", "PUT"})
_READER_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    EOFError,
    OSError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    NotImplementedError,
)
"""What torch's reader raises on damaged files; a test feeds it thousands of them."""


class StateDictError(Exception):
    """A file of weights cannot be used."""


class StateDictMissing(StateDictError):
    """There is no such file, or it cannot be opened."""


class StateDictDamaged(StateDictError):
    """Truncated, corrupt, or no file of weights at all."""


class StateDictUnsafe(StateDictError):
    """The file holds Python objects besides tensors; reading them would run code."""


class StateDictUnsupported(StateDictError):
    """Readable, but it holds something other than plain named tensors."""


def read_state_dict(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The named tensors in `path`, on the CPU, in the order in which they were saved.

    One level of `state_dict`, `model` or `model_ema` is unwrapped, and the prefixes `module.` and
    `_orig_mod.` are taken off where all names carry them.

    Args:
        path: `.safetensors`, or whatever `torch.save` wrote: the zip format (memory-mapped) or
            the older one.
        entry: the key that holds the weights, where the file has several.

    Raises:
        StateDictMissing, StateDictDamaged, StateDictUnsafe, StateDictUnsupported: see there.
    """
    path = Path(path)
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
    except OSError as error:
        raise StateDictMissing(f"{path} cannot be opened: {error.strerror}") from None
    if path.suffix == ".safetensors":
        found: object = _read_safetensors(path)
    else:
        found = _read_pickled(path, is_zip=start == _ZIP)
    state = _without_prefixes(_tensors_of(_unwrapped(found, entry, path), path))
    _check_tensors(state, size_bytes, path)
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise StateDictDamaged(f"{path} is no readable safetensors file: {error}") from None


def _read_pickled(path: Path, is_zip: bool) -> object:
    if is_zip:
        _check_container(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to the author of the file, not to its reader
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except _READER_ERRORS as error:
        if isinstance(error, pickle.UnpicklingError | RuntimeError) and _is_refusal(str(error)):
            raise StateDictUnsafe(_advice(path, is_zip)) from None
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise StateDictDamaged(
            f"{path} is damaged, or no file of weights that torch.save wrote"
            + (f": {reason[:200]}" if " " in reason else "")
        ) from None


def _is_refusal(message: str) -> bool:
    """Whether torch understood the file and declined, rather than stumbled over it."""
    signs = ("GLOBAL", "whose module", "Trying to", "legacy .tar", "Can only")
    return any(sign in message for sign in signs)


def _check_container(path: Path) -> None:
    """The zip's parts must be stored as they are, and fit into the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise StateDictDamaged(f"{path} is a damaged zip file: {error}") from None
    names = {part.filename.rpartition("/")[2] for part in parts}
    if "constants.pkl" in names:
        raise StateDictUnsafe(_advice_for_torchscript(path))
    if "data.pkl" not in names:
        raise StateDictUnsupported(f"{path} is a zip file, and not one that torch.save wrote")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise StateDictUnsupported(f"{path} has compressed parts, which torch.save never writes")
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise StateDictDamaged(f"{path} claims more bytes than it has")
    for part in parts:
        if part.filename.endswith("data.pkl") and part.file_size > MAX_PICKLE_BYTES:
            raise StateDictUnsupported(f"{path} describes its tensors in over {MAX_PICKLE_BYTES} B")


def _advice(path: Path, is_zip: bool) -> str:
    """Why the file is refused, and the two lines that write its weights alone."""
    return (
        f"{path} holds other Python objects beside the weights, and reading those would run code "
        "that came with the file. If you trust it, write the weights alone, where it was made:\n"
        f'    found = torch.load("{path.name}", map_location="cpu", weights_only=False)\n'
        f'    torch.save({_where_weights_are(path, is_zip)}, "{path.stem}-weights.pt")'
    )


def _advice_for_torchscript(path: Path) -> str:
    return (
        f"{path} is a TorchScript program, and loading it would run it. If you trust it, write the "
        "weights alone:\n"
        f'    found = torch.jit.load("{path.name}", map_location="cpu")\n'
        f'    torch.save(found.state_dict(), "{path.stem}-weights.pt")'
    )


def _where_weights_are(path: Path, is_zip: bool) -> str:
    """The expression that gives the weights of the object `found`, as far as can be seen.

    Reads the pickle's steps without executing any.
    """
    try:
        steps = list(islice(_object_steps(path, is_zip), MAX_PICKLE_STEPS))
    except (*_READER_ERRORS, StopIteration):
        steps = []
    if not steps or not _makes_dict(steps[0]):
        return "found.state_dict()"
    values: dict[str, tuple[str, Any]] = {}
    for (name, argument), following in pairwise(steps):
        if "UNICODE" in name:
            values.setdefault(argument, following)
    for entry in ENTRIES:
        if entry in values:
            # A legacy file marks a whole network with a tuple: its class and its source code.
            is_object = values[entry][0] in ("GLOBAL", "MARK") and not _makes_dict(values[entry])
            return f'found["{entry}"]' + (".state_dict()" if is_object else "")
    inner = next((key for key, step in values.items() if _makes_dict(step)), None)
    if inner is not None:
        return f'found["{inner}"]'
    return "{name: x for name, x in found.items() if isinstance(x, torch.Tensor)}"


def _makes_dict(step: tuple[str, Any]) -> bool:
    return step[0] == "EMPTY_DICT" or step == ("GLOBAL", "collections OrderedDict")


def _object_steps(path: Path, is_zip: bool) -> Iterator[tuple[str, Any]]:
    """Name and argument of each step of the pickle that holds the saved object."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            name = next(part for part in archive.namelist() if part.endswith("data.pkl"))
            yield from _steps(io.BytesIO(archive.read(name)))
    else:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                for _ in _steps(file):
                    pass
            yield from _steps(file)


def _steps(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name not in _BOOKKEEPING:
            yield operation.name, argument


def _unwrapped(found: object, entry: str | None, path: Path) -> object:
    if not isinstance(found, Mapping):
        raise StateDictUnsupported(f"{path} holds a {type(found).__name__}, not named tensors")
    if entry is not None:
        if entry not in found:
            there = ", ".join(str(key) for key in islice(found, 10))
            raise StateDictUnsupported(f"{path} has no entry {entry!r}; it has {there}")
        return found[entry]
    return next((found[key] for key in ENTRIES if isinstance(found.get(key), Mapping)), found)


def _tensors_of(found: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not found:
        raise StateDictUnsupported(f"{path} holds no named tensors")
    others = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if others:
        listed = ", ".join(f"{name!r} ({type(found[name]).__name__})" for name in others[:5])
        raise StateDictUnsupported(
            f"{path} should hold tensors under their names; there are also {listed}. If one of "
            "these holds the weights, name it as the entry"
        )
    if not all(isinstance(name, str) for name in found):
        raise StateDictUnsupported(f"{path} holds tensors whose names are not text")
    return {name: tensor.detach() for name, tensor in found.items()}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        names = [name for name in state if name != AVERAGED_COUNT]
        prefix = next((one for one in PREFIXES if _all_start(names, one)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): state[name] for name in names}
    # torch.compile of a part of a network marks that part only.
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in state.items()}


def _all_start(names: Sequence[str], prefix: str) -> bool:
    """Whether every name begins with `prefix` and goes on behind it; false for no names."""
    return bool(names) and all(name.startswith(prefix) and name != prefix for name in names)


def _check_tensors(state: Mapping[str, Tensor], size_bytes: int, path: Path) -> None:
    """Plain tensors only, whose bytes are really in the file."""
    total_bytes = 0
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else f"{tensor.layout}".removeprefix("torch.")
            raise StateDictUnsupported(
                f"{path}: {name} is a {kind} tensor; only plain ones are read"
            )
        claimed_bytes = tensor.numel() * tensor.element_size()
        if claimed_bytes > min(tensor.untyped_storage().nbytes(), size_bytes):
            raise StateDictDamaged(
                f"{path}: {name} claims {claimed_bytes} bytes; the file does not hold as many"
            )
        total_bytes += claimed_bytes
    if total_bytes > MAX_EXPANSION * size_bytes:
        raise StateDictDamaged(f"{path} claims {total_bytes} bytes of weights and has {size_bytes}")
