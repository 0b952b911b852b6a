"""`POST /v2/models/{model}[/versions/{version}]/infer`: bare ASGI, and once more without ASGI.

On a small model a `Request` costs more than the network, and so does a task of its own. What the
head of a request says is read once (`InferHead`); a client that repeats its head is answered by
`Inference`, which needs nothing but the body.
"""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Final, NamedTuple

from starlette.types import Receive, Scope, Send

from app.api.caller import LONGEST_TIMEOUT_S, CallerGone, WhileCallerWaits, read_body, timeout_s
from app.api.choice import Asked, asked
from app.api.compression import LARGEST_RATIO, accepted_encoding, deflate, inflate
from app.api.inference import INLINE_BYTES, Fields, Inference, at_once, send_answer
from app.api.repeated_request import BEGIN
from app.api.v2_form import KnownForms
from app.api.v2_model import ACCEPTED_DATATYPES, batch_of, numbers_of, outputs_of, queue_priority
from app.api.v2_request import InferRequest, lead_bytes, parse_request
from app.api.v2_response import Answer, encode_answer, select_outputs
from app.api.v2_tensors import Limits
from app.engine.live import LiveModels
from app.engine.predictor import Prediction, Predictor
from app.engine.waiter import Step

JSON_LENGTH: Final = b"inference-header-content-length"


class InferHead(NamedTuple):
    """What the head of a request says.

    Attributes:
        asked: which version is to answer.
        json_length: `Inference-Header-Content-Length` as sent.
        content_encoding: of the body; "identity" where it was not said.
        accept_encoding: None where it was not said.
        timeout_s: None where it was not said.
    """

    asked: Asked
    json_length: bytes | None
    content_encoding: str
    accept_encoding: str | None
    timeout_s: float | None

    @classmethod
    def of(cls, path_params: Mapping[str, str], headers: Mapping[bytes, bytes]) -> "InferHead":
        """Read from a request; raises BadRequest for a header that says nothing."""
        encoding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        accepted = headers.get(b"accept-encoding")
        timeout = headers.get(b"x-request-timeout-ms")
        return cls(
            asked(headers, path_params["model"], path_params.get("version")),
            headers.get(JSON_LENGTH),
            encoding or "identity",
            None if accepted is None else accepted.decode("latin-1"),
            None if timeout is None else timeout_s(timeout),
        )

    def deadline(self, request: InferRequest, arrived: float, usual_s: float) -> float:
        """The sooner of what header and body say; `usual_s` after `arrived` where neither does."""
        said_s = self.timeout_s
        if request.timeout_us:
            in_body_s = min(request.timeout_us / 1e6, LONGEST_TIMEOUT_S)
            said_s = in_body_s if said_s is None else min(said_s, in_body_s)
        return arrived + (usual_s if said_s is None else said_s)


class InferRoute:
    """The route, as an ASGI application.

    Args:
        request_timeout_ms: deadline of a request that names none.
    """

    def __init__(self, live: LiveModels, limits: Limits, request_timeout_ms: float) -> None:
        self._live = live
        self._limits = limits
        self._timeout_s = request_timeout_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are told by the application's handlers."""
        arrived = time.monotonic()
        headers = dict(scope["headers"])
        length = headers.get(b"content-length")
        try:
            # A tensor at an odd address would be copied, a large one onto fresh pages.
            lead = 0 if b"content-encoding" in headers else lead_bytes(headers.get(JSON_LENGTH))
            body = await read_body(receive, length, self._limits.max_body_bytes, lead)
            head = InferHead.of(scope["path_params"], headers)
            body = await self._inflated(body, head.content_encoding)
            predictor = await self._live.get(*head.asked)
            scope["model"] = predictor  # for the count of requests by model and version
            request = await self._parsed(body, head, predictor, lead)
            deadline = head.deadline(request, arrived, self._timeout_s)
            with WhileCallerWaits(receive):
                prediction = await self._predicted(scope, predictor, request, deadline)
        except CallerGone:
            return
        body, fields = encoded(predictor, request, prediction)
        if head.accept_encoding is not None:
            body = await _deflated(body, head.accept_encoding, fields)
        await send_answer(send, body, fields)
        if _may_begin_at_once(head, request):
            scope[BEGIN] = partial(self.begin, head, KnownForms())

    def begin(
        self, head: InferHead, forms: KnownForms, scope: Scope, body: bytes, settle: Step
    ) -> Inference | None:
        """Let a model begin with `body`; None where something has to be waited for first.

        Args:
            settle: the first step once it is over.

        Raises:
            V2Error, ServiceError: as the route would tell them.
        """
        arrived = time.monotonic()
        predictor = at_once(self._live, head.asked, body)
        if predictor is None:
            return None
        scope["model"] = predictor
        request = forms.parse(body, head.json_length, predictor.inputs[0], self._limits)
        batch = numbers_of(predictor, request.inputs, self._limits)
        if batch is None or not batch.shape[0]:
            return None
        deadline = head.deadline(request, arrived, self._timeout_s)
        encode = partial(encoded, predictor, request)
        priority = queue_priority(request.priority)
        return Inference(predictor, batch, deadline, priority, encode, settle)

    async def _inflated(self, body: bytes | bytearray, encoding: str) -> bytes | bytearray:
        if encoding == "identity":
            return body
        if len(body) * LARGEST_RATIO <= INLINE_BYTES:
            return inflate(body, encoding, self._limits.max_inflated_bytes)
        return await asyncio.to_thread(inflate, body, encoding, self._limits.max_inflated_bytes)

    async def _parsed(
        self, body: bytes | bytearray, head: InferHead, predictor: Predictor, lead: int
    ) -> InferRequest:
        """Large JSON is parsed in a thread: its parser lets nobody else run, its steps do."""
        arguments = body, head.json_length, predictor.inputs[0], self._limits, lead
        if len(body) <= INLINE_BYTES:
            return parse_request(*arguments)
        return await asyncio.to_thread(parse_request, *arguments)

    async def _predicted(
        self, scope: Scope, predictor: Predictor, request: InferRequest, deadline: float
    ) -> Prediction | None:
        """None for an empty batch, which no model sees."""
        began = time.perf_counter()
        batch = await batch_of(predictor, request.inputs, self._limits, deadline)
        scope["decode_ms"] = (time.perf_counter() - began) * 1000
        if not batch.shape[0]:
            return None
        prediction = await predictor.predict(batch, deadline, queue_priority(request.priority))
        scope["prediction"] = prediction
        scope["decode_ms"] += prediction.decode_ms
        return prediction


def encoded(
    predictor: Predictor, request: InferRequest, prediction: Prediction | None
) -> tuple[bytes, Fields]:
    """The body of an answer, and the fields that describe it but for its length.

    Raises:
        V2Error: an output that does not exist, or that its form cannot carry.
    """
    began_ns = time.perf_counter_ns()
    outputs = select_outputs(request, outputs_of(predictor, prediction), predictor.labels)
    answer = encode_answer(predictor.name, str(predictor.version), request.id, outputs)
    predictor.encode_time.add(time.perf_counter_ns() - began_ns)
    return answer.body, [*_described(answer), (b"x-model-version", b"%d" % predictor.version)]


def _may_begin_at_once(head: InferHead, request: InferRequest) -> bool:
    """Whether requests of this kind need nothing that `begin` cannot do.

    One that takes the usual way after all was read twice, so pictures are not tried.
    """
    plain = head.accept_encoding is None and head.content_encoding == "identity"
    return plain and all(one.datatype in ACCEPTED_DATATYPES["FP32"] for one in request.inputs)


def _described(answer: Answer) -> Fields:
    if answer.header_length is None:
        return [(b"content-type", b"application/json")]
    return [
        (b"content-type", b"application/octet-stream"),
        (JSON_LENGTH, b"%d" % answer.header_length),
    ]


async def _deflated(body: bytes, accepted: str, fields: Fields) -> bytes:
    fields.append((b"vary", b"Accept-Encoding"))
    encoding = accepted_encoding(accepted)
    if encoding is None:
        return body
    fields.append((b"content-encoding", encoding.encode()))
    if len(body) <= INLINE_BYTES // 16:
        return deflate(body, encoding)
    return await asyncio.to_thread(deflate, body, encoding)
