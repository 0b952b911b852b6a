"""Predicted tensors become the answer to an `infer` request: JSON, or JSON and raw tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
import torch
from torch import Tensor

from app.api.v2_errors import DatatypeRefused, OutputNotJson, OutputUnknown, shown
from app.api.v2_request import InferRequest, RequestedOutput
from app.api.v2_tensors import BINARY_ONLY, NamedTensor, is_finite, to_json, to_wire


class Answer(NamedTuple):
    """A body, and how many of its bytes are JSON; None where all are."""

    body: bytes
    header_length: int | None


def select_outputs(
    request: InferRequest, produced: dict[str, NamedTensor], labels: Sequence[str]
) -> list[tuple[NamedTensor, bool]]:
    """What was asked for, in that order, each with whether it travels as binary data.

    Raises:
        OutputUnknown: the model gives no output of that name.
        DatatypeRefused: labels of 16-bit numbers.
    """
    if request.outputs is None:
        return [(tensor, request.binary_output) for tensor in produced.values()]
    return [(_one(wanted, produced, labels), wanted.binary) for wanted in request.outputs]


def classification(tensor: NamedTensor, num_classes: int, labels: Sequence[str]) -> NamedTensor:
    """The `num_classes` largest values of each row as "value:index:label", largest first.

    Args:
        tensor: `[n, classes]`.

    Returns:
        BYTES `[n, min(num_classes, classes)]`.

    Raises:
        DatatypeRefused: FP16, BF16, or not numbers at all.
    """
    if tensor.datatype in BINARY_ONLY or not isinstance(tensor.data, Tensor):
        raise DatatypeRefused(f"{tensor.datatype} output {shown(tensor.name)} has no classes")
    values, indices = torch.topk(tensor.data, min(num_classes, tensor.shape[-1]), dim=-1)
    elements = [
        _class_text(value, index, labels)
        for value, index in zip(
            values.reshape(-1).tolist(), indices.reshape(-1).tolist(), strict=True
        )
    ]
    return NamedTensor(tensor.name, "BYTES", tuple(values.shape), elements)


def encode_answer(
    model_name: str,
    model_version: str,
    request_id: str | None,
    outputs: list[tuple[NamedTensor, bool]],
) -> Answer:
    """The body of the answer.

    Args:
        outputs: each with whether it travels as binary data.

    Raises:
        OutputNotJson: a JSON output that JSON cannot carry: 16-bit floats, NaN or infinity, bytes
            that are not UTF-8.
    """
    document: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        document["id"] = request_id
    buffers: list[memoryview] = []
    document["outputs"] = [_entry(tensor, binary, buffers) for tensor, binary in outputs]
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson writes null for NaN and infinity: only where it did are the numbers looked at.
    if b"null" in text:
        _check_finite(outputs)
    body = b"".join((text, *buffers))
    return Answer(body, len(text) if len(body) > len(text) else None)


def _one(
    wanted: RequestedOutput, produced: dict[str, NamedTensor], labels: Sequence[str]
) -> NamedTensor:
    tensor = produced.get(wanted.name)
    if tensor is None:
        raise OutputUnknown(
            f"the model has no output {shown(wanted.name)}; it gives {', '.join(produced)}"
        )
    return classification(tensor, wanted.num_classes, labels) if wanted.num_classes else tensor


def _class_text(value: float, index: int, labels: Sequence[str]) -> bytes:
    label = f":{labels[index]}" if index < len(labels) else ""
    return f"{value:.6f}:{index}{label}".encode()


def _entry(tensor: NamedTensor, binary: bool, buffers: list[memoryview]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": tensor.name,
        "datatype": tensor.datatype,
        "shape": tensor.shape,
    }
    if binary:
        buffer = to_wire(tensor)
        buffers.append(buffer)
        entry["parameters"] = {"binary_data_size": buffer.nbytes}
    else:
        entry["data"] = to_json(tensor)
    return entry


def _check_finite(outputs: list[tuple[NamedTensor, bool]]) -> None:
    for tensor, binary in outputs:
        if not binary and not is_finite(tensor.data):
            raise OutputNotJson(
                f"output {shown(tensor.name)} holds NaN or infinity, which JSON cannot carry; "
                "ask for it as binary data"
            )
