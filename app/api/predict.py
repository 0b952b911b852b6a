"""`POST /v1/models/{model}/predict`: pictures or tensors in, labels and probabilities out.

A plain Starlette endpoint: FastAPI's dependency tree would cost more than a small network. Its
OpenAPI entry stands in `app/api/schema.py`.
"""

import base64
import binascii
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs

import numpy as np
import orjson
import torch
from starlette.types import Receive, Scope, Send
from torch import Tensor

from app.api.caller import CallerGone, WhileCallerWaits, read_body, timeout_s
from app.api.choice import Asked, asked
from app.api.inference import Fields, Inference, at_once, send_answer
from app.api.multipart import parse_form
from app.api.repeated_request import BEGIN
from app.engine.live import LiveModels
from app.engine.pictures import Rows
from app.engine.predictor import Prediction, Predictor
from app.engine.schedule import NORMAL
from app.engine.waiter import Step
from app.errors import BadInput, BadRequest, ForwardFailed, MediaTypeRefused

DEFAULT_TOP_K: Final = 5
MAX_JSON_DEPTH: Final = 64
PICTURE_TYPES: Final = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a request brought: pictures or numbers, never both; and how many labels it wants."""

    pictures: list[bytes]
    numbers: Any
    top_k: int


class PredictRoute:
    """The endpoint, as an ASGI application, and the bounds it keeps.

    Args:
        live: where predictors come from.
        max_inputs: most pictures or rows in one request.
        max_body_bytes: largest body.
        request_timeout_ms: deadline of a request that names none.
    """

    def __init__(
        self, live: LiveModels, *, max_inputs: int, max_body_bytes: int, request_timeout_ms: float
    ) -> None:
        self._live = live
        self._max_inputs = max_inputs
        self._max_body_bytes = max_body_bytes
        self._timeout_s = request_timeout_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are told by the application's handlers."""
        began, arrived = time.perf_counter(), time.monotonic()
        headers = dict(scope["headers"])
        head = PredictHead.of(scope, headers)
        deadline = head.deadline(arrived, self._timeout_s)
        predictor = await self._live.get(*head.asked)
        scope["model"] = predictor  # for the count of requests by model and version
        # Under overload most are refused: what they bring is not even read.
        predictor.foresee(1, deadline)
        try:
            body = await read_body(receive, headers.get(b"content-length"), self._max_body_bytes)
            with WhileCallerWaits(receive):
                inputs = read_inputs(head.content_type, bytes(body), head.top_k, self._max_inputs)
                batch = await batch_of(predictor, inputs, deadline, self._max_inputs)
                decoded_ms = (time.perf_counter() - began) * 1000
                prediction = await predictor.predict(batch, deadline)
        except CallerGone:
            return
        scope["prediction"], scope["decode_ms"] = prediction, decoded_ms + prediction.decode_ms
        answer, fields = encoded(predictor, inputs.top_k, began, decoded_ms, prediction)
        await send_answer(send, answer, fields)
        scope[BEGIN] = partial(self.begin, head)

    def begin(
        self, head: "PredictHead", scope: Scope, body: bytes, settle: Step
    ) -> Inference | None:
        """Let a model begin with `body`; None where something has to be waited for first.

        Args:
            settle: the first step once it is over.

        Raises:
            ServiceError, PictureError: as the route would tell them.
        """
        began, arrived = time.perf_counter(), time.monotonic()
        predictor = at_once(self._live, head.asked, body)
        if predictor is None:
            return None
        scope["model"] = predictor
        deadline = head.deadline(arrived, self._timeout_s)
        if predictor.num_waiting_rows:
            predictor.foresee(1, deadline)
        content_type = head.content_type
        if content_type.startswith("multipart/"):  # a form has its own boundary
            content_type = dict(scope["headers"])[b"content-type"].decode("latin-1")
        inputs = read_inputs(content_type, body, head.top_k, self._max_inputs)
        check_count(inputs, self._max_inputs)
        if inputs.pictures:
            batch = predictor.rows_at_once(inputs.pictures)
        else:
            batch = numbers_to_batch(inputs.numbers, predictor.input_shape, self._max_inputs)
        if batch is None:
            return None
        decoded_ms = (time.perf_counter() - began) * 1000
        encode = partial(encoded, predictor, inputs.top_k, began, decoded_ms)
        return Inference(predictor, batch, deadline, NORMAL, encode, settle)


def encoded(
    predictor: Predictor, top_k: int, began: float, decoded_ms: float, prediction: Prediction
) -> tuple[bytes, Fields]:
    """The body of an answer, and the fields that describe it but for its length.

    Args:
        began: when the request came, of `time.perf_counter`.
        decoded_ms: from then until its rows were ready, or ready to wait for their turn.

    Raises:
        ForwardFailed: a number that is not finite.
    """
    computed = time.perf_counter_ns()
    predictions = _labelled(predictor, prediction, top_k)
    predictor.encode_time.add(time.perf_counter_ns() - computed)
    answer = {
        "model": predictor.name,
        "version": predictor.version,
        "predictions": predictions,
        "time_ms": {
            "decode": round(decoded_ms + prediction.decode_ms, 3),
            "queue": round(prediction.queue_ms, 3),
            "compute": round(prediction.compute_ms, 3),
            "total": round((time.perf_counter() - began) * 1000, 3),
        },
    }
    version = b"%d" % predictor.version
    return orjson.dumps(answer), [
        (b"content-type", b"application/json"),
        (b"x-model-version", version),
    ]


class PredictHead(NamedTuple):
    """What the head of a request says.

    Attributes:
        asked: which version is to answer.
        top_k: of the query; None where it is not there.
        timeout_s: None where it was not said.
    """

    asked: Asked
    content_type: str
    top_k: str | None
    timeout_s: float | None

    @classmethod
    def of(cls, scope: Scope, headers: Mapping[bytes, bytes]) -> "PredictHead":
        """Read from a request; raises BadRequest for a field that says nothing."""
        timeout = headers.get(b"x-request-timeout-ms")
        said_s = None if timeout is None else timeout_s(timeout)
        name, _, version = scope["path_params"]["model"].replace("@", ":").partition(":")
        return cls(
            asked(headers, name, version or None),
            headers.get(b"content-type", b"").decode("latin-1"),
            _query_top_k(scope),
            said_s,
        )

    def deadline(self, arrived: float, usual_s: float) -> float:
        """As the header says; `usual_s` after `arrived` where it does not."""
        return arrived + (usual_s if self.timeout_s is None else self.timeout_s)


def _query_top_k(scope: Scope) -> str | None:
    query = scope["query_string"]
    if not query:
        return None
    try:
        values = parse_qs(query.decode("latin-1"), max_num_fields=64).get("top_k")
    except ValueError:
        raise BadRequest("the query has more than 64 fields") from None
    return values[-1] if values else None


def read_inputs(content_type: str, body: bytes, top_k: str | None, max_inputs: int) -> Inputs:
    """What the body brings, by its content type.

    Raises:
        MediaTypeRefused: another content type than those in the sentence.
        BadRequest, BadInput: malformed, empty, or with a wrong field.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        form = parse_form(content_type, body, file_field="file", max_parts=max_inputs + 8)
        if not form.files:
            raise BadInput(
                "the form has no file; send each picture as a field `file`", param="file"
            )
        return Inputs(form.files, None, _top_k(form.fields.get("top_k", top_k)))
    if media_type in PICTURE_TYPES:
        return Inputs([body], None, _top_k(top_k))
    if media_type == "application/json":
        return read_document(read_object(body), top_k)
    raise MediaTypeRefused(
        f"the content type {media_type[:80]!r} is not read here; send multipart/form-data with "
        "fields `file`, application/json, or the bytes of one picture as image/jpeg, image/png "
        "or image/webp"
    )


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        BadRequest, BadInput: it holds none.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadInput("the body must be a JSON object with `images` or `inputs`")
    return document


def read_document(document: dict[str, Any], top_k: str | None) -> Inputs:
    """What a JSON object brings; raises as `read_inputs`."""
    unknown = sorted(document.keys() - {"image", "images", "inputs", "top_k"})
    if unknown:
        raise BadInput(f"unknown field {unknown[0]!r}; known are images, inputs, top_k")
    wanted = _top_k(document.get("top_k", top_k))
    images = document.get("images", [document["image"]] if "image" in document else None)
    if (images is None) == ("inputs" not in document):
        raise BadInput("the body must hold either `images` (base64) or `inputs` (numbers)")
    if images is None:
        return Inputs([], document["inputs"], wanted)
    if not isinstance(images, list) or not images:
        raise BadInput("`images` must be a list of base64 strings", param="images")
    return Inputs([_base64(image) for image in images], None, wanted)


def _base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise BadInput("every picture in `images` must be a base64 string", param="images")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"a picture in `images` is not base64: {error}", param="images") from None


def _top_k(value: object) -> int:
    if value is None:
        return DEFAULT_TOP_K
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
        raise BadInput(f"top_k must be a whole number of at least 1, not {value!r}", param="top_k")
    return value


async def batch_of(predictor: Predictor, inputs: Inputs, deadline: float, max_inputs: int) -> Rows:
    """What a request brought as the model's input, float32 `[n, *input_shape]` in the end.

    Raises:
        BadInput: too many, or numbers that do not fit. Others as `Predictor.rows_of`.
    """
    if not inputs.pictures:
        return numbers_to_batch(inputs.numbers, predictor.input_shape, max_inputs)
    check_count(inputs, max_inputs)
    return await predictor.rows_of(inputs.pictures, deadline)


def check_count(inputs: Inputs, max_inputs: int) -> None:
    """Refuse too many pictures; raises BadInput."""
    if len(inputs.pictures) > max_inputs:
        raise BadInput(f"{len(inputs.pictures)} pictures were sent; the limit is {max_inputs}")


def numbers_to_batch(numbers: Any, shape: tuple[int, ...], max_inputs: int) -> Tensor:
    """Nested JSON lists as float32 `[n, *shape]`; one sample may come without the first level.

    Raises:
        BadInput: ragged, not numbers, not finite, of another shape, none or too many.
    """
    _check_depth(numbers, len(shape) + 1)
    try:
        array = np.array(numbers)
    except ValueError:
        raise BadInput("`inputs` is ragged: lists of one level differ in length") from None
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise BadInput("`inputs` must hold numbers only, without null, text, true or false")
    if array.shape == shape:
        array = array[None]
    if array.shape[1:] != shape or not len(array):
        raise BadInput(
            f"`inputs` has shape {list(array.shape)}; this model takes {['n', *shape]}",
            param="inputs",
        )
    if len(array) > max_inputs:
        raise BadInput(f"{len(array)} inputs were sent; the limit is {max_inputs}", param="inputs")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise BadInput("`inputs` holds a number that float32 cannot hold", param="inputs")
    return torch.from_numpy(array)


def _check_depth(numbers: Any, depth: int) -> None:
    """Follow first elements only: numpy finds a list that is deeper elsewhere to be ragged."""
    level = 0
    while isinstance(numbers, list):
        level += 1
        if level > depth or not numbers:
            raise BadInput(f"`inputs` must be {depth} levels of non-empty lists", param="inputs")
        numbers = numbers[0]


def _labelled(predictor: Predictor, prediction: Prediction, top_k: int) -> list[dict[str, Any]]:
    values, indices = (one.tolist() for one in prediction.best(top_k))
    labels = predictor.labels
    answers = []
    for row_values, row_indices in zip(values, indices, strict=True):
        if row_values[0] != row_values[0]:
            raise ForwardFailed(f"{predictor.name} answered with a number that is not finite")
        top = [
            {"label": labels[index], "probability": value}
            for value, index in zip(row_values, row_indices, strict=True)
        ]
        answers.append({**top[0], "top_k": top})
    return answers
