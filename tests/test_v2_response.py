"""The answer to an `infer` request, read back as tritonclient reads it."""

import math
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.api.v2_errors import DatatypeRefused, OutputNotJson, OutputUnknown
from app.api.v2_request import InferRequest, RequestedOutput
from app.api.v2_response import classification, encode_answer, select_outputs
from app.api.v2_tensors import DATATYPES, NamedTensor

LABELS = ["zero", "one", "two"]


def named(name: str, data: Tensor, datatype: str = "FP32") -> NamedTensor:
    return NamedTensor(name, datatype, tuple(data.shape), data)


def asking(*outputs: RequestedOutput, binary: bool = False) -> InferRequest:
    return InferRequest(None, [], list(outputs) or None, binary, 0, 0)


def read_back(outputs: list[tuple[NamedTensor, bool]]) -> Any:
    """The answer as tritonclient's own reader takes it."""
    http = pytest.importorskip("tritonclient.http")
    body, length = encode_answer("digits", "3", None, outputs)
    return http.InferenceServerClient.parse_response_body(body, header_length=length)


def test_the_answer_names_model_version_and_id() -> None:
    body, length = encode_answer("digits", "3", "seven", [(named("y", torch.ones(1, 2)), False)])
    assert length is None
    assert orjson.loads(body) == {
        "model_name": "digits",
        "model_version": "3",
        "id": "seven",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 1.0]}],
    }
    assert "id" not in orjson.loads(encode_answer("digits", "3", None, []).body)


@settings(deadline=None)
@given(
    data=st.data(),
    wanted=st.lists(st.sampled_from(list(DATATYPES)), min_size=1, max_size=4),
)
def test_every_datatype_is_read_back_as_it_was(data: st.DataObject, wanted: list[str]) -> None:
    outputs = []
    for number, datatype in enumerate(wanted):
        shape = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
        tensor = tensor_of(str(number), datatype, shape)
        binary = datatype in ("FP16", "BF16") or data.draw(st.booleans())
        outputs.append((tensor, binary))
    result = read_back(outputs)
    for tensor, _ in outputs:
        found = result.as_numpy(tensor.name)
        assert found.shape == tensor.shape
        assert same(found, tensor)


def tensor_of(name: str, datatype: str, shape: tuple[int, ...]) -> NamedTensor:
    count = math.prod(shape)
    if datatype == "BYTES":
        return NamedTensor(name, "BYTES", shape, [b"%d" % index for index in range(count)])
    tensor = torch.arange(count).to(DATATYPES[datatype].dtype).view(shape)
    return NamedTensor(name, datatype, shape, tensor)


def same(found: Any, tensor: NamedTensor) -> bool:
    if not isinstance(tensor.data, Tensor):
        texts = [one if isinstance(one, bytes) else one.encode() for one in found.reshape(-1)]
        return texts == tensor.data
    return np.array_equal(found.astype(np.float64), tensor.data.to(torch.float64).numpy())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_carry_is_an_error_that_says_so(value: float) -> None:
    output = named("logits", torch.tensor([[1.0, value]]))
    with pytest.raises(OutputNotJson, match="'logits' holds NaN or infinity.*binary data"):
        encode_answer("digits", "3", None, [(output, False)])
    found = read_back([(output, True)]).as_numpy("logits")
    assert np.array_equal(found, [[1, value]], equal_nan=True)


def test_the_word_null_is_no_infinity() -> None:
    body, _ = encode_answer("null", "3", "null", [(named("null", torch.ones(1)), False)])
    assert orjson.loads(body)["outputs"][0]["data"] == [1.0]


def test_answers_without_elements_are_all_json() -> None:
    outputs = [(named("a", torch.empty(0, 3)), True), (named("b", torch.empty(0, 3)), False)]
    body, length = encode_answer("digits", "3", None, outputs)
    assert length is None
    first, second = orjson.loads(body)["outputs"]
    assert first["parameters"] == {"binary_data_size": 0}
    assert "data" not in first
    assert second["data"] == []
    assert read_back(outputs).as_numpy("a").shape == (0, 3)


def test_rows_of_a_larger_batch_are_sent_alone() -> None:
    batch = torch.arange(12.0).view(2, 6)[:, ::2]
    found = read_back([(named("a", batch), True), (named("b", batch), False)])
    assert np.array_equal(found.as_numpy("a"), [[0, 2, 4], [6, 8, 10]])
    assert np.array_equal(found.as_numpy("b"), [[0, 2, 4], [6, 8, 10]])


def test_classes_are_sorted_and_named() -> None:
    scores = named("scores", torch.tensor([[0.25, 3, -1], [1, 2, 1e-7]]))
    found = classification(scores, 2, LABELS)
    assert (found.datatype, found.shape) == ("BYTES", (2, 2))
    assert found.data == [
        b"3.000000:1:one",
        b"0.250000:0:zero",
        b"2.000000:1:one",
        b"1.000000:0:zero",
    ]


def test_no_more_classes_than_there_are_and_no_label_than_known() -> None:
    found = classification(named("scores", torch.tensor([[1.0, 2, 3]])), 99, LABELS[:1])
    assert found.shape == (1, 3)
    assert found.data == [b"3.000000:2", b"2.000000:1", b"1.000000:0:zero"]


def test_classes_of_an_empty_batch_are_none() -> None:
    found = classification(named("scores", torch.empty(0, 3)), 2, LABELS)
    assert (found.shape, found.data) == ((0, 2), [])


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_sixteen_bit_floats_have_no_classes(datatype: str) -> None:
    scores = named("scores", torch.ones(1, 3).to(DATATYPES[datatype].dtype), datatype)
    with pytest.raises(DatatypeRefused):
        classification(scores, 1, LABELS)


def test_outputs_come_as_asked_and_in_that_order() -> None:
    produced = {name: named(name, torch.ones(1, 3)) for name in ("logits", "probabilities")}
    request = asking(RequestedOutput("probabilities", True, 0), RequestedOutput("logits", False, 1))
    (first, binary), (second, json) = select_outputs(request, produced, LABELS)
    assert (first.name, binary, second.name, json) == ("probabilities", True, "logits", False)
    assert second.data == [b"1.000000:0:zero"]
    assert [flag for _, flag in select_outputs(asking(binary=True), produced, LABELS)] == [True] * 2


def test_an_unknown_output_is_refused_with_what_there_is() -> None:
    produced = {"logits": named("logits", torch.ones(1, 3))}
    with pytest.raises(OutputUnknown, match="'logit'; it gives logits"):
        select_outputs(asking(RequestedOutput("logit", False, 0)), produced, LABELS)
