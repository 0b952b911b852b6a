"""The JSON of an `infer` request, within bounds; a long list of numbers comes without its objects.

A Python float for each number costs more than parsing it. Where simdjson is installed, the flat
list of an ordinary request becomes an array in one step. That way is tried first and never has the
last word: whatever it does not know or refuses is read, or refused with a sentence, by orjson.
"""

import re
from typing import Any, Final

import numpy as np
import orjson

from app.api.v2_errors import FieldInvalid, JsonInvalid, TooManyBytes, TooManyElements
from app.api.v2_tensors import Limits

try:
    import simdjson
except ImportError:
    simdjson = None  # type: ignore[assignment]

# Shorter documents are read as soon as a parser is made.
LEAST_BYTES: Final = 512
PIECE_BYTES: Final = 128 * 1024
FLOATS: Final = frozenset({"FP32", "FP64"})
FIELD: Final = b'"data"'
LIST: Final = re.compile(rb'"data"[ \n\r\t]*:[ \n\r\t]*(?=\[)')


def parse_json(text: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """A JSON object, within bounds that are checked before anything is built.

    orjson itself stops at 1024 levels and refuses NaN, numbers beyond float64, invalid UTF-8 and
    anything after the document.

    Returns:
        the document; `data` of an input of floats may be a float64 array `[n]` instead of a list.

    Raises:
        TooManyBytes, TooManyElements, JsonInvalid, FieldInvalid: as named.
    """
    if len(text) > limits.max_json_bytes:
        raise TooManyBytes(
            f"the JSON part has {len(text)} bytes, over the limit of {limits.max_json_bytes}; "
            "send tensors as binary data"
        )
    # Counting costs microseconds that a body too short to break the bound need not pay.
    if len(text) > limits.max_json_lists:
        num_lists = text.count(b"[") + text.count(b"{")
        if num_lists > limits.max_json_lists:
            raise TooManyElements(
                f"the JSON part has {num_lists} lists and objects, over the limit of "
                f"{limits.max_json_lists}; send flat data"
            )
    document = _with_array(text) if simdjson is not None and len(text) >= LEAST_BYTES else None
    if document is not None:
        return document
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise JsonInvalid(f"the request is not JSON: {error}") from None
    if type(document) is not dict:
        raise FieldInvalid("the request must be a JSON object")
    return document


def data_span(text: bytes | bytearray) -> tuple[int, int] | None:
    """Where the one list of `data` stands, brackets included, if it is flat and that is certain.

    A quotation mark within a text has a backslash, so where there is none, `"data"` followed by a
    colon is a field; its list ends at the next bracket.
    """
    found = LIST.search(text)
    if found is None or b"\\" in text:
        return None
    start = found.end()
    end = text.find(b"]", start) + 1
    if (
        text.find(b"[", start + 1, end) >= 0
        or FIELD in text[end:]
        or FIELD in text[: found.start()]
    ):
        return None
    return start, end


def numbers_in(text: bytes, datatype: str) -> Any:
    """What a flat JSON list holds: a long one of floats as float64 `[n]`, any other as a list.

    Raises:
        ValueError, TypeError, RuntimeError: it is something else.
    """
    if simdjson is None or len(text) < LEAST_BYTES or datatype not in FLOATS:
        return orjson.loads(text)
    return _array(text)


def _with_array(text: bytes | bytearray) -> dict[str, Any] | None:
    """The document, its one list of floats as an array; None where orjson has to read it."""
    span = data_span(text)
    if span is None:
        return None
    start, end = span
    try:
        document = orjson.loads(b"".join((text[:start], b"null", text[end:])))
        (entry,) = document["inputs"]
        if entry["datatype"] not in FLOATS or entry["data"] is not None:
            return None
        entry["data"] = _array(text[start:end])
    except (ValueError, TypeError, KeyError, RuntimeError):
        return None
    return document if type(document) is dict else None


def _array(text: bytes | bytearray) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """A flat JSON list of numbers as float64 `[n]`; a list within it would not be noticed.

    A long one is read in pieces that end at a comma. What the parser keeps of a piece, three times
    its text, stays near the processor, and other threads get their turn between two of them.

    Raises:
        ValueError, TypeError, RuntimeError: it is something else.
    """
    parser = simdjson.Parser()
    if len(text) <= 2 * PIECE_BYTES:
        return _numbers(parser, bytes(text))
    if not (text.startswith(b"[") and text.endswith(b"]")):
        raise ValueError("not a list")
    pieces, begin, last = [], 1, len(text) - 1
    while begin <= last:
        end = text.find(b",", begin + PIECE_BYTES, last)
        end = last if end < 0 else end
        numbers = _numbers(parser, b"".join((b"[", text[begin:end], b"]")))
        if not len(numbers):
            raise ValueError("a comma with no number behind it")
        pieces.append(numbers)
        begin = end + 1
    return np.concatenate(pieces)


def _numbers(parser: Any, text: bytes) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.frombuffer(parser.parse(text).as_buffer(of_type="d"), np.float64)
