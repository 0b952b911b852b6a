"""What an `infer` request means to one model, and how the model describes itself under `/v2`.

Every model takes the tensor that its preprocessing ends in as its first input. Further inputs are
alternatives to it, such as encoded pictures: a request gives exactly one. Metadata and config list
the first under `inputs`, because generic clients (perf_analyzer among them) send everything that
stands there, and the others under `alternative_inputs`.
"""

from typing import Any

import torch
from torch import Tensor

from app.api.v2_errors import (
    DatatypeRefused,
    InputMissing,
    InputsConflict,
    InputUnexpected,
    ShapeInvalid,
    TooManyElements,
    shown,
)
from app.api.v2_tensors import Limits, NamedTensor
from app.engine.pictures import Rows
from app.engine.predictor import Prediction, Predictor, TensorSpec
from app.engine.statistics import Duration, Statistics

PLATFORM = "pytorch"
# 16-bit floats widen to 32 bits without loss, and halve the bytes on the wire.
ACCEPTED_DATATYPES = {"FP32": ("FP32", "FP16", "BF16")}
# The protocol counts priorities from 1, the highest; 0 asks for the default.
DEFAULT_PRIORITY_LEVEL = 2
NUM_PRIORITY_LEVELS = 3


async def batch_of(
    predictor: Predictor, inputs: list[NamedTensor], limits: Limits, deadline: float
) -> Rows:
    """The one input of a request as the model's batch.

    Args:
        deadline: of `time.monotonic`, in seconds.

    Returns:
        As `Predictor.predict` takes it; n may be 0.

    Raises:
        V2Error: an input that the model does not take, or in another datatype or shape.
        models.picture.PictureError: a picture that cannot be used.
    """
    batch = numbers_of(predictor, inputs, limits)
    if batch is not None:
        return batch
    (tensor,) = inputs
    if isinstance(tensor.data, Tensor):
        return await predictor.from_pixels(tensor.data)
    if not tensor.data:
        return torch.empty((0, *predictor.inputs[0].shape))
    return await predictor.rows_of(tensor.data, deadline)


def numbers_of(predictor: Predictor, inputs: list[NamedTensor], limits: Limits) -> Tensor | None:
    """The same where the input is the network's own numbers; None for pictures and pixels.

    Raises:
        V2Error: as `batch_of`.
    """
    spec, tensor = _matched(predictor, inputs)
    _check_shape(spec, tensor, limits)
    if spec.datatype != "FP32" or not isinstance(tensor.data, Tensor):
        return None
    return tensor.data if tensor.datatype == "FP32" else tensor.data.to(torch.float32)


def outputs_of(predictor: Predictor, prediction: Prediction | None) -> dict[str, NamedTensor]:
    """Every output by name; without a prediction, those of an empty batch."""
    outputs = {}
    for spec in predictor.outputs:
        name, shape = spec.name, spec.shape
        data = torch.empty((0, *shape)) if prediction is None else getattr(prediction, name)
        outputs[name] = NamedTensor(name, spec.datatype, (data.shape[0], *shape), data)
    return outputs


def queue_priority(priority: int) -> int:
    """The protocol's priority as the queue counts it: lower goes first, 0 is the default."""
    if priority == 0:
        return 0
    return min(priority, NUM_PRIORITY_LEVELS) - DEFAULT_PRIORITY_LEVEL


def metadata(predictor: Predictor, versions: list[str]) -> dict[str, Any]:
    """The model as `GET /v2/models/{model}` describes it."""
    first, *alternatives = predictor.inputs
    document: dict[str, Any] = {
        "name": predictor.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [_described(first)],
        "outputs": [_described(spec) for spec in predictor.outputs],
    }
    if alternatives:
        document["alternative_inputs"] = [_described(spec) for spec in alternatives]
    return document


def configuration(predictor: Predictor, max_batch_size: int) -> dict[str, Any]:
    """The model as `GET /v2/models/{model}/config` describes it: dimensions without the batch."""
    return {
        "name": predictor.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": max_batch_size,
        "input": [_configured(predictor.inputs[0])],
        "output": [_configured(spec) for spec in predictor.outputs],
        "dynamic_batching": {
            "max_queue_delay_microseconds": 0,
            "priority_levels": NUM_PRIORITY_LEVELS,
            "default_priority_level": DEFAULT_PRIORITY_LEVEL,
        },
    }


def statistics(predictor: Predictor) -> dict[str, Any]:
    """The counts of one live version as the statistics extension reports them.

    There is no response cache; its counts are sent because clients read them unasked.
    """
    counts = predictor.statistics
    return {
        "name": predictor.name,
        "version": str(predictor.version),
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.inference_count,
        "execution_count": counts.execution_count,
        "inference_stats": {
            "success": _duration(counts.success),
            "fail": _duration(counts.fail),
            "queue": _duration(counts.queue),
            "compute_input": _duration(counts.compute_input),
            "compute_infer": _duration(counts.compute_infer),
            "compute_output": _duration(counts.compute_output),
            "cache_hit": _duration(Duration()),
            "cache_miss": _duration(Duration()),
        },
        "response_stats": {},
        "batch_stats": _batch_statistics(counts),
        "memory_usage": [
            {"type": "MODEL", "id": "0", "byte_size": predictor.memory_bytes},
        ],
    }


def _matched(predictor: Predictor, inputs: list[NamedTensor]) -> tuple[TensorSpec, NamedTensor]:
    found = None
    for tensor in inputs:
        found = next((spec for spec in predictor.inputs if spec.name == tensor.name), None)
        if found is None:
            raise InputUnexpected(
                f"{predictor.name} has no input {shown(tensor.name)}; it takes {_either(predictor)}"
            )
    if found is None:
        raise InputMissing(f"{predictor.name} takes {_either(predictor)}")
    if len(inputs) > 1:
        raise InputsConflict(f"{predictor.name} takes {_either(predictor)}, not several at once")
    spec, tensor = found, inputs[0]
    accepted = ACCEPTED_DATATYPES.get(spec.datatype, (spec.datatype,))
    if tensor.datatype not in accepted:
        raise DatatypeRefused(
            f"input {spec.name!r} takes {' or '.join(accepted)}, not {tensor.datatype}"
        )
    return spec, tensor


def _check_shape(spec: TensorSpec, tensor: NamedTensor, limits: Limits) -> None:
    num_items, rest = tensor.shape[0], tensor.shape[1:]
    single = spec.datatype == "BYTES" and rest == (1,)  # [n, 1] is how some clients write [n]
    if rest != spec.shape and not single:
        raise ShapeInvalid(
            f"input {spec.name!r} has shape {list(tensor.shape)}; "
            f"this model takes {[-1, *spec.shape]}, -1 being the batch"
        )
    if num_items > limits.max_items:
        raise TooManyElements(f"{num_items} items were sent; the limit is {limits.max_items}")


def _either(predictor: Predictor) -> str:
    return " or ".join(spec.name for spec in predictor.inputs)


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape]}


def _configured(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape)}


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _batch_statistics(counts: Statistics) -> list[dict[str, Any]]:
    return [
        {
            "batch_size": size,
            "compute_input": {"count": duration.count, "ns": 0},
            "compute_infer": _duration(duration),
            "compute_output": {"count": duration.count, "ns": 0},
        }
        for size, duration in sorted(counts.batches.items())
    ]
