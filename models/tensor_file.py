"""A safetensors file from a stranger, held against what it must contain before anything reads it.

The library's own reader accepts duplicate keys, tensors of no size and not-a-number; this one does
not, and takes no memory that the header alone asks for.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.intake_error import (
    DtypeRefused,
    HeaderInvalid,
    KeysMismatch,
    MetadataRefused,
    NotFinite,
    OffsetsInvalid,
    ShapeMismatch,
)

MAX_HEADER_BYTES: Final = 1 << 20
MAX_METADATA_BYTES: Final = 16 * 1024
KNOWN_METADATA: Final = frozenset({"format"})
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
_CHUNK: Final = 1 << 20
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor that the file must hold: its shape, and the types that it may have."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]

    @classmethod
    def like(cls, tensor: Tensor) -> "Expected":
        """As in a network's state: any floating type for a floating one, else the same."""
        floating = tensor.is_floating_point()
        dtypes = FLOATS if floating else frozenset({_NAMES.get(tensor.dtype, "")})
        return cls(tuple(tensor.shape), dtypes)


def check_tensor_file(path: Path, expected: Mapping[str, Expected]) -> None:
    """Hold the header of the file at `path` against `expected`, tensor for tensor.

    Raises:
        models.intake_error.IntakeRefused: by the name of what is wrong.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header, data_start = _read_header(file, path.name, size_bytes, len(expected))
    _check_metadata(path.name, header.pop("__metadata__", {}))
    _check_keys(path.name, header.keys(), expected.keys())
    spans = [_check_tensor(name, header[name], one) for name, one in expected.items()]
    _check_spans(path.name, spans, size_bytes - data_start)


def check_finite(path: Path) -> None:
    """Read every tensor of a checked file, a piece at a time.

    Raises:
        NotFinite: a number of it is not finite. HeaderInvalid: the library cannot read it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                tensor: Tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    for piece in torch.split(tensor.reshape(-1), _CHUNK):
                        if not piece.isfinite().all():
                            raise NotFinite(
                                f"{path.name}: {name} holds a number that is not finite"
                            )
    except (SafetensorError, OSError) as error:
        raise HeaderInvalid(f"{path.name} cannot be read: {error}") from None


def parse_json_object(text: bytes) -> dict[str, Any]:
    """The object in `text`.

    Raises:
        ValueError: no JSON, no object, a key twice, or nested beyond reason.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def _read_header(
    file: BinaryIO, name: str, size_bytes: int, num_tensors: int
) -> tuple[dict[str, Any], int]:
    beginning = file.read(8)
    if len(beginning) < 8:
        raise HeaderInvalid(f"{name} is no safetensors file: it has {size_bytes} bytes")
    (length,) = struct.unpack("<Q", beginning)
    limit = min(MAX_HEADER_BYTES, 64 * 1024 + 512 * num_tensors)
    if length > limit:
        raise HeaderInvalid(f"{name} has a header of {length} bytes; {limit} are allowed")
    if 8 + length > size_bytes:
        raise HeaderInvalid(f"{name} ends within its header")
    try:
        return parse_json_object(file.read(length)), 8 + length
    except ValueError as error:
        raise HeaderInvalid(f"{name} has a header that is damaged: {str(error)[:200]}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _check_metadata(file_name: str, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise MetadataRefused(f"{file_name}: __metadata__ must be an object of texts")
    unknown = sorted(metadata.keys() - KNOWN_METADATA)
    if unknown:
        raise MetadataRefused(f"{file_name}: __metadata__ has the unknown key {unknown[0][:80]!r}")
    if len(json.dumps(metadata)) > MAX_METADATA_BYTES:
        raise MetadataRefused(f"{file_name}: __metadata__ has more than {MAX_METADATA_BYTES} bytes")


def _check_keys(file_name: str, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    if missing or extra:
        parts = [
            f"{word} {', '.join(ascii(name[:80]) for name in sorted(names)[:5])}"
            for word, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise KeysMismatch(f"{file_name} does not hold the network's tensors: {'; '.join(parts)}")


def _check_tensor(name: str, entry: object, expected: Expected) -> tuple[int, int, str]:
    """Where the tensor lies, from the beginning of the data."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderInvalid(f"{name} must have exactly dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in expected.dtypes:
        allowed = ", ".join(sorted(expected.dtypes))
        raise DtypeRefused(f"{name} has type {str(entry['dtype'])[:20]!r}; allowed are {allowed}")
    shape = _numbers(entry["shape"])
    if shape != expected.shape:
        raise ShapeMismatch(
            f"{name} has shape {str(entry['shape'])[:80]}; the network needs {list(expected.shape)}"
        )
    offsets = _numbers(entry["data_offsets"])
    if offsets is None or len(offsets) != 2:
        raise OffsetsInvalid(f"{name} must have two offsets, both whole numbers from 0")
    size_bytes = math.prod(expected.shape) * _DTYPES[entry["dtype"]].itemsize
    if offsets[1] - offsets[0] != size_bytes:
        raise OffsetsInvalid(f"{name} takes {size_bytes} bytes; its offsets say otherwise")
    return offsets[0], offsets[1], name


def _numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value):
        return tuple(value)
    return None


def _check_spans(file_name: str, spans: list[tuple[int, int, str]], size_bytes: int) -> None:
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            word = "overlaps another" if start < position else "leaves a hole before it"
            raise OffsetsInvalid(f"{file_name}: {name} {word}")
        position = end
    if position != size_bytes:
        raise OffsetsInvalid(
            f"{file_name} has {size_bytes} bytes of data, and its tensors take {position}"
        )
