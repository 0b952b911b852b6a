"""The Open Inference Protocol at `/v2`: its routes, as plain Starlette endpoints.

`infer` is bare ASGI: on a small model FastAPI's dependency tree, or even a `Request`, costs more
than the network. Content types are ignored throughout, because clients send any or none; how a
body is read depends on `Inference-Header-Content-Length` alone. The OpenAPI entries stand in
`app/api/v2_schema.py`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send
from torch import Tensor

from app.api.caller import LONGEST_TIMEOUT_S, CallerGone, WhileCallerWaits, read_body, timeout_s
from app.api.choice import chosen
from app.api.compression import LARGEST_RATIO, accepted_encoding, deflate, inflate
from app.api.permission import Gate
from app.api.v2_document import parse_json
from app.api.v2_errors import FeatureRefused
from app.api.v2_model import (
    batch_of,
    configuration,
    metadata,
    outputs_of,
    queue_priority,
    statistics,
)
from app.api.v2_request import InferRequest, flag, parameters_of, parse_request
from app.api.v2_response import Answer, encode_answer, select_outputs
from app.api.v2_tensors import Limits
from app.engine.live import LiveModels
from app.engine.predictor import Predictor

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
# Below this many bytes zlib and the parser hold the event loop for a few milliseconds at most.
INLINE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class V2Options:
    """What the routes need to know besides the models.

    Attributes:
        server_version: told in the server's metadata.
        max_batch_size: told in each model's configuration.
        request_timeout_ms: deadline of a request that names none.
    """

    limits: Limits
    server_version: str
    max_batch_size: int
    request_timeout_ms: float


def infer_routes(live: LiveModels, options: V2Options, gate: Gate) -> list[Route]:
    """The routes of `infer`, plain ASGI."""
    infer = gate.guarded("predict", InferRoute(live, options))
    return [Route(f"{path}/infer", infer, methods=["POST"]) for path in MODEL_PATHS]


def v2_routes(
    live: LiveModels,
    options: V2Options,
    gate: Gate,
    not_ready: Callable[[], str | None] | None = None,
) -> list[BaseRoute]:
    """Every other route of the protocol.

    Args:
        gate: asks for a key with the scope of each route.
        not_ready: why the service is not ready, None when it is; by default the models decide.
    """
    repository = RepositoryRoutes(live, options.limits)
    models = ModelRoutes(live, options)
    ask = partial(gate.guarded, "predict")
    change = partial(gate.guarded, "models:write")
    return [
        Route("/v2", ask(_server(options)), methods=["GET"]),
        Route("/v2/health/live", ask(_live), methods=["GET"]),
        Route("/v2/health/ready", ask(_ready(live, not_ready)), methods=["GET"]),
        Route("/v2/models/stats", ask(models.all_statistics), methods=["GET"]),
        *(Route(f"{path}/ready", ask(models.ready), methods=["GET"]) for path in MODEL_PATHS),
        *(
            Route(f"{path}/config", ask(models.configuration), methods=["GET"])
            for path in MODEL_PATHS
        ),
        *(Route(f"{path}/stats", ask(models.statistics), methods=["GET"]) for path in MODEL_PATHS),
        *(Route(path, ask(models.metadata), methods=["GET"]) for path in MODEL_PATHS),
        Route("/v2/repository/index", ask(repository.index), methods=["POST"]),
        Route("/v2/repository/models/{model}/load", change(repository.load), methods=["POST"]),
        Route("/v2/repository/models/{model}/unload", change(repository.unload), methods=["POST"]),
    ]


class InferRoute:
    """`POST /v2/models/{model}[/versions/{version}]/infer`, as an ASGI application."""

    def __init__(self, live: LiveModels, options: V2Options) -> None:
        self._live = live
        self._limits = options.limits
        self._timeout_s = options.request_timeout_ms / 1000

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors are told by the application's handlers."""
        arrived = time.monotonic()
        headers = dict(scope["headers"])
        try:
            body = await self._body(headers, receive)
            predictor = await chosen(self._live, headers, **_reference(scope["path_params"]))
            scope["model"] = predictor  # for the count of requests by model and version
            request = await self._parsed(body, headers, predictor)
            deadline = arrived + self._patience_s(request, headers)
            with WhileCallerWaits(receive):
                answer = await self._answer(scope, predictor, request, deadline)
        except CallerGone:
            return
        await _send_answer(answer, predictor, headers.get(b"accept-encoding"), send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | bytearray:
        limits = self._limits
        body = await read_body(receive, headers.get(b"content-length"), limits.max_body_bytes)
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding in ("identity", ""):
            return body
        if len(body) * LARGEST_RATIO <= INLINE_BYTES:
            return inflate(body, encoding, limits.max_inflated_bytes)
        return await asyncio.to_thread(inflate, body, encoding, limits.max_inflated_bytes)

    async def _parsed(
        self, body: bytes | bytearray, headers: dict[bytes, bytes], predictor: Predictor
    ) -> InferRequest:
        """Large JSON is parsed in a thread: its parser lets nobody else run, its steps do."""
        header = headers.get(b"inference-header-content-length")
        arguments = body, header, predictor.inputs[0], self._limits
        if len(body) <= INLINE_BYTES:
            return parse_request(*arguments)
        return await asyncio.to_thread(parse_request, *arguments)

    def _patience_s(self, request: InferRequest, headers: dict[bytes, bytes]) -> float:
        """The shortest of what the header and the parameter say; ours where neither does."""
        said = []
        if request.timeout_us:
            said.append(min(request.timeout_us / 1e6, LONGEST_TIMEOUT_S))
        if b"x-request-timeout-ms" in headers:
            said.append(timeout_s(headers[b"x-request-timeout-ms"]))
        return min(said, default=self._timeout_s)

    async def _answer(
        self, scope: Scope, predictor: Predictor, request: InferRequest, deadline: float
    ) -> Answer:
        began = time.perf_counter()
        batch: Tensor = await batch_of(predictor, request.inputs, self._limits, deadline)
        scope["decode_ms"] = (time.perf_counter() - began) * 1000
        prediction = None
        if batch.shape[0]:
            prediction = await predictor.predict(batch, deadline, queue_priority(request.priority))
        scope["prediction"] = prediction
        computed = time.perf_counter_ns()
        outputs = select_outputs(request, outputs_of(predictor, prediction), predictor.labels)
        answer = encode_answer(predictor.name, str(predictor.version), request.id, outputs)
        predictor.encode_time.add(time.perf_counter_ns() - computed)
        return answer


class ModelRoutes:
    """What is told about one model."""

    def __init__(self, live: LiveModels, options: V2Options) -> None:
        self._live = live
        self._max_batch_size = options.max_batch_size

    async def metadata(self, request: Request) -> Response:
        """Inputs, outputs and versions."""
        predictor = await self._live.get(**_reference(request.path_params))
        listings = await asyncio.to_thread(self._live.index)
        versions = [str(one.version) for one in listings if one.name == predictor.name]
        return _json(metadata(predictor, versions))

    async def ready(self, request: Request) -> Response:
        """200 once it is live; asking is a first use, and so it loads."""
        predictor = await self._live.get(**_reference(request.path_params))
        return _json({"name": predictor.name, "ready": True})

    async def configuration(self, request: Request) -> Response:
        """As the model configuration extension wants it."""
        predictor = await self._live.get(**_reference(request.path_params))
        return _json(configuration(predictor, self._max_batch_size))

    async def statistics(self, request: Request) -> Response:
        """Of one version, or of all live versions of the model."""
        predictor = await self._live.get(**_reference(request.path_params))
        chosen = [predictor]
        if "version" not in request.path_params:
            chosen = [one for one in self._live.loaded() if one.name == predictor.name]
        return _json({"model_stats": [statistics(one) for one in chosen]})

    async def all_statistics(self, _: Request) -> Response:
        """Of everything that is live."""
        return _json({"model_stats": [statistics(one) for one in self._live.loaded()]})


class RepositoryRoutes:
    """The model repository extension."""

    def __init__(self, live: LiveModels, limits: Limits) -> None:
        self._live = live
        self._limits = limits

    async def index(self, request: Request) -> Response:
        """Every version in the store and its state; a bare list."""
        only_ready = flag(await self._document(request), "ready", False)
        listings = await asyncio.to_thread(self._live.index)
        return _json(
            [
                {
                    "name": one.name,
                    "version": str(one.version),
                    "state": one.state,
                    "reason": one.reason,
                }
                for one in listings
                if one.state == "READY" or not only_ready
            ]
        )

    async def load(self, request: Request) -> Response:
        """200 after it is live, not before."""
        document = await self._document(request)
        if parameters_of(document):
            raise FeatureRefused(
                "a model is loaded as it was published; config and files cannot be sent with load"
            )
        await self._live.load(request.path_params["model"])
        return _json({})

    async def unload(self, request: Request) -> Response:
        """200 once new requests are refused; those already received are answered."""
        document = await self._document(request)
        flag(parameters_of(document), "unload_dependents", False)
        await self._live.unload(request.path_params["model"])
        return _json({})

    async def _document(self, request: Request) -> dict[str, Any]:
        """The body as JSON; clients may send an empty one."""
        length = request.headers.get("content-length")
        body = await read_body(
            request.receive,
            length.encode() if length else None,
            self._limits.max_json_bytes,
        )
        return parse_json(body, self._limits) if body else {}


def _server(options: V2Options) -> Callable[[Request], Awaitable[Response]]:
    async def server(_: Request) -> Response:
        return _json(
            {
                "name": "pytorchlib",
                "version": options.server_version,
                "extensions": EXTENSIONS,
            }
        )

    return server


async def _live(_: Request) -> Response:
    return _json({"live": True})


def _ready(
    live: LiveModels, not_ready: Callable[[], str | None] | None
) -> Callable[[Request], Awaitable[Response]]:
    async def ready(_: Request) -> Response:
        reason = None if live.ready() else "models are being loaded"
        if not_ready is not None:
            reason = not_ready()
        if reason is None:
            return _json({"ready": True})
        return _json({"ready": False, "error": reason}, status=503)

    return ready


def _reference(path_params: dict[str, str]) -> dict[str, Any]:
    return {"name": path_params["model"], "version": path_params.get("version")}


def _json(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


async def _send_answer(
    answer: Answer, predictor: Predictor, accept_encoding: bytes | None, send: Send
) -> None:
    body, length = answer
    headers = [(b"content-type", b"application/json")]
    if length is not None:
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", b"%d" % length),
        ]
    if accept_encoding is not None:
        headers.append((b"vary", b"Accept-Encoding"))
        encoding = accepted_encoding(accept_encoding.decode("latin-1"))
        if encoding is not None:
            body = await _deflated(body, encoding)
            headers.append((b"content-encoding", encoding.encode()))
    headers.append((b"x-model-version", b"%d" % predictor.version))
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _deflated(body: bytes, encoding: str) -> bytes:
    if len(body) <= INLINE_BYTES // 16:
        return deflate(body, encoding)
    return await asyncio.to_thread(deflate, body, encoding)
