"""Both JSON parsers give the same requests, and the same refusals."""

import json
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from app.api import v2_document
from app.api.v2_errors import JsonInvalid, V2Error
from app.api.v2_request import parse_request
from app.api.v2_tensors import Limits
from app.engine.predictor import TensorSpec

SPEC = TensorSpec("input", "FP32", (4,))
LIMITS = Limits()
numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**70), 2**70), st.just(-0.0)
)
elements = st.one_of(numbers, numbers, numbers, st.sampled_from([True, None, "1", "[", [], [1]]))


def outcome(text: bytes) -> Any:
    """What a request holds, bit for bit, or the sentence of its refusal."""
    try:
        request = parse_request(text, None, SPEC, LIMITS)
    except V2Error as error:
        return type(error), str(error)
    return [
        (tensor.name, tensor.shape, tensor.data.dtype, tensor.data.numpy().tobytes())
        for tensor in request.inputs
        if isinstance(tensor.data, torch.Tensor)
    ], request._replace(inputs=[])


def both(text: bytes) -> tuple[Any, Any]:
    """The outcome with simdjson, also piece by piece, and with orjson alone."""
    parser, least = v2_document.simdjson, v2_document.LEAST_BYTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2_document, "LEAST_BYTES", 0)
        with_arrays = outcome(text)
        patch.setattr(v2_document, "PIECE_BYTES", 2)
        assert outcome(text) == with_arrays
        patch.setattr(v2_document, "simdjson", None)
        without = outcome(text)
    assert (v2_document.simdjson, v2_document.LEAST_BYTES) == (parser, least)
    return with_arrays, without


def request(data: Any, datatype: str = "FP32", **fields: Any) -> bytes:
    shape = [1, len(data)] if isinstance(data, list) else [1, 1]
    entry = {"name": "input", "datatype": datatype, "shape": shape, "data": data}
    return json.dumps({"inputs": [entry], **fields}).encode()


@given(st.lists(elements, max_size=8), st.sampled_from(["FP32", "FP64", "INT32", "BOOL", "BYTES"]))
@example([1e39], "FP32")
@example([1, [2]], "FP32")
@example([3.4028235677973366e38, 9007199254740993, 1e-46], "FP32")
def test_any_list_means_the_same_to_both(data: list[Any], datatype: str) -> None:
    ours, plain = both(request(data, datatype, id="7", parameters={"priority": 1}))
    assert ours == plain


@given(st.lists(numbers, min_size=1, max_size=4), st.data())
def test_a_damaged_request_means_the_same_to_both(data: list[Any], draw: Any) -> None:
    text = bytearray(request(data, outputs=[{"name": "logits"}]))
    place = draw.draw(st.integers(0, len(text) - 1))
    text[place : place + draw.draw(st.integers(0, 3))] = draw.draw(
        st.sampled_from([b"[", b"]", b",", b"\xef\xbb\xbf", b'"', b"1e400", b"{}", b"\xff", b" "])
    )
    ours, plain = both(bytes(text))
    assert ours == plain


def test_of_two_fields_with_one_name_the_last_counts() -> None:
    text = request([1.0]).replace(b'"data": [1.0]', b'"data": [1.0], "data": [2.0]')
    ours, plain = both(text)
    assert ours == plain
    assert ours[0][0][3] == torch.tensor([2.0]).numpy().tobytes()


def test_an_ordinary_request_is_read_without_a_list() -> None:
    document = v2_document.parse_json(request([0.5] * 784), LIMITS)
    assert document["inputs"][0]["data"].shape == (784,)
    assert document["inputs"][0]["shape"] == [1, 784]


def test_a_long_list_is_read_in_pieces_and_whole() -> None:
    numbers = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    text = request(numbers.tolist(), "FP64")
    assert len(text) > 10 * v2_document.PIECE_BYTES
    array = v2_document.parse_json(text, LIMITS)["inputs"][0]["data"]
    assert array.tolist() == numbers.tolist()
    spaced = text.replace(b"]", b", ]")
    assert outcome(spaced) == (JsonInvalid, outcome(spaced)[1])
