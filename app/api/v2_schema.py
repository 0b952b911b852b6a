"""The OpenAPI entries of `/v2`, written by hand: its routes are plain Starlette endpoints."""

from collections.abc import Mapping
from typing import Any, Final

from app.api.schema import ERRORS, V2_ERROR_SCHEMA
from app.api.v2_tensors import DATATYPES

TAG: Final = {
    "name": "v2",
    "description": "The Open Inference Protocol (KServe V2), for clients that speak it already.",
}
_ERROR_EXAMPLES: Final = {
    400: "data of input 'input' has 63 elements, its shape [1, 64] has 64",
    403: "a page of http://elsewhere.example may not do this",
    404: "there is no model 'digit'; the nearest is digits",
    408: "the body came too slowly",
    413: "the body is larger than the limit of 67108864 bytes",
    415: "Content-Encoding 'br' is neither gzip nor deflate",
    429: "1024 inputs wait for digits:1; send this again later",
    500: "digits:1 failed on this input",
    503: "digits was unloaded; load it through the repository first",
    504: "the request's time was up before its answer",
}
_READING: Final = (404, 503)
_CHANGING: Final = (400, 403, 404, 408, 413, 503)
_INFERRING: Final = (400, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def v2_entries() -> dict[str, dict[str, Any]]:
    """Path -> path item, for every route of `app.api.v2.v2_routes`."""
    entries = {path: {"get": entry} for path, entry in _server_entries().items()}
    for path, entry in _repository_entries().items():
        entries[path] = {"post": entry}
    for prefix, suffix in (("/v2/models/{model}", ""), (_VERSIONED, "_of_version")):
        parameters = [_MODEL, _VERSION] if suffix else [_MODEL]
        entries[f"{prefix}/infer"] = {"post": _infer(parameters, suffix)}
        for tail, entry in _model_entries(parameters, suffix).items():
            entries[f"{prefix}{tail}"] = {"get": entry}
    return entries


def _server_entries() -> dict[str, dict[str, Any]]:
    return {
        "/v2": _entry(
            "Name the server and the extensions it offers.",
            "v2_server",
            {"name": "pytorchlib", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
        ),
        "/v2/health/live": _entry("Say that the process runs.", "v2_live", {"live": True}),
        "/v2/health/ready": _entry(
            "Say whether requests can be answered.", "v2_ready", {"ready": True}, errors=(503,)
        ),
        "/v2/models/stats": _entry(
            "Count what every live version has done.",
            "v2_all_statistics",
            {"model_stats": [_STATISTICS]},
            errors=(503,),
        ),
    }


def _model_entries(parameters: list[Any], suffix: str) -> dict[str, dict[str, Any]]:
    rows = {
        "": ("Describe the tensors that a model takes and gives.", "metadata", _METADATA),
        "/ready": (
            "Say whether a model can be asked, loading it first where needed.",
            "model_ready",
            {"name": "digits", "ready": True},
        ),
        "/config": ("Describe how a model is batched.", "configuration", _CONFIGURATION),
        "/stats": (
            "Count what a model has done.",
            "statistics",
            {"model_stats": [_STATISTICS]},
        ),
    }
    return {
        tail: _entry(summary, f"v2_{name}{suffix}", example, parameters=parameters, errors=_READING)
        for tail, (summary, name, example) in rows.items()
    }


def _repository_entries() -> dict[str, dict[str, Any]]:
    listing = {"name": "digits", "version": "1", "state": "READY", "reason": ""}
    return {
        "/v2/repository/index": _entry(
            "List every version in the store and its state.",
            "v2_repository_index",
            [listing],
            body=({"type": "object", "properties": {"ready": {"type": "boolean"}}}, {}),
            errors=(403, 408, 413, 503),
        ),
        "/v2/repository/models/{model}/load": _entry(
            "Load a model; the answer comes when it is live.",
            "v2_repository_load",
            {},
            parameters=[_MODEL],
            body=({"type": "object"}, {}),
            errors=_CHANGING,
        ),
        "/v2/repository/models/{model}/unload": _entry(
            "Let go of every version of a model, until it is loaded again.",
            "v2_repository_unload",
            {},
            parameters=[_MODEL],
            body=(
                {"type": "object", "properties": {"parameters": {"type": "object"}}},
                {"parameters": {"unload_dependents": False}},
            ),
            errors=_CHANGING,
        ),
    }


def _infer(parameters: list[Any], suffix: str) -> dict[str, Any]:
    entry = _entry(
        "Ask a model with tensors, as JSON or as raw bytes.",
        f"v2_infer{suffix}",
        _ANSWER,
        parameters=[*parameters, *_INFER_HEADERS],
        body=(_REQUEST, _REQUEST_EXAMPLE),
        errors=_INFERRING,
    )
    raw = {"schema": {"type": "string", "format": "binary"}}
    entry["requestBody"]["content"]["application/octet-stream"] = raw
    entry["responses"]["200"]["content"]["application/octet-stream"] = raw
    entry["responses"]["200"]["headers"] = {
        _HEADER_LENGTH["name"]: {
            "description": "Bytes of JSON before the raw outputs; absent where all is JSON.",
            "schema": {"type": "integer"},
        }
    }
    entry["description"] = (
        "Content types are ignored: `Inference-Header-Content-Length` alone says whether raw "
        "tensors follow the JSON part, each as long as its `parameters.binary_data_size`; 0 says "
        "that the body is one raw tensor. FP16 and BF16 travel raw only. A model that takes "
        "pictures also takes them encoded, as the BYTES input `image` instead of `input`. Output "
        "parameters are `binary_data` and `classification` (the k best labels)."
    )
    return entry


def _entry(
    summary: str,
    operation_id: str,
    example: object,
    *,
    parameters: list[Any] | None = None,
    body: tuple[Mapping[str, Any], object] | None = None,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "tags": [TAG["name"]],
        "summary": summary,
        "operationId": operation_id,
        "parameters": parameters or [],
        "responses": {
            "200": {
                "description": "Done.",
                "content": {"application/json": {"example": example}},
            },
            **{str(status): _error(status) for status in sorted({400, 500, *errors})},
        },
    }
    if body is not None:
        schema, sample = body
        entry["requestBody"] = {
            "content": {"application/json": {"schema": schema, "example": sample}}
        }
    return entry


def _error(status: int) -> dict[str, Any]:
    return {
        "description": ERRORS[status],
        "content": {
            "application/json": {
                "schema": V2_ERROR_SCHEMA,
                "example": {"error": _ERROR_EXAMPLES[status]},
            }
        },
    }


def _tensor_schema(**more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "datatype": {"enum": list(DATATYPES)},
            "parameters": {"type": "object"},
            "data": {"type": "array", "items": {}},
            **more,
        },
    }


_VERSIONED: Final = "/v2/models/{model}/versions/{version}"
_MODEL: Final = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "`digits`, `digits@alias` or `digits:3`.",
    "schema": {"type": "string"},
    "example": "digits",
}
_VERSION: Final = {
    "name": "version",
    "in": "path",
    "required": True,
    "description": "A number or an alias.",
    "schema": {"type": "string"},
    "example": "production",
}
_HEADER_LENGTH: Final = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "Bytes of JSON before the raw tensors; 0 for a raw tensor alone.",
    "schema": {"type": "integer", "minimum": 0},
}
_INFER_HEADERS: Final = (
    _HEADER_LENGTH,
    {
        "name": "X-Request-Timeout-Ms",
        "in": "header",
        "required": False,
        "description": "Deadline in milliseconds; the shorter of it and `parameters.timeout`.",
        "schema": {"type": "number", "exclusiveMinimum": 0},
    },
)
_REQUEST: Final = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {
            "type": "object",
            "properties": {
                "priority": {"type": "integer", "minimum": 0},
                "timeout": {"type": "integer", "minimum": 0, "description": "Microseconds."},
                "binary_data_output": {"type": "boolean"},
            },
        },
        "inputs": {"type": "array", "items": _tensor_schema()},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
    },
}
# An eight by eight picture of a one.
_ONE: Final = [0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0] * 8
_REQUEST_EXAMPLE: Final = {
    "id": "a1",
    "inputs": [{"name": "input", "shape": [1, 64], "datatype": "FP32", "data": _ONE}],
    "outputs": [{"name": "probabilities", "parameters": {"classification": 3}}],
}
_ANSWER: Final = {
    "model_name": "digits",
    "model_version": "1",
    "id": "a1",
    "outputs": [
        {
            "name": "probabilities",
            "datatype": "BYTES",
            "shape": [1, 3],
            "data": ["0.981250:1:1", "0.012500:8:8", "0.003125:4:4"],
        }
    ],
}
_METADATA: Final = {
    "name": "digits",
    "versions": ["1"],
    "platform": "pytorch",
    "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 64]}],
    "outputs": [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
    ],
    "alternative_inputs": [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "pixels", "datatype": "UINT8", "shape": [-1, 1, 8, 8]},
    ],
}
_CONFIGURATION: Final = {
    "name": "digits",
    "platform": "pytorch",
    "backend": "pytorch",
    "max_batch_size": 32,
    "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": [64]}],
    "output": [{"name": "logits", "data_type": "TYPE_FP32", "dims": [10]}],
    "dynamic_batching": {"max_queue_delay_microseconds": 0},
}
_STATISTICS: Final = {
    "name": "digits",
    "version": "1",
    "last_inference": 1767225600000,
    "inference_count": 3,
    "execution_count": 2,
    "inference_stats": {"success": {"count": 3, "ns": 1200000}},
}
