"""Tensors of the Open Inference Protocol: JSON lists and little-endian bytes to torch and back.

Nothing here loops over elements in Python: lists are checked and packed by `struct`, bytes are
viewed in place. Only BYTES elements, which have a length each, are walked one by one.
"""

import math
import struct
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from app.api.v2_errors import (
    BinarySizeInvalid,
    DataInvalid,
    DatatypeRefused,
    DatatypeUnknown,
    OutputNotJson,
    ShapeInvalid,
    TooManyElements,
    shown,
)

MEBIBYTE = 1024 * 1024
MAX_RANK = 16
# A list that takes a smaller share of the text than one in this many is looked at, not probed for.
MAX_PROBES = 64

Data: TypeAlias = Tensor | list[bytes]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request, each checked before the memory it would cost is taken.

    JSON has its own: a byte of it can cost 20 bytes of memory and 15 ns on the event loop.
    """

    max_body_bytes: int = 64 * MEBIBYTE
    max_inflated_bytes: int = 64 * MEBIBYTE
    max_json_bytes: int = 8 * MEBIBYTE
    max_json_lists: int = 65_536
    max_elements: int = 16 * MEBIBYTE
    max_items: int = 1024
    max_tensors: int = 64


class NamedTensor(NamedTuple):
    """One tensor on the wire; BYTES is a list of its elements, all else a torch tensor."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Data


@dataclass(frozen=True, slots=True)
class Datatype:
    """One row of the protocol's table.

    Attributes:
        dtype: in torch; None for BYTES.
        array: in numpy, through which bytes reach torch soonest; BF16, which it lacks, as int16.
        num_bytes: of one element; 0 for BYTES.
        code: how `struct` packs one from a JSON number; empty where numbers do not do.
    """

    name: str
    dtype: torch.dtype | None
    array: type[np.generic]
    num_bytes: int
    code: str = ""


DATATYPES = {
    row.name: row
    for row in (
        Datatype("BOOL", torch.bool, np.bool_, 1),
        Datatype("UINT8", torch.uint8, np.uint8, 1, "B"),
        Datatype("UINT16", torch.uint16, np.uint16, 2, "H"),
        Datatype("UINT32", torch.uint32, np.uint32, 4, "I"),
        Datatype("UINT64", torch.uint64, np.uint64, 8, "Q"),
        Datatype("INT8", torch.int8, np.int8, 1, "b"),
        Datatype("INT16", torch.int16, np.int16, 2, "h"),
        Datatype("INT32", torch.int32, np.int32, 4, "i"),
        Datatype("INT64", torch.int64, np.int64, 8, "q"),
        Datatype("FP16", torch.float16, np.float16, 2),
        Datatype("BF16", torch.bfloat16, np.int16, 2),
        Datatype("FP32", torch.float32, np.float32, 4, "f"),
        Datatype("FP64", torch.float64, np.float64, 8, "d"),
        Datatype("BYTES", None, np.object_, 0),
    )
}
BINARY_ONLY = ("FP16", "BF16")
JSON_WORDS = {
    type(None): "null",
    bool: "true or false",
    str: "text",
    list: "lists",
    dict: "objects",
}


def datatype_named(name: object) -> Datatype:
    """The row of the table.

    Raises:
        DatatypeUnknown: there is none.
    """
    row = DATATYPES.get(name) if isinstance(name, str) else None
    if row is None:
        raise DatatypeUnknown(f"datatype {shown(name)} is none of {', '.join(DATATYPES)}")
    return row


def checked_shape(name: str, datatype: Datatype, shape: object, limits: Limits) -> tuple[int, ...]:
    """`shape` as sizes, few enough of them and small enough.

    Raises:
        ShapeInvalid: not a list of whole numbers from 0, or more than 16 of them.
        TooManyElements: the product is over `limits.max_elements`, or over `limits.max_items` for
            BYTES, whose elements are objects of their own.
    """
    if type(shape) is not list or not 1 <= len(shape) <= MAX_RANK:
        raise ShapeInvalid(f"shape of input {shown(name)} must be a list of 1 to {MAX_RANK} sizes")
    if set(map(type, shape)) != {int} or min(shape) < 0:
        raise ShapeInvalid(f"shape of input {shown(name)} must hold whole numbers from 0")
    count = math.prod(shape)
    most = limits.max_elements if datatype.num_bytes else limits.max_items
    if count > most:
        raise TooManyElements(f"input {shown(name)} has {count} elements; the limit is {most}")
    return tuple(shape)


def may_hold_words(text: bytes | bytearray, num_elements: int) -> bool:
    """Whether a list of that many elements in JSON `text` may hold true or false; no is certain.

    `struct` takes true for 1, and to look at every element's type costs as much as parsing. But a
    list of n numbers and words has at least 2n + 1 characters, none of them a quotation mark, and
    a word has an r or an l. Any stretch that long covers one of the positions probed here.
    """
    shortest = 2 * num_elements + 1
    if shortest * MAX_PROBES < len(text):
        return True
    at = shortest - 1
    while at < len(text):
        start, end = text.rfind(b'"', 0, at + 1) + 1, text.find(b'"', at)
        end = end if end >= 0 else len(text)
        long_enough = end - start >= shortest
        if long_enough and (text.find(b"r", start, end) >= 0 or text.find(b"l", start, end) >= 0):
            return True
        at = end + shortest
    return False


def data_from_json(
    name: str, datatype: Datatype, shape: tuple[int, ...], data: object, text: bytes | bytearray
) -> Data:
    """The elements of a JSON list, flat in row-major order or nested as `shape`.

    Args:
        data: a list, or an array of float64 for a datatype of floats.
        text: that `data` was parsed from.

    Returns:
        A tensor of `shape`, or a list of bytes for BYTES.

    Raises:
        DatatypeRefused: FP16 or BF16.
        DataInvalid: wrong count, ragged nesting, an element of another type or out of range.
    """
    if datatype.name in BINARY_ONLY:
        raise DatatypeRefused(
            f"{datatype.name} cannot travel as JSON; send input {shown(name)} as binary data"
        )
    if isinstance(data, np.ndarray):
        _check_count(name, shape, data.size)
        return _narrowed(name, datatype, shape, data)
    if type(data) is not list:
        raise DataInvalid(f"data of input {shown(name)} must be a list")
    flat = _flat(name, data, shape)
    _check_count(name, shape, len(flat))
    if datatype.dtype is None:
        return _encoded(name, flat)
    if not flat:
        return torch.empty(shape, dtype=datatype.dtype)
    packed = _packed(name, datatype, flat, text)
    return _viewed(datatype, shape, packed, 0)


def data_from_bytes(
    name: str,
    datatype: Datatype,
    shape: tuple[int, ...],
    body: bytearray,
    start: int,
    num_bytes: int,
) -> Data:
    """The elements that lie in `body[start : start + num_bytes]`, viewed in place.

    Returns:
        A tensor of `shape` that shares the memory of `body` (a copy in one piece where an odd
        JSON length put it at an odd address), or a list of bytes for BYTES.

    Raises:
        BinarySizeInvalid: `num_bytes` is not what the shape needs, or the lengths of BYTES
            elements do not add up to it.
        DataInvalid: a BOOL that is neither 0 nor 1.
    """
    count = math.prod(shape)
    if datatype.dtype is None:
        return _walked(name, body, start, num_bytes, count)
    if num_bytes != count * datatype.num_bytes:
        raise BinarySizeInvalid(
            f"input {shown(name)} of shape {list(shape)} and datatype {datatype.name} needs "
            f"{count * datatype.num_bytes} bytes, binary_data_size is {num_bytes}"
        )
    if count == 0:
        return torch.empty(shape, dtype=datatype.dtype)
    if start % datatype.num_bytes:
        body, start = bytearray(memoryview(body)[start : start + num_bytes]), 0
    if datatype.dtype is torch.bool and np.frombuffer(body, np.uint8, count, start).max() > 1:
        raise DataInvalid(f"BOOL input {shown(name)} holds a byte that is neither 0 nor 1")
    return _viewed(datatype, shape, body, start)


def to_json(tensor: NamedTensor) -> Any:
    """`tensor.data` as orjson takes it, flat: a numpy array, or a list of strings for BYTES.

    Raises:
        OutputNotJson: FP16, BF16, or bytes that are not UTF-8.
    """
    if tensor.datatype in BINARY_ONLY:
        raise OutputNotJson(
            f"{tensor.datatype} cannot travel as JSON; ask for output {shown(tensor.name)} as "
            "binary data"
        )
    if isinstance(tensor.data, Tensor):
        return tensor.data.contiguous().numpy().reshape(-1)
    try:
        return [element.decode() for element in tensor.data]
    except UnicodeDecodeError:
        raise OutputNotJson(
            f"output {shown(tensor.name)} holds bytes that are not UTF-8; ask for it as binary data"
        ) from None


def to_wire(tensor: NamedTensor) -> memoryview:
    """The elements of `tensor` as they lie on the wire."""
    if not isinstance(tensor.data, Tensor):
        parts = [(struct.pack("<I", len(element)), element) for element in tensor.data]
        return memoryview(b"".join(chain.from_iterable(parts)))
    data = tensor.data.contiguous()
    if data.dtype is torch.bfloat16:  # numpy has no such type
        data = data.view(torch.int16)
    return data.numpy().data


def is_finite(data: Data) -> bool:
    """Whether JSON has a number for every element."""
    if not isinstance(data, Tensor) or not data.dtype.is_floating_point:
        return True
    return bool(torch.isfinite(data).all())


def _viewed(datatype: Datatype, shape: tuple[int, ...], buffer: bytearray, start: int) -> Tensor:
    """A tensor in the memory of `buffer`; a quarter of the time of `torch.frombuffer().view()`."""
    tensor = torch.from_numpy(np.ndarray(shape, datatype.array, buffer, start))
    return tensor.view(torch.bfloat16) if datatype.dtype is torch.bfloat16 else tensor


def _check_count(name: str, shape: tuple[int, ...], count: int) -> None:
    if count != math.prod(shape):
        raise DataInvalid(
            f"data of input {shown(name)} has {count} elements, its shape "
            f"{list(shape)} has {math.prod(shape)}"
        )


def _narrowed(
    name: str, datatype: Datatype, shape: tuple[int, ...], numbers: "np.ndarray[Any, Any]"
) -> Tensor:
    """`numbers` `[n]`, float64, as the tensor; what overflows is refused, as `struct` does."""
    try:
        with np.errstate(over="raise"):
            return torch.from_numpy(numbers.astype(datatype.array).reshape(shape))
    except FloatingPointError:
        raise _misfit(name, datatype, []) from None


def _flat(name: str, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """`data` in row-major order; one pass in C per dimension."""
    if not data or type(data[0]) is not list:
        return data
    for size, inner in zip(shape, shape[1:], strict=False):
        if set(map(type, data)) != {list} or set(map(len, data)) != {inner}:
            raise DataInvalid(
                f"data of input {shown(name)} is nested, but not as its shape {list(shape)}: "
                f"expected {size} lists of {inner}"
            )
        data = list(chain.from_iterable(data))
    return data


def _packed(name: str, datatype: Datatype, flat: list[Any], text: bytes | bytearray) -> bytearray:
    if datatype.dtype is torch.bool:
        if set(map(type, flat)) != {bool}:
            raise DataInvalid(f"BOOL input {shown(name)} takes true and false only")
        return bytearray(flat)
    buffer = bytearray(len(flat) * datatype.num_bytes)
    try:
        struct.pack_into(f"<{len(flat)}{datatype.code}", buffer, 0, *flat)
    except (struct.error, OverflowError):
        raise _misfit(name, datatype, flat) from None
    if may_hold_words(text, len(flat)) and bool in set(map(type, flat)):
        raise _misfit(name, datatype, flat)
    return buffer


def _misfit(name: str, datatype: Datatype, flat: list[Any]) -> DataInvalid:
    """The sentence for a list that could not be packed."""
    kinds = set(map(type, flat))
    strange = [word for kind, word in JSON_WORDS.items() if kind in kinds]
    if strange:
        found = " and ".join(strange)
        return DataInvalid(f"input {shown(name)} takes numbers ({datatype.name}), not {found}")
    return DataInvalid(f"input {shown(name)} holds a number that {datatype.name} cannot")


def _encoded(name: str, flat: list[Any]) -> list[bytes]:
    if flat and set(map(type, flat)) != {str}:
        raise DataInvalid(f"BYTES input {shown(name)} takes text in JSON, nothing else")
    return [element.encode() for element in flat]


def _walked(name: str, body: bytearray, start: int, num_bytes: int, count: int) -> list[bytes]:
    """BYTES elements: each a little-endian uint32 length and that many bytes."""
    end = start + num_bytes
    elements: list[bytes] = []
    with memoryview(body) as view:
        while start + 4 <= end and len(elements) < count:
            length = int.from_bytes(view[start : start + 4], "little")
            start += 4 + length
            elements.append(bytes(view[start - length : start]))
    if start != end or len(elements) != count:
        raise BinarySizeInvalid(
            f"BYTES input {shown(name)} must hold exactly {count} elements, each a 4-byte length "
            f"and its bytes, in {num_bytes} bytes"
        )
    return elements
