"""The Open Inference Protocol at `/v2`: its routes, as plain Starlette endpoints.

Content types are ignored throughout, because clients send any or none; how a body is read depends
on `Inference-Header-Content-Length` alone. `infer` stands in `app/api/infer.py`, the OpenAPI
entries in `app/api/v2_schema.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from app.api.caller import read_body
from app.api.infer import InferRoute
from app.api.permission import Gate
from app.api.v2_document import parse_json
from app.api.v2_errors import FeatureRefused
from app.api.v2_model import configuration, metadata, statistics
from app.api.v2_request import flag, parameters_of
from app.api.v2_tensors import Limits
from app.engine.live import LiveModels

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)
MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


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
    infer = gate.guarded("predict", InferRoute(live, options.limits, options.request_timeout_ms))
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
