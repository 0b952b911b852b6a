"""`create_app(settings)`: every part of the service is built here, once, in order."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from app.api.aliases import alias_routes
from app.api.docs_page import mount_docs
from app.api.error_answers import RequestEdge, install_error_answers
from app.api.explain import ExplainLimits, explain_routes
from app.api.health import health_routes
from app.api.hot_path import HotApplication, HotPath
from app.api.permission import Gate
from app.api.predict import PredictRoute
from app.api.registry import registry_routes
from app.api.schema import install_schema, predict_entry
from app.api.v2 import V2Options, infer_routes, v2_routes
from app.api.v2_schema import TAG as V2_TAG
from app.api.v2_schema import v2_entries
from app.api.v2_tensors import Limits
from app.api.versions import UploadLimits, version_routes
from app.auth.signed_link import LinkSigner
from app.auth.watch import KeySources, KeyWatch
from app.engine.attribution import Explainer
from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.compiling import Compiler
from app.engine.decoding import Decoder
from app.engine.known_choices import KnownChoices
from app.engine.live import LiveModels
from app.engine.loading import LoadedVersion, load_version
from app.engine.memory import budget_bytes
from app.engine.predictor import Predictor
from app.engine.shadow_figures import ShadowFigures
from app.http.access import AccessLog
from app.http.origin import OriginGuard, OriginPolicy
from app.http.server import is_loopback
from app.metrics import BATCH_BUCKETS, Histogram, Metrics, ModelFigures
from app.settings import Settings
from models.device import choose_device, thread_count
from models.picture import PictureLimits
from models.store import ModelStore

PREDICT_PATH: Final = "/v1/models/{model}/predict"
TAGS: Final = [
    {"name": "predict", "description": "Ask a model."},
    V2_TAG,
    {"name": "models", "description": "What the store holds."},
    {"name": "health", "description": "Probes and figures."},
]


@dataclass(frozen=True, slots=True)
class Engine:
    """What computes: one batcher and one decoder for the device, and the models that use them."""

    store: ModelStore
    batcher: Batcher
    decoder: Decoder
    compiler: Compiler
    live: LiveModels


def create_app(settings: Settings, *, draining: Callable[[], bool] = lambda: False) -> FastAPI:
    """The service as an ASGI application.

    Args:
        settings: every knob.
        draining: whether the process is stopping, so that `/readyz` can say so.

    Raises:
        models.device.DeviceUnavailable: the wanted device is not here.
        app.auth.key.KeyFault: a file of keys cannot be read, or a key in the environment is none.
    """
    sources = KeySources(settings.home, settings.api_keys_file, settings.api_key)
    keys = KeyWatch(sources, settings.watch_interval_s)
    gate = Gate(
        keys,
        LinkSigner(settings.home, settings.signed_link_s),
        open_without_keys=settings.no_auth or is_loopback(settings.host),
    )
    engine = build_engine(settings)
    explainer = Explainer(settings.max_explanations)
    metrics = Metrics(figures=lambda: _figures(engine.live))

    metrics.registry.register(ShadowFigures(engine.live))

    def not_ready() -> str | None:
        return _not_ready(engine, keys, draining)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.batcher.start()
        engine.decoder.warm_up()
        await engine.live.start()
        keys.start()
        yield
        await keys.stop()
        await engine.live.stop()
        explainer.close()
        await engine.batcher.stop(settings.drain_s)
        engine.decoder.close()
        await asyncio.to_thread(engine.compiler.close)

    app = HotApplication(
        title="PyTorchLib",
        version=version("pytorchlib"),
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.engine = engine
    app.state.metrics = metrics
    app.state.gate = gate
    # First in the list: every request walks it from the start.
    hot, plain = _plain_routes(settings, engine.live, gate, not_ready)
    app.router.routes[:0] = [*hot, *plain]
    limits = ExplainLimits(settings.max_body_bytes, settings.request_timeout_ms)
    app.include_router(explain_routes(engine.live, explainer, limits))
    app.include_router(registry_routes(engine.store, engine.live))
    uploads = UploadLimits(settings.home / "uploads", settings.max_model_bytes)
    app.include_router(version_routes(engine.store, engine.live, uploads))
    app.include_router(alias_routes(engine.store, engine.live))
    app.include_router(health_routes(not_ready, metrics))
    mount_docs(app)
    install_schema(
        app, {PREDICT_PATH: predict_entry(settings.max_picture_bytes), **v2_entries()}, TAGS
    )
    install_error_answers(app)
    # Behind the last route: one that says no scope stops the start.
    gate.guard(app.routes)
    policy, logged = _policy(settings), settings.log_requests
    # Added last is outermost: what the guard refuses is counted too.
    app.add_middleware(RequestEdge)
    app.add_middleware(OriginGuard, policy=policy)
    app.add_middleware(AccessLog, metrics=metrics, logged=logged)
    # The same three in one layer, for the routes whose requests would pay most for them.
    app.hot_path = HotPath(hot, OriginGuard(app, policy), AccessLog(app, metrics, logged))
    return app


def _policy(settings: Settings) -> OriginPolicy:
    return OriginPolicy(
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        max_body_bytes=settings.max_body_bytes,
        max_body_bytes_by_ending={"/versions": settings.max_model_bytes},
    )


def build_engine(settings: Settings) -> Engine:
    """The parts that compute, not yet started."""
    device = choose_device(settings.device)
    threads = settings.threads or thread_count()
    store = ModelStore(settings.models_folder)
    batcher = Batcher(device, num_threads=threads)
    decoder = Decoder(
        num_threads=threads,
        limits=PictureLimits(
            settings.max_picture_bytes, settings.max_picture_pixels, settings.max_picture_side
        ),
        max_pixels_in_flight=settings.max_pixels_in_flight,
        max_waiting=settings.max_queue_items,
    )
    options = LaneOptions(
        max_batch_items=settings.max_batch_items,
        max_queue_items=settings.max_queue_items,
        max_delay_ms=settings.max_delay_ms,
    )

    known = KnownChoices(settings.home / "cache" / "choices", settings.precision)
    compiler = Compiler(settings.home / "cache" / "compiled", threads)

    def open_predictor(loaded: LoadedVersion) -> Predictor:
        predictor = Predictor(loaded, batcher, decoder, options)
        if settings.compile != "off":
            sizes = predictor.lane.sizes
            compiler.submit(loaded, sizes, always=settings.compile == "on")
        return predictor

    live = LiveModels(
        store,
        lambda version: load_version(version, device, settings.precision, known),
        open_predictor,
        preload=settings.preload,
        watch_interval_s=settings.watch_interval_s,
        memory_budget_bytes=budget_bytes(settings.memory_budget_mb, device),
    )
    return Engine(store, batcher, decoder, compiler, live)


def _plain_routes(
    settings: Settings, live: LiveModels, gate: Gate, not_ready: Callable[[], str | None]
) -> tuple[list[Route], list[BaseRoute]]:
    """The routes outside FastAPI's dependency tree: those that compute, and the others of V2."""
    predict = PredictRoute(
        live,
        max_inputs=settings.max_inputs,
        max_body_bytes=settings.max_body_bytes,
        request_timeout_ms=settings.request_timeout_ms,
    )
    limits = Limits(
        max_body_bytes=settings.max_body_bytes,
        max_inflated_bytes=settings.max_body_bytes,
        max_items=settings.max_inputs,
    )
    v2 = V2Options(
        limits, version("pytorchlib"), settings.max_batch_items, settings.request_timeout_ms
    )
    guarded = gate.guarded("predict", predict)
    hot = [*infer_routes(live, v2, gate), Route(PREDICT_PATH, guarded, methods=["POST"])]
    return hot, v2_routes(live, v2, gate, not_ready=not_ready)


def _not_ready(engine: Engine, keys: KeyWatch, draining: Callable[[], bool]) -> str | None:
    if draining():
        return "the service is stopping"
    if engine.batcher.broken:
        return "the device answers no more; this process is about to end"
    if not keys.watching():
        return "nobody watches the keys; one that is revoked would still open"
    if not engine.live.ready():
        return f"loading {', '.join(engine.live.preload) or 'nothing'}"
    return None


def _figures(live: LiveModels) -> Iterator[ModelFigures]:
    for predictor in live.loaded():
        yield _figures_of(predictor)


def _figures_of(predictor: Predictor) -> ModelFigures:
    lane = predictor.lane.statistics
    return ModelFigures(
        predictor.name,
        predictor.version,
        queue_length=predictor.lane.num_waiting_rows,
        seconds={
            "decode": predictor.decode_time.ns / 1e9,
            "queue": lane.queue_s.total,
            "compute": lane.compute_s.total,
        },
        outcomes={
            "answered": lane.num_rows,
            "failed": lane.num_failed,
            "refused": lane.num_refused_full + lane.num_refused_late,
            "expired": lane.num_expired,
            "abandoned": lane.num_abandoned,
        },
        batch_sizes=_batch_sizes(predictor),
        queue_wait=lane.queue_s,
        memory_bytes=predictor.memory_bytes,
    )


def _batch_sizes(predictor: Predictor) -> Histogram:
    histogram = Histogram(BATCH_BUCKETS)
    for rows, count in predictor.lane.statistics.batches.items():
        histogram.observe(rows, count.num_batches)
    return histogram
