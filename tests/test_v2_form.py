"""A body whose form is known is read as if it were not."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from app.api.v2_errors import V2Error
from app.api.v2_form import BinaryForm, JsonForm, KnownForms
from app.api.v2_request import InferRequest, parse_request
from app.api.v2_tensors import Limits
from app.engine.predictor import TensorSpec

SPEC = TensorSpec("input", "FP32", (4,))
LIMITS = Limits(max_json_lists=64)
numbers = st.one_of(st.floats(width=32), st.integers(-(2**70), 2**70), st.just(-0.0))
pieces = st.one_of(
    numbers.map(json.dumps), st.sampled_from(["true", "null", '"1"', '"["', "[1]", "{}", "]", ""])
)
lists = st.lists(pieces, max_size=5).map(lambda parts: "[" + ", ".join(parts) + "]")


def seen(request: InferRequest) -> Any:
    """What a request holds, bit for bit."""
    tensors = [
        (one.name, one.datatype, one.shape, one.data.dtype, one.data.numpy().tobytes())
        for one in request.inputs
        if isinstance(one.data, torch.Tensor)
    ]
    return tensors, request._replace(inputs=[])


def outcome(parse: Any, body: bytes, header: bytes | None) -> Any:
    try:
        return seen(parse(body, header, SPEC, LIMITS))
    except V2Error as error:
        return type(error), str(error)


def same_as_ever(bodies: list[tuple[bytes, bytes | None]]) -> KnownForms:
    form = KnownForms()
    for body, header in bodies:
        assert outcome(form.parse, body, header) == outcome(parse_request, body, header)
    return form


def document(data: str, datatype: str = "FP32", count: int = 3, more: str = "") -> bytes:
    entry = f'"name": "input", "shape": [1, {count}], "datatype": "{datatype}", "data": {data}'
    return f'{{"inputs": [{{{entry}}}]{more}}}'.encode()


@given(st.lists(lists, min_size=2, max_size=4), st.sampled_from(["FP32", "FP64", "INT8", "BOOL"]))
@example(["[1, 2, 3]", "[1, [2], 3]", "[4, 5, 6]"], "FP32")
@example(["[1, 2, 3]", "[1, 2]", "[1, 2, 1e39]", "[1, true, 3]", "[1, 2, 3]]"], "FP32")
@example(["[true, false, true]", "[1, 0, 1]"], "BOOL")
def test_any_numbers_behind_a_known_form(data: list[str], datatype: str) -> None:
    same_as_ever([(document(one, datatype), None) for one in ["[1, 2, 3]", *data]])


@pytest.mark.parametrize("count", [3, 400])
def test_the_form_is_kept_and_used(count: int) -> None:
    one, other = (json.dumps([start + x / 7 for x in range(count)]) for start in (0, 1))
    form = same_as_ever([(document(one, count=count), None)])
    kept = form._forms[0]
    assert isinstance(kept, JsonForm)
    read = kept.read(document(other, count=count), LIMITS)
    assert read is not None
    expected = parse_request(document(other, count=count), None, SPEC, LIMITS)
    assert (
        seen(read)
        == seen(expected)
        != seen(parse_request(document(one, count=count), None, SPEC, LIMITS))
    )


@pytest.mark.parametrize(
    "more",
    [
        ', "data": [7]',
        ', "id": "data"',
        ', "id": "a\\\\"data\\\\": [1]"',
        ', "id": "x", "outputs": [{"name": "logits"}], "parameters": {"priority": 1}',
    ],
)
def test_whatever_else_stands_in_the_document(more: str) -> None:
    bodies = [document(data, more=more) for data in ("[1, 2, 3]", "[4, 5, 6]", "[4, 5]")]
    other = document("[7, 8, 9]", more=more.replace("x", "y"))
    same_as_ever([(body, None) for body in (*bodies, other, *bodies)])


def raw(*arrays: Any, datatype: str = "FP32", extra: bytes = b"") -> tuple[bytes, bytes]:
    entries = [
        {
            "name": f"input{number}",
            "datatype": datatype,
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for number, array in enumerate(arrays)
    ]
    text = json.dumps({"inputs": entries}).encode()
    return text + b"".join(one.tobytes() for one in arrays) + extra, b"%d" % len(text)


@given(st.integers(0, 3), st.integers(0, 3), st.binary(max_size=3))
def test_raw_tensors_behind_a_known_form(first: int, second: int, extra: bytes) -> None:
    arrays = [np.full((rows, 2), rows + 0.5, np.float32) for rows in (first, second)]
    other = [array + 1 for array in arrays]
    form = same_as_ever([raw(*arrays), raw(*other), raw(*arrays[::-1])])
    same_as_ever([raw(*arrays), raw(*other, extra=extra), raw(*other)])
    assert isinstance(form._forms[0], BinaryForm)


def test_a_truth_value_that_is_none_is_refused_each_time() -> None:
    good, bad = np.array([0, 1], np.uint8), np.array([0, 2], np.uint8)
    same_as_ever([raw(one, datatype="BOOL") for one in (good, bad, good, bad)])


def test_no_form_is_kept_of_what_has_none() -> None:
    texts = json.dumps(
        {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}
    )
    form = same_as_ever([(texts.encode(), None), (bytes(16), b"0"), (b"{}", None)])
    assert form._forms == []
