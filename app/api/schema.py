"""The OpenAPI document: FastAPI's own routes, and entries written by hand for the plain ones."""

from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.error_examples import ERROR_EXAMPLES
from app.api.permission import every_route, scopes_of

DESCRIPTION: Final = (
    "Predict, evaluate and fine-tune PyTorch models. Models are named `digits` (its production "
    "version), `digits@alias` or `digits:3`. Every answer carries `X-Request-ID`; every error "
    "says what to change. Where there are keys, *Authorize* takes one."
)
ERRORS: Final[Mapping[int, str]] = {
    400: "The request cannot be understood; the message says what is wrong.",
    401: "A key is needed, and none came, or one that is unknown, expired or revoked.",
    403: "A web page of another origin may not do this.",
    404: "There is no such thing; the message lists the nearest names.",
    408: "The body came too slowly.",
    409: "Something else has changed first.",
    413: "The body or the picture is larger than the limit that the message names.",
    415: "This content type or picture format is not read here.",
    422: "Understood, and wrong: the message names the field, the shape or the fault.",
    429: "Too much at once; `Retry-After` says when to come back.",
    500: "The network itself failed on this input.",
    503: "Not now: starting, stopping, or the version cannot be loaded.",
    504: "The request's time was up before its answer.",
    507: "There is no room on disk.",
}
UNSAID: Final = "Successful Response"
"""How the framework describes an answer that nothing was said of."""
DONE: Final[Mapping[str, str]] = {
    "get": "What there is, as in the example.",
    "post": "Done, or begun; the answer is as in the example.",
    "put": "Done; the answer is as in the example.",
    "delete": "It is gone; the answer is as in the example.",
}
ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "param", "code"],
            "properties": {
                "type": {"type": "string", "examples": ["invalid_request_error"]},
                "message": {"type": "string", "examples": ["no model is called 'digit'"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"], "examples": ["unknown_model"]},
            },
        }
    },
}
V2_ERROR_SCHEMA: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
}
KEY: Final = {
    "type": "http",
    "scheme": "bearer",
    "description": "A key that `pytorchlib keys create` showed.",
}


EMPTY: Final[dict[str, Any]] = {"example": ""}
"""Lets *Try it out* leave a field of a form empty, where it would fill in the word string."""


def error_answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` entries of these statuses."""
    reference = {"$ref": "#/components/schemas/Error"}
    return {
        status: {
            "description": ERRORS[status],
            "content": {
                "application/json": {"schema": reference, "example": ERROR_EXAMPLES[status]}
            },
        }
        for status in statuses
    }


def shown(example: Any) -> dict[int | str, dict[str, Any]]:
    """The `responses` entry of a 200 with a worked example."""
    return {200: {"content": {"application/json": {"example": example}}}}


def predict_entry(max_picture_bytes: int) -> dict[str, Any]:
    """The entry of `POST /v1/models/{model}/predict`."""
    return {
        "post": {
            "tags": ["predict"],
            "summary": "Label pictures or tensors with a model.",
            "description": (
                "Send pictures as the form field `file` (repeat it for several), the bytes of one "
                "picture as the body, pictures in base64 as JSON, or tensors as JSON. A picture "
                f"may have {max_picture_bytes // 1024} KiB. The deadline is 30 s unless "
                "`X-Request-Timeout-Ms` says otherwise."
            ),
            "operationId": "predict",
            "parameters": [
                {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "description": "`digits`, `digits@alias` or `digits:3`.",
                    "schema": {"type": "string"},
                    "example": "digits",
                },
                {
                    "name": "top_k",
                    "in": "query",
                    "required": False,
                    "description": "How many of the most probable labels to list.",
                    "schema": {"type": "integer", "minimum": 1, "default": 5},
                },
                {
                    "name": "X-Request-Timeout-Ms",
                    "in": "header",
                    "required": False,
                    "description": "Deadline of this request in milliseconds.",
                    "schema": {"type": "number", "exclusiveMinimum": 0},
                },
            ],
            "requestBody": inputs_body(top_k=3),
            "responses": {
                "200": {
                    "description": "The labels, in the order of the inputs.",
                    "content": {
                        "application/json": {"schema": _PREDICTION, "example": _PREDICTION_EXAMPLE}
                    },
                },
                **_with_text_keys(error_answers(400, 403, 404, 408, 413, 415, 422)),
                **_with_text_keys(error_answers(429, 500, 503, 504)),
            },
        }
    }


def inputs_body(**options: Any) -> dict[str, Any]:
    """The bodies that pictures and tensors come in; `options` stand beside them in the example."""
    return {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "items": _PICTURE,
                            "description": "JPEG, PNG or WebP; repeat for several.",
                        }
                    },
                }
            },
            "application/json": {
                "schema": _JSON_BODY,
                "examples": {
                    "picture": {
                        "summary": "A picture in base64",
                        "value": {"images": [_EXAMPLE_PNG], **options},
                    }
                },
            },
            "image/jpeg": {"schema": _PICTURE},
            "image/png": {"schema": _PICTURE},
            "image/webp": {"schema": _PICTURE},
        },
    }


def install_schema(app: FastAPI, entries: Mapping[str, Any], tags: list[dict[str, str]]) -> None:
    """Let `/openapi.json` hold FastAPI's routes and `entries` (path -> path item)."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=DESCRIPTION,
                routes=app.routes,
                tags=tags,
            )
            # First, because /docs keeps the order and `predict` is what most people look for.
            schema["paths"] = {**entries, **schema["paths"]}
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {})["Error"] = ERROR_SCHEMA
            components["schemas"]["V2Error"] = V2_ERROR_SCHEMA
            components["securitySchemes"] = {"key": KEY}
            _say_scopes(app, schema["paths"])
            _fill_in(schema["paths"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _fill_in(paths: dict[str, Any]) -> None:
    """What the framework leaves open: what a good answer is, and values for *Try it out*."""
    for method, operation in (entry for path in paths.values() for entry in path.items()):
        answer = operation["responses"]["200"]
        if answer["description"] == UNSAID:
            answer["description"] = DONE[method]
        for parameter in operation.get("parameters", ()):
            examples = parameter["schema"].pop("examples", None)
            if examples:
                parameter["example"] = examples[0]


def _say_scopes(app: FastAPI, paths: dict[str, Any]) -> None:
    """Let each operation name the scope it asks for, as the route itself says it."""
    for path, route in every_route(app.routes):
        scopes, operations = scopes_of(route), paths.get(path, {})
        for method in getattr(route, "methods", None) or ():
            operation = operations.get(method.lower())
            if scopes and operation is not None:
                operation["security"] = [{"key": list(scopes)}]
                _add_refusals(operation["responses"], path, " and ".join(scopes))


def _add_refusals(answers: dict[str, Any], path: str, scope: str) -> None:
    is_v2 = path.startswith("/v2")
    form = "V2Error" if is_v2 else "Error"
    refusals = {
        "401": ERRORS[401],
        "403": f"The key lacks the scope `{scope}`, or a web page of another origin asked.",
        "429": ERRORS[429],
    }
    for status, sentence in refusals.items():
        example = ERROR_EXAMPLES[int(status)]
        shown = {"error": example["error"]["message"]} if is_v2 else example
        schema = {"$ref": f"#/components/schemas/{form}"}
        content = {"application/json": {"schema": schema, "example": shown}}
        answers[status] = {"content": content, **answers.get(status, {}), "description": sentence}


def _with_text_keys(answers: Mapping[int | str, Any]) -> dict[str, Any]:
    return {str(status): answer for status, answer in answers.items()}


# An eight by eight grey picture of a four, so that the example can be sent as it stands.
_EXAMPLE_PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAO0lEQVR4nGNgYGBgYPj/nwEE"
    "GP7//8/AwPD/PwMDw///DAwM//8zMDD8/8/AwPD/PwMDA8P//wwMDAwMAPVdDf9bH0rtAAAA"
    "AElFTkSuQmCC"
)
_JSON_BODY: Final = {
    "type": "object",
    "properties": {
        "images": {
            "type": "array",
            "items": {"type": "string", "contentEncoding": "base64"},
            "description": "Encoded pictures.",
        },
        "inputs": {
            "type": "array",
            "items": {},
            "description": "Nested lists of numbers, `[n, *input_shape]`, after preprocessing.",
        },
        "top_k": {"type": "integer", "minimum": 1},
    },
}
_LABEL: Final = {
    "label": {"type": "string"},
    "probability": {"type": "number", "minimum": 0, "maximum": 1},
}
_PREDICTION: Final = {
    "type": "object",
    "required": ["model", "version", "predictions", "time_ms"],
    "properties": {
        "model": {"type": "string"},
        "version": {"type": "integer"},
        "predictions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    **_LABEL,
                    "top_k": {
                        "type": "array",
                        "items": {"type": "object", "properties": _LABEL},
                    },
                },
            },
        },
        "time_ms": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_PREDICTION_EXAMPLE: Final = {
    "model": "digits",
    "version": 1,
    "predictions": [
        {
            "label": "4",
            "probability": 0.998,
            "top_k": [{"label": "4", "probability": 0.998}, {"label": "9", "probability": 0.001}],
        }
    ],
    "time_ms": {"decode": 0.2, "queue": 0.03, "compute": 0.14, "total": 0.41},
}
_PICTURE: Final = {"type": "string", "format": "binary"}
