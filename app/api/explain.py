"""`POST /v1/models/{model}/explain`: why this answer? Attributions as numbers or as a picture.

Bodies are those of `predict`, for one input; options come in the query, as fields of the form, or
beside the input in JSON.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, quote

import orjson
from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response
from torch import Tensor

from app.api.caller import CallerGone, WhileCallerWaits, read_body, timeout_s
from app.api.complaint import complaint
from app.api.heat_map import heat_map_png
from app.api.multipart import parse_form
from app.api.permission import requires
from app.api.predict import Inputs, read_document, read_inputs, read_object
from app.api.predict import batch_of as predict_batch_of
from app.api.schema import error_answers, inputs_body
from app.api.v2_response import encode_answer
from app.api.v2_tensors import NamedTensor
from app.engine.attribution import Baseline, Explainer, Explanation, Method, Question
from app.engine.live import LiveModels
from app.engine.pictures import Pictures
from app.engine.predictor import Predictor
from app.errors import BadInput, BadRequest, ForwardFailed

JSON, BINARY, PNG = "application/json", "application/octet-stream", "image/png"
MAX_STEPS: Final = 4096


class ExplainOptions(BaseModel):
    """How to explain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field(
        "integrated_gradients",
        description="`saliency`: the gradient. `integrated_gradients`: its mean on the way from a "
        "baseline; sums to what the output gained. `grad_cam`: where the last convolution looks. "
        "`occlusion`: what the output loses when a window is covered.",
    )
    target: str = Field(
        "",
        max_length=256,
        description="The class to explain: a label, or the index of one; the predicted one when "
        "empty.",
    )
    baseline: Baseline = Field(
        "black",
        description="What stands for nothing in a picture: `black`, `white`, or the `mean` that "
        "normalising removes. Tensors know only zeros.",
    )
    steps: int = Field(
        32,
        ge=1,
        le=MAX_STEPS,
        description="Steps of `integrated_gradients`; doubled until its sum is within 1 % or the "
        "time is up.",
    )
    max_steps: int = Field(
        1024, ge=1, le=MAX_STEPS, description="Steps of `integrated_gradients` at most."
    )
    window: int | None = Field(
        None, ge=1, le=8192, description="Side of the window of `occlusion`; an eighth of a side."
    )
    stride: int | None = Field(
        None, ge=1, le=8192, description="From one window to the next; half a window."
    )


@dataclass(frozen=True, slots=True)
class ExplainLimits:
    """Bounds of one request; see the settings of these names."""

    max_body_bytes: int
    request_timeout_ms: float


def explain_routes(live: LiveModels, explainer: Explainer, limits: ExplainLimits) -> APIRouter:
    """The route that explains."""
    router = APIRouter(prefix="/v1/models", tags=["predict"])

    @router.post(
        "/{model}/explain",
        summary="Explain an answer: what in the input speaks for a class.",
        description=(
            "Send one picture or tensor as to `predict`. `Accept` chooses the answer: "
            "`application/json`, `image/png` (the picture under its heat map, red for and blue "
            "against the class), or `application/octet-stream` (the tensor `attributions` as the "
            "Open Inference Protocol sends it). The deadline is 30 s unless "
            "`X-Request-Timeout-Ms` says otherwise."
        ),
        dependencies=[requires("predict")],
        openapi_extra={
            "parameters": _query_entries(),
            "requestBody": inputs_body(method="occlusion"),
        },
        response_class=Response,
        responses={
            200: {
                "description": "The attributions, and how complete they are.",
                "content": {JSON: {"example": _EXAMPLE}, PNG: {}, BINARY: {}},
            },
            **error_answers(400, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504),
        },
    )
    async def explain(
        request: Request,
        model: str = Path(
            description="`digits`, `digits@alias` or `digits:3`.", examples=["digits"]
        ),
    ) -> Response:
        headers = dict(request.scope["headers"])
        try:
            body = await read_body(
                request.receive, headers.get(b"content-length"), limits.max_body_bytes
            )
            with WhileCallerWaits(request.receive):
                return await answer(request, model, bytes(body))
        except CallerGone:
            return Response(status_code=499)

    async def answer(request: Request, model: str, body: bytes) -> Response:
        began = time.perf_counter()
        deadline = time.monotonic() + _patience_s(request, limits)
        name, _, version = model.replace("@", ":").partition(":")
        predictor = await live.get(name, version or None)
        request.scope["model"] = predictor
        content_type = request.headers.get("content-type", "")
        inputs, options = read_question(content_type, body, request.url.query)
        rows = await predict_batch_of(predictor, inputs, deadline, max_inputs=1)
        if isinstance(rows, Pictures):  # they are needed as numbers afterwards
            rows = await predictor.decode([one.data for one in rows.encoded], deadline)
        prediction = await predictor.predict(rows, deadline)
        batch = predictor.finished(rows)
        target = _target(predictor, options.target, prediction.logits)
        question = Question(target=target, **options.model_dump(exclude={"target"}))
        explanation = await explainer.explain(predictor, batch, question, deadline)
        probability = float(prediction.probabilities[0, target])
        predicted = predictor.labels[int(prediction.logits[0].argmax())]
        document = _document(predictor, options, target, probability, predicted, explanation)
        document["time_ms"] = round((time.perf_counter() - began) * 1000, 3)
        accept = request.headers.get("accept", JSON)
        return _response(preferred_type(accept), predictor, document, batch, explanation)

    return router


def read_question(content_type: str, body: bytes, query: str) -> tuple[Inputs, ExplainOptions]:
    """The one input and the options, wherever they stand.

    Raises:
        MediaTypeRefused, BadRequest, BadInput: as `app.api.predict.read_inputs`, or an option
            that is unknown or out of range.
    """
    try:
        values: dict[str, Any] = dict(parse_qsl(query, max_num_fields=64))
    except ValueError:
        raise BadRequest("the query has more than 64 fields") from None
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        document = read_object(body)
        if "top_k" in document:
            raise BadInput(f"'top_k' is no option; known are {', '.join(FIELDS)}", param="top_k")
        values |= {name: document.pop(name) for name in FIELDS if name in document}
        inputs = read_document(document, None)
    else:
        inputs = read_inputs(content_type, body, None, 1)
        if media_type == "multipart/form-data":
            values |= parse_form(content_type, body, file_field="file", max_parts=16).fields
    if len(inputs.pictures) > 1:
        raise BadInput(f"one input is explained at a time; {len(inputs.pictures)} were sent")
    return inputs, _options(values)


def preferred_type(accept: str) -> str:
    """The answer that `Accept` wants most; JSON where it names none of ours."""
    best, most = JSON, 0.0
    for part in accept.split(",")[:32]:
        media_range, _, parameters = part.strip().lower().partition(";")
        quality = _quality(parameters)
        found = _ranges().get(media_range.strip())
        if found is not None and quality > most:
            best, most = found, quality
    return best


def _ranges() -> Mapping[str, str]:
    return {
        JSON: JSON,
        PNG: PNG,
        BINARY: BINARY,
        "image/*": PNG,
        "*/*": JSON,
        "application/*": JSON,
    }


def _quality(parameters: str) -> float:
    for one in parameters.split(";"):
        name, _, value = one.strip().partition("=")
        if name == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _options(values: Mapping[str, Any]) -> ExplainOptions:
    if isinstance(values.get("target"), int) and not isinstance(values["target"], bool):
        values = {**values, "target": str(values["target"])}
    try:
        return ExplainOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            message = f"{name[:80]!r} is no option; known are {', '.join(FIELDS)}"
        else:
            message, _ = complaint([first])
        raise BadInput(message, param=name[:80]) from None


def _target(predictor: Predictor, wanted: str, logits: Tensor) -> int:
    """The index of the class to explain: the predicted one unless one is named."""
    if not bool(logits.isfinite().all()):
        raise ForwardFailed(f"{predictor.name} answered with a number that is not finite")
    if not wanted:
        return int(logits[0].argmax())
    if wanted in predictor.labels:
        return predictor.labels.index(wanted)
    if wanted.isascii() and wanted.isdecimal() and int(wanted) < len(predictor.labels):
        return int(wanted)
    raise BadInput(
        f"{predictor.name} has no label {wanted[:80]!r}; it has {_some(predictor.labels)}",
        param="target",
    )


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:10]) + (" and more" if len(labels) > 10 else "")


def _patience_s(request: Request, limits: ExplainLimits) -> float:
    said = request.headers.get("x-request-timeout-ms")
    return limits.request_timeout_ms / 1000 if said is None else timeout_s(said.encode("latin-1"))


def _document(
    predictor: Predictor,
    options: ExplainOptions,
    target: int,
    probability: float,
    predicted: str,
    explanation: Explanation,
) -> dict[str, Any]:
    complete = explanation.completeness
    return {
        "model": predictor.name,
        "version": predictor.version,
        "method": options.method,
        "predicted": predicted,
        "target": {
            "label": predictor.labels[target],
            "index": target,
            "probability": probability,
            "logit": explanation.output,
        },
        "baseline": options.baseline if predictor.accepts_pictures else "zeros",
        "steps": explanation.steps,
        "completeness": complete
        and {
            "attributed": complete.attributed,
            "gained": complete.gained,
            "error": complete.error,
        },
        "shape": list(explanation.attributions.shape),
    }


def _response(
    media_type: str,
    predictor: Predictor,
    document: dict[str, Any],
    inputs: Tensor,
    explanation: Explanation,
) -> Response:
    attributions = explanation.attributions
    if not bool(attributions.isfinite().all()):
        raise ForwardFailed(f"{predictor.name} has gradients that are not finite")
    if media_type == JSON:
        content = {**document, "attributions": attributions.numpy()}
        return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)
    headers = {
        "X-Explanation": quote(orjson.dumps(document).decode(), safe=' {}[]":,.-'),
        "X-Model-Version": str(predictor.version),
    }
    if media_type == PNG:
        picture = heat_map_png(predictor.manifest.preprocessing, inputs, attributions)
        return Response(picture, headers=headers, media_type=PNG)
    tensor = NamedTensor("attributions", "FP32", tuple(attributions.shape), attributions)
    answer = encode_answer(predictor.name, str(predictor.version), None, [(tensor, True)])
    headers["Inference-Header-Content-Length"] = str(answer.header_length)
    return Response(answer.body, headers=headers, media_type=BINARY)


FIELDS: Final = tuple(ExplainOptions.model_fields)


def _query_entries() -> list[dict[str, Any]]:
    """The options as parameters of the query, for the OpenAPI document."""
    properties = ExplainOptions.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema.pop("description"),
            "schema": schema,
        }
        for name, schema in properties.items()
    ] + [
        {
            "name": "X-Request-Timeout-Ms",
            "in": "header",
            "required": False,
            "description": "Deadline of this request in milliseconds.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        }
    ]


_EXAMPLE: Final = {
    "model": "digits",
    "version": 1,
    "method": "integrated_gradients",
    "predicted": "4",
    "target": {"label": "4", "index": 4, "probability": 0.998, "logit": 9.31},
    "baseline": "black",
    "steps": 32,
    "completeness": {"attributed": 11.02, "gained": 11.04, "error": 0.0018},
    "shape": [1, 2, 2],
    "attributions": [[[0.0, 1.31], [-0.2, 9.91]]],
    "time_ms": 21.4,
}
