"""Tensors on the wire of the Open Inference Protocol, and what is refused there."""

import math
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from app.api.v2_errors import (
    BinarySizeInvalid,
    DataInvalid,
    DatatypeRefused,
    DatatypeUnknown,
    OutputNotJson,
    ShapeInvalid,
    TooManyElements,
    V2Error,
)
from app.api.v2_tensors import (
    DATATYPES,
    Data,
    Limits,
    NamedTensor,
    checked_shape,
    data_from_bytes,
    data_from_json,
    datatype_named,
    to_json,
    to_wire,
)

LIMITS = Limits(max_elements=10_000)
JSON_NUMBERS = [row.name for row in DATATYPES.values() if row.code]
TORCH_NUMBERS = [row.name for row in DATATYPES.values() if row.dtype is not None]


def from_text(text: str, datatype: str, *shape: int) -> Data:
    """What the list in `text` becomes as a tensor of `shape`."""
    body = b'{"data":' + text.encode() + b"}"
    data = orjson.loads(body)["data"]
    return data_from_json("x", DATATYPES[datatype], shape, data, body)


def from_bytes(body: bytes, datatype: str, *shape: int, start: int = 0) -> Data:
    row = DATATYPES[datatype]
    return data_from_bytes("x", row, shape, bytearray(body), start, len(body) - start)


def numbers(datatype: str, shape: tuple[int, ...]) -> Tensor:
    """Every bit pattern is a number in some way."""
    row = DATATYPES[datatype]
    bits = torch.randint(0, 256, (math.prod(shape) * row.num_bytes,), dtype=torch.uint8)
    if datatype == "BOOL":
        bits %= 2
    assert row.dtype is not None
    return bits.view(row.dtype).view(shape)


def test_a_flat_list_becomes_a_tensor_of_the_shape() -> None:
    data = from_text("[1, 2.5, -3e2, 4]", "FP32", 2, 2)
    assert torch.equal(data, torch.tensor([[1, 2.5], [-300, 4]]))


def test_nested_and_flat_lists_are_the_same_tensor() -> None:
    flat = from_text("[1,2,3,4,5,6,7,8]", "INT16", 2, 2, 2)
    nested = from_text("[[[1,2],[3,4]],[[5,6],[7,8]]]", "INT16", 2, 2, 2)
    assert torch.equal(flat, nested)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("[1,2,3]", (2, 2)),
        ("[1,2,3,4,5]", (2, 2)),
        ("[[1,2],[3]]", (2, 2)),
        ("[[1,2],3]", (2, 2)),
        ("[1,[2,3,4]]", (2, 2)),
        ("[[1,2,3,4]]", (2, 2)),
        ("[[1],[2],[3],[4]]", (4,)),
        ("[[[1,2],[3,4]]]", (2, 2)),
        ("[]", (1,)),
        ("1", (1,)),
        ('"1"', (1,)),
        ("{}", (1,)),
        ("null", (1,)),
    ],
)
def test_a_list_that_is_not_of_its_shape_is_refused(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataInvalid):
        from_text(text, "FP32", *shape)


@pytest.mark.parametrize("length", [1, 3, 40, 784])
@pytest.mark.parametrize("datatype", ["FP32", "INT64"])
@pytest.mark.parametrize("word", ["true", "false", "null", '"1"', "[]", "[1]", "{}", '{"a":1}'])
def test_what_is_no_number_is_refused_at_any_length(length: int, datatype: str, word: str) -> None:
    for place in {0, length // 2, length - 1}:
        elements = ["1"] * length
        elements[place] = word
        with pytest.raises(DataInvalid):
            from_text(f"[{','.join(elements)}]", datatype, length)


def test_words_elsewhere_in_the_body_do_not_matter() -> None:
    body = orjson.dumps({"a": [True, None] * 200, "data": [0.5] * 100, "url": "true" * 400})
    data = orjson.loads(body)["data"]
    found = data_from_json("x", DATATYPES["FP32"], (100,), data, body)
    assert torch.equal(found, torch.full((100,), 0.5))


@pytest.mark.parametrize("length", [1, 10, 100])
@pytest.mark.parametrize("filler", ["", '"', "a", '"a'])
def test_a_short_list_in_a_long_text_is_looked_at(length: int, filler: str) -> None:
    data = [0.5] * (length - 1) + [True]
    body = orjson.dumps({"a": filler * 50_000, "data": data, "b": filler * 50_000})
    with pytest.raises(DataInvalid, match="not true or false"):
        data_from_json("x", DATATYPES["FP32"], (length,), data, body)


@settings(deadline=None)
@given(
    before=st.text(max_size=300),
    elements=st.lists(st.sampled_from([0, 1.5, 7, True, False]), min_size=1, max_size=120),
    after=st.lists(st.text(max_size=5), max_size=300),
)
def test_truth_values_never_pass_for_numbers(
    before: str, elements: list[Any], after: list[str]
) -> None:
    body = orjson.dumps({"id": before, "data": elements, "more": after})
    shape = (len(elements),)
    if bool in set(map(type, elements)):
        with pytest.raises(DataInvalid, match="not true or false"):
            data_from_json("x", DATATYPES["FP32"], shape, elements, body)
    else:
        data_from_json("x", DATATYPES["FP32"], shape, elements, body)


@pytest.mark.parametrize(
    ("datatype", "text"),
    [
        ("FP32", "[1e39]"),
        ("FP32", "[-3.5e38]"),
        ("UINT8", "[256]"),
        ("UINT8", "[-1]"),
        ("INT8", "[128]"),
        ("UINT64", "[18446744073709551616]"),
        ("UINT64", "[-1]"),
        ("INT64", "[9223372036854775808]"),
        ("INT32", "[1.0]"),
        ("INT32", "[0.5]"),
        ("BOOL", "[1]"),
        ("BOOL", "[true, 0]"),
        ("BYTES", "[1]"),
        ("BYTES", '["a", null]'),
    ],
)
def test_what_a_datatype_cannot_hold_is_refused(datatype: str, text: str) -> None:
    with pytest.raises(DataInvalid):
        from_text(text, datatype, len(orjson.loads(text)))


def test_whole_numbers_beyond_float32_are_rounded_as_numpy_does() -> None:
    data = from_text("[18446744073709551615, 16777217]", "FP32", 2)
    assert torch.equal(data, torch.from_numpy(np.array([2**64 - 1, 16777217], np.float32)))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_sixteen_bit_floats_travel_as_binary_only(datatype: str) -> None:
    with pytest.raises(DatatypeRefused, match="binary data"):
        from_text("[1]", datatype, 1)
    with pytest.raises(OutputNotJson, match="binary data"):
        to_json(NamedTensor("y", datatype, (1,), numbers(datatype, (1,))))


@pytest.mark.parametrize("name", [None, 1, "", "fp32", "FP8", "STRING", ["FP32"], {}])
def test_an_unknown_datatype_is_refused(name: object) -> None:
    with pytest.raises(DatatypeUnknown, match="none of BOOL"):
        datatype_named(name)


@pytest.mark.parametrize(
    "shape",
    [None, 3, "3", [], [1.0], [True], ["1"], [-1, 2], [None], [[1]], [1] * 17, {"0": 1}],
)
def test_a_shape_that_is_none_is_refused(shape: object) -> None:
    with pytest.raises(ShapeInvalid):
        checked_shape("x", DATATYPES["FP32"], shape, LIMITS)


def test_elements_are_counted_before_anything_is_built() -> None:
    with pytest.raises(TooManyElements, match="100000000000000000000 elements"):
        checked_shape("x", DATATYPES["FP32"], [10**10, 10**10], LIMITS)


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("datatype", TORCH_NUMBERS)
def test_bytes_are_read_at_any_address(datatype: str, start: int) -> None:
    tensor = numbers(datatype, (3, 2))
    wire = b"".join([to_wire(NamedTensor("x", datatype, (3, 2), tensor))])
    found = from_bytes(b"." * start + wire, datatype, 3, 2, start=start)
    assert isinstance(found, Tensor)
    assert found.data_ptr() % found.element_size() == 0
    assert found.shape == (3, 2)
    assert found.dtype == tensor.dtype
    assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_bytes_are_viewed_not_copied() -> None:
    body = bytearray(np.arange(6, dtype=np.float32).tobytes())
    found = data_from_bytes("x", DATATYPES["FP32"], (2, 3), body, 0, 24)
    body[0:4] = np.float32(9).tobytes()
    assert isinstance(found, Tensor)
    assert found[0, 0] == 9


@pytest.mark.parametrize("num_bytes", [0, 4, 20, 23, 25, 28])
def test_a_size_that_does_not_fit_the_shape_is_refused(num_bytes: int) -> None:
    with pytest.raises(BinarySizeInvalid, match="needs 24 bytes"):
        from_bytes(bytes(num_bytes), "FP32", 2, 3)


def test_a_bool_is_zero_or_one() -> None:
    assert torch.equal(from_bytes(b"\0\1", "BOOL", 2), torch.tensor([False, True]))
    with pytest.raises(DataInvalid, match="neither 0 nor 1"):
        from_bytes(b"\0\2", "BOOL", 2)


def test_bytes_elements_have_their_lengths_before_them() -> None:
    body = b"\2\0\0\0ab" + b"\0\0\0\0" + b"\1\0\0\0c"
    assert from_bytes(body, "BYTES", 3) == [b"ab", b"", b"c"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\1\0\0",
        b"\1\0\0\0",
        b"\xff\xff\xff\xffa",
        b"\1\0\0\0a",
        b"\1\0\0\0a\1\0\0\0b\1\0\0\0c",
        b"\1\0\0\0a\1\0\0\0bc",
    ],
)
def test_bytes_elements_that_do_not_add_up_are_refused(body: bytes) -> None:
    with pytest.raises(BinarySizeInvalid, match="exactly 2 elements"):
        from_bytes(body, "BYTES", 2)


def test_bytes_elements_are_bounded_as_items_are() -> None:
    assert checked_shape("x", DATATYPES["BYTES"], [1024, 1], LIMITS) == (1024, 1)
    with pytest.raises(TooManyElements, match="limit is 1024"):
        checked_shape("x", DATATYPES["BYTES"], [1025], LIMITS)


@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_a_tensor_without_elements_is_a_tensor(datatype: str) -> None:
    for data in (from_bytes(b"", datatype, 0, 3), from_text("[]", "FP64", 0, 3)):
        assert len(data) == 0
    tensor = NamedTensor("x", datatype, (0, 3), from_bytes(b"", datatype, 0, 3))
    assert len(to_wire(tensor)) == 0


def test_bytes_that_are_no_text_do_not_travel_as_json() -> None:
    with pytest.raises(OutputNotJson, match="UTF-8"):
        to_json(NamedTensor("y", "BYTES", (1,), [b"\xff"]))


FINITE = {
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
}
NUMPY_NAME = {"FP32": "float32", "FP64": "float64", "BOOL": "bool"}


@settings(deadline=None)
@given(data=st.data(), datatype=st.sampled_from([*JSON_NUMBERS, "BOOL"]), nested=st.booleans())
def test_json_there_and_back_is_exact(data: st.DataObject, datatype: str, nested: bool) -> None:
    dtype = NUMPY_NAME.get(datatype, datatype.lower())
    array = data.draw(
        arrays.arrays(dtype, arrays.array_shapes(max_dims=3), elements=FINITE.get(datatype))
    )
    text = orjson.dumps(
        array if nested else array.reshape(-1), option=orjson.OPT_SERIALIZE_NUMPY
    ).decode()
    found = from_text(text, datatype, *array.shape)
    assert isinstance(found, Tensor)
    assert np.array_equal(found.numpy(), array)
    back = to_json(NamedTensor("x", datatype, array.shape, found))
    assert np.array_equal(back, array.reshape(-1))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(
    data=JSON,
    datatype=st.sampled_from(list(DATATYPES.values())),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
)
def test_any_json_is_a_tensor_or_a_named_error(data: Any, datatype: Any, shape: Any) -> None:
    try:
        found = data_from_json("x", datatype, tuple(shape), data, b"")
    except V2Error:
        return
    count = found.numel() if isinstance(found, Tensor) else len(found)
    assert count == math.prod(shape)


@settings(deadline=None)
@given(
    body=st.binary(max_size=64),
    start=st.integers(0, 8),
    datatype=st.sampled_from(list(DATATYPES.values())),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_any_bytes_are_a_tensor_or_a_named_error(
    body: bytes, start: int, datatype: Any, shape: Any
) -> None:
    start = min(start, len(body))
    try:
        data_from_bytes("x", datatype, tuple(shape), bytearray(body), start, len(body) - start)
    except V2Error:
        return
