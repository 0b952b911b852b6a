"""The body of an `infer` request: every form it may have, and every way to get it wrong."""

import json
import struct
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from app.api import v2_errors as wrong
from app.api.v2_request import InferRequest, lead_bytes, parse_request
from app.api.v2_tensors import DATATYPES, Limits
from app.engine.predictor import TensorSpec

SPEC = TensorSpec("input", "FP32", (2, 3))
LIMITS = Limits(max_json_bytes=4096, max_json_lists=64, max_elements=1000, max_tensors=4)
ONE = {"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
RAW = {"name": "raw", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}


def parse(document: Any, raw: bytes = b"", header: bytes | None = None) -> InferRequest:
    """Parse as the client would send it: with a header where raw tensors follow."""
    text = document if isinstance(document, bytes) else orjson.dumps(document)
    if header is None and raw:
        header = b"%d" % len(text)
    return parse_request(text + raw, header, SPEC, LIMITS)


def with_input(**changes: Any) -> dict[str, Any]:
    """A good request whose only input is changed; None leaves a field out."""
    entry = {key: value for key, value in {**ONE, **changes}.items() if value is not None}
    return {"inputs": [entry]}


def test_json_and_raw_tensors_mix_in_any_order() -> None:
    later = {**RAW, "name": "later"}
    raw = np.array([1, 2, 3, 4], "<f4").tobytes()
    request = parse({"id": "seven", "inputs": [RAW, ONE, later]}, raw)
    assert request.id == "seven"
    assert [tensor.name for tensor in request.inputs] == ["raw", "input", "later"]
    found = [tensor.data.flatten().tolist() for tensor in request.inputs]  # type: ignore[union-attr]
    assert found == [[1, 2], [1, 2], [3, 4]]


def test_a_header_as_long_as_the_body_means_json_alone() -> None:
    text = orjson.dumps({"inputs": [ONE]})
    assert parse(text, header=b"%d" % len(text)).inputs[0].shape == (1, 2)


def test_a_header_of_zero_means_one_raw_item() -> None:
    body = np.arange(6, dtype="<f4").tobytes()
    request = parse_request(body, b"0", SPEC, LIMITS)
    assert request.binary_output
    assert request.outputs is None
    assert torch.equal(request.inputs[0].data, torch.arange(6.0).view(1, 2, 3))


@pytest.mark.parametrize("size", [0, 20, 28, 48])
def test_a_raw_body_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(wrong.BinarySizeInvalid, match="needs 24 bytes"):
        parse_request(bytes(size), b"0", SPEC, LIMITS)


@pytest.mark.parametrize("spaces", range(8))
def test_behind_its_lead_a_tensor_is_viewed_where_it_lies(spaces: int) -> None:
    entry = {**RAW, "datatype": "FP64", "parameters": {"binary_data_size": 16}}
    text = orjson.dumps({"inputs": [entry]}) + b" " * spaces
    header = b"%d" % len(text)
    lead = lead_bytes(header)
    body = bytearray(lead) + text + np.array([1, 2], "<f8").tobytes()
    (tensor,) = parse_request(body, header, SPEC, LIMITS, lead).inputs
    assert tensor.data.tolist() == [1, 2]  # type: ignore[union-attr]
    body[-8:] = np.array([3], "<f8").tobytes()
    assert tensor.data.tolist() == [1, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize("header", [None, b"", b"x", b"-3", b"9" * 19])
def test_what_says_no_length_asks_for_no_lead(header: bytes | None) -> None:
    assert lead_bytes(header) == 0


def test_wishes_are_read() -> None:
    outputs = [
        {"name": "a"},
        {"name": "b", "parameters": {"binary_data": False, "classification": 3}},
    ]
    parameters = {"binary_data_output": True, "priority": 1, "timeout": 2500, "mine": "x"}
    request = parse({"inputs": [ONE], "outputs": outputs, "parameters": parameters})
    assert request.outputs == [("a", True, 0), ("b", False, 3)]
    assert (request.priority, request.timeout_us, request.binary_output) == (1, 2500, True)


def test_a_request_that_wishes_nothing_gets_json() -> None:
    request = parse({"inputs": [ONE]})
    assert request == (None, request.inputs, None, False, 0, 0)


MALFORMED_JSON = {
    "empty": b"",
    "cut short": b'{"inputs": [',
    "not a number": b'{"inputs": [NaN]}',
    "beyond float64": b'{"inputs": [1e999]}',
    "5000 digits": b'{"inputs": [' + b"9" * 3000 + b"]}",
    "invalid UTF-8": b'{"id": "\xff"}',
    "lone surrogate": b'{"id": "\\ud800"}',
    "two documents": b"{}{}",
}


@pytest.mark.parametrize("text", MALFORMED_JSON.values(), ids=MALFORMED_JSON)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(wrong.JsonInvalid):
        parse(text)


def test_deep_json_is_refused_before_the_stack_ends() -> None:
    deep = b'{"inputs":' + b"[" * 60 + b"]" * 60 + b"}"
    with pytest.raises(wrong.FieldInvalid, match="list of objects"):
        parse(deep)
    for depth in (1_100, 100_000, 1_000_000):
        deep = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        with pytest.raises(wrong.JsonInvalid, match="depth limit"):
            parse_request(deep, None, SPEC, Limits(max_json_lists=2_000_000))


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ([], wrong.FieldInvalid),
        ({}, wrong.InputMissing),
        ({"inputs": []}, wrong.InputMissing),
        ({"inputs": None}, wrong.InputMissing),
        ({"inputs": {"name": "input"}}, wrong.FieldInvalid),
        ({"inputs": [ONE, 3]}, wrong.FieldInvalid),
        ({"inputs": [ONE, ONE]}, wrong.InputUnexpected),
        ({"inputs": [ONE] * 5}, wrong.TooManyElements),
        ({"inputs": [ONE], "id": 7}, wrong.FieldInvalid),
        ({"inputs": [ONE], "id": "x" * 2000}, wrong.FieldInvalid),
        ({"inputs": [ONE], "outputs": "all"}, wrong.FieldInvalid),
        ({"inputs": [ONE], "outputs": [{}]}, wrong.FieldInvalid),
        ({"inputs": [ONE], "outputs": [{"name": "a"}, {"name": "a"}]}, wrong.OutputUnknown),
        (with_input(name=None), wrong.FieldInvalid),
        (with_input(name=""), wrong.FieldInvalid),
        (with_input(name=["input"]), wrong.FieldInvalid),
        (with_input(shape=None), wrong.ShapeInvalid),
        (with_input(shape=[1001]), wrong.TooManyElements),
        (with_input(datatype=None), wrong.DatatypeUnknown),
        (with_input(datatype="FLOAT"), wrong.DatatypeUnknown),
        (with_input(datatype="FP16"), wrong.DatatypeRefused),
        (with_input(datatype="BF16"), wrong.DatatypeRefused),
        (with_input(data=None), wrong.FieldInvalid),
        (with_input(data=[1]), wrong.DataInvalid),
        (with_input(parameters=[]), wrong.FieldInvalid),
        (with_input(parameters={"a": []}), wrong.FieldInvalid),
        (with_input(parameters={"binary_data_size": 8}), wrong.FieldInvalid),
        (with_input(data=None, parameters={"binary_data_size": 8}), wrong.BinarySizeInvalid),
        (with_input(data=None, parameters={"binary_data_size": 0}), wrong.BinarySizeInvalid),
        (with_input(data=None, parameters={"binary_data_size": -8}), wrong.ParameterInvalid),
        (with_input(data=None, parameters={"binary_data_size": 8.0}), wrong.ParameterInvalid),
        (with_input(data=None, parameters={"binary_data_size": True}), wrong.ParameterInvalid),
        (with_input(data=None, parameters={"shared_memory_region": "a"}), wrong.FeatureRefused),
    ],
)
def test_a_malformed_request_has_a_name(document: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        parse(document)


@pytest.mark.parametrize(
    "parameters",
    [
        {"priority": -1},
        {"priority": "high"},
        {"priority": True},
        {"timeout": 1.5},
        {"timeout": 2**63},
        {"binary_data_output": 1},
    ],
)
def test_a_parameter_of_another_kind_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(wrong.ParameterInvalid, match=f"parameter {next(iter(parameters))} must"):
        parse({"inputs": [ONE], "parameters": parameters})


@pytest.mark.parametrize(
    "parameters",
    [{"binary_data": "yes"}, {"classification": -1}, {"classification": 2.0}],
)
def test_an_output_parameter_of_another_kind_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(wrong.ParameterInvalid):
        parse({"inputs": [ONE], "outputs": [{"name": "a", "parameters": parameters}]})


def test_sequences_are_refused_not_ignored() -> None:
    with pytest.raises(wrong.FeatureRefused, match="sequences"):
        parse({"inputs": [ONE], "parameters": {"sequence_id": 4, "sequence_start": True}})


@pytest.mark.parametrize("header", [b"-1", b"x", b"", b"1e2", b" 1", b"+1", b"\xb2", b"9" * 5000])
def test_a_header_that_is_no_length_is_refused(header: bytes) -> None:
    with pytest.raises(wrong.HeaderLengthInvalid, match="in range"):
        parse({"inputs": [ONE]}, header=header)


def test_a_header_beyond_the_body_is_refused() -> None:
    text = orjson.dumps({"inputs": [ONE]})
    with pytest.raises(wrong.HeaderLengthInvalid, match=rf"range \(0, {len(text)}\), got: "):
        parse(text, header=b"%d" % (len(text) + 1))


def test_raw_bytes_must_add_up() -> None:
    with pytest.raises(wrong.BinarySizeInvalid, match="9 bytes follow the JSON part"):
        parse({"inputs": [RAW]}, bytes(9))
    with pytest.raises(wrong.BinarySizeInvalid, match="claims 8 bytes"):
        parse({"inputs": [RAW]}, bytes(7))
    with pytest.raises(wrong.BinarySizeInvalid, match="8 bytes follow"):
        parse({"inputs": [ONE]}, bytes(8))


def test_json_has_bounds_of_its_own() -> None:
    with pytest.raises(wrong.TooManyBytes, match="send tensors as binary"):
        parse({"inputs": [ONE], "id": "x" * 5000})
    with pytest.raises(wrong.TooManyElements, match="lists and objects"):
        parse({"inputs": [ONE], "a": [[]] * 100})


def test_the_bound_is_exact() -> None:
    text = orjson.dumps({"inputs": [ONE], "url": ""})
    filler = b"x" * (LIMITS.max_json_bytes - len(text))
    assert parse(text[:-2] + filler + text[-2:])
    with pytest.raises(wrong.TooManyBytes):
        parse(text[:-2] + filler + b"x" + text[-2:])


HOSTILE = {
    "empty lists": lambda n: b"[" + b"[]," * (n // 3) + b"0]",
    "empty objects": lambda n: b"[" + b"{}," * (n // 3) + b"0]",
    "nested": lambda n: b"[" + b"[[[]]]," * (n // 7) + b"0]",
    "floats": lambda n: b"[" + b"1e1," * (n // 4) + b"0]",
    "texts": lambda n: b"[" + b'"ab",' * (n // 5) + b'""]',
    "quotes": lambda n: b"[" + b'"",' * (n // 3) + b'""]',
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BOOL"])
def test_hostile_json_takes_no_more_than_its_share_of_memory(make: Any, datatype: str) -> None:
    limits = Limits(max_json_bytes=1_000_000, max_json_lists=8192)
    start = b'{"inputs":[{"name":"x","shape":[9],"datatype":"%s","data":' % datatype.encode()
    body = start + make(999_000) + b"}]}"
    tracemalloc.start()
    with pytest.raises(wrong.V2Error):
        parse_request(body, None, SPEC, limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25 * limits.max_json_bytes


DTYPES = {"BOOL": "?", "FP16": "f2", "FP32": "f4", "FP64": "f8"} | {
    f"{kind}INT{bits}": f"{letter}{bits // 8}"
    for kind, letter in (("U", "u"), ("", "i"))
    for bits in (8, 16, 32, 64)
}


@settings(deadline=None)
@given(data=st.data())
def test_what_tritonclient_sends_is_what_arrives(data: st.DataObject) -> None:
    http = pytest.importorskip("tritonclient.http")
    names = data.draw(st.lists(st.sampled_from([*DTYPES, "BYTES"]), min_size=1, max_size=4))
    inputs, sent = [], []
    for number, datatype in enumerate(names):
        array = data.draw(tensor_of(datatype))
        binary = datatype == "FP16" or not_finite(array) or data.draw(st.booleans())
        one = http.InferInput(str(number), list(array.shape), datatype)
        inputs.append(one.set_data_from_numpy(array, binary_data=binary))
        sent.append(array)
    body, length = http.InferenceServerClient.generate_request_body(inputs)
    header = None if length is None else b"%d" % length
    request = parse_request(body, header, SPEC, Limits())
    for tensor, array in zip(request.inputs, sent, strict=True):
        assert tensor.shape == array.shape
        if tensor.datatype == "BYTES":
            assert tensor.data == array.reshape(-1).tolist()
        else:
            assert np.array_equal(tensor.data, array, equal_nan=array.dtype.kind == "f")


def tensor_of(datatype: str) -> st.SearchStrategy[Any]:
    shapes = arrays.array_shapes(max_dims=3, max_side=4)
    if datatype == "BYTES":
        texts = st.text(max_size=5).map(str.encode)
        return arrays.arrays(object, shapes, elements=texts)
    return arrays.arrays(DTYPES[datatype], shapes)


def not_finite(array: Any) -> bool:
    return array.dtype.kind == "f" and not np.isfinite(array).all()


def test_bfloat16_arrives_as_tritonclient_sends_it() -> None:
    http = pytest.importorskip("tritonclient.http")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([[1.0, -2.5, 3e38]], dtype=ml_dtypes.bfloat16)
    one = http.InferInput("x", [1, 3], "BF16").set_data_from_numpy(array)
    body, length = http.InferenceServerClient.generate_request_body([one])
    (tensor,) = parse_request(body, b"%d" % length, SPEC, Limits()).inputs
    assert torch.equal(tensor.data.float(), torch.from_numpy(array.astype(np.float32)))


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["input", "", "x"]),
        "shape": st.lists(st.integers(-1, 3), max_size=3) | st.none(),
        "datatype": st.sampled_from([*DATATYPES, "FP8"]),
        "data": st.lists(st.integers() | st.floats(0, 1) | st.text(max_size=3), max_size=9),
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region", "a"]),
            st.integers(-1, 24) | st.booleans() | st.none(),
        ),
    },
)


@settings(deadline=None)
@given(
    inputs=st.lists(ENTRY, max_size=3),
    raw=st.binary(max_size=48),
    header=st.none() | st.integers(-2, 400),
)
def test_any_request_is_parsed_or_refused_by_name(
    inputs: list[Any], raw: bytes, header: int | None
) -> None:
    text, sentences = json.dumps({"inputs": inputs}).encode(), []
    for length in (header, len(text)):
        said = None if length is None else b"%d" % length
        lead = lead_bytes(said)
        found = outcome(text + raw, said)
        assert outcome(bytes(lead) + text + raw, said, lead) == found
        if isinstance(found, str):
            sentences.append(found)
    assert all(10 < len(sentence) < 400 for sentence in sentences)


def outcome(body: bytes, header: bytes | None, begin: int = 0) -> object:
    """What a body was read as, or the sentence that refused it."""
    try:
        request = parse_request(body, header, SPEC, LIMITS, begin)
    except wrong.V2Error as error:
        return str(error)
    return request._replace(inputs=[(*one[:3], plain(one.data)) for one in request.inputs])  # type: ignore[arg-type]


def plain(data: torch.Tensor | list[bytes]) -> object:
    return str(data.tolist()) if isinstance(data, torch.Tensor) else data


@settings(deadline=None)
@given(body=st.binary(max_size=200), header=st.none() | st.integers(0, 200))
def test_any_bytes_are_parsed_or_refused_by_name(body: bytes, header: int | None) -> None:
    try:
        parse_request(body, None if header is None else b"%d" % header, SPEC, LIMITS)
    except wrong.V2Error:
        return
    assert header == 0
    assert len(body) == struct.calcsize("6f")
