"""`create_app(settings)`: every part of the service is built here, once, in order."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import torch
from fastapi import FastAPI
from starlette.routing import BaseRoute, Route

from app.api.aliases import alias_routes
from app.api.dataset_intake import DatasetOptions, Intake
from app.api.datasets import datasets_routes
from app.api.docs_page import mount_docs
from app.api.error_answers import RequestEdge, install_error_answers
from app.api.evaluations import EvaluationLimits, evaluation_routes
from app.api.event_stream import EventStreams
from app.api.explain import ExplainLimits, explain_routes
from app.api.files import files_routes
from app.api.fine_tuning import Desk, fine_tuning_routes
from app.api.fine_tuning_curves import curves_routes
from app.api.fine_tuning_request import Places
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
from app.engine.device_decoding import Decode, nvjpeg
from app.engine.device_memory import device_memory_bytes
from app.engine.known_choices import KnownChoices
from app.engine.live import LiveModels
from app.engine.loading import LoadedVersion, load_everywhere, with_drift
from app.engine.memory import budget_bytes
from app.engine.predictor import Predictor
from app.engine.shadow_figures import ShadowFigures
from app.evaluation.documents import Documents
from app.evaluation.evaluator import Evaluator
from app.evaluation.uploads import Uploads
from app.examiner import Examiner
from app.http.access import AccessLog
from app.http.listener import is_loopback
from app.http.origin import OriginGuard, OriginPolicy
from app.jobs.store import JobStore
from app.jobs.worker import open_courier, open_retention, open_runner, open_store
from app.metrics import BATCH_BUCKETS, Histogram, Metrics, ModelFigures
from app.settings import Settings
from app.tracing import tracing_of
from models.device import DeviceUnavailable, choose_devices, thread_count
from models.picture import PictureLimits
from models.store import ModelStore, Version

PREDICT_PATH: Final = "/v1/models/{model}/predict"
TAGS: Final = [
    {"name": "predict", "description": "Ask a model."},
    V2_TAG,
    {"name": "models", "description": "What the store holds."},
    {"name": "datasets", "description": "Labelled samples, checked when they come."},
    {"name": "files", "description": "Datasets, as OpenAI's client sends them."},
    {"name": "fine-tuning", "description": "Jobs that make new versions."},
    {"name": "evaluations", "description": "Measure, compare, promote."},
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


def create_app(
    settings: Settings,
    *,
    draining: Callable[[], bool] = lambda: False,
    on_broken: Callable[[BaseException], None] = lambda _: None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        settings: every knob.
        draining: whether the process is stopping, so that `/readyz` can say so.
        on_broken: called once, on the event loop, when the device can be used no more and everybody
            who waited was told; the process should end.

    Raises:
        models.device.DeviceUnavailable: the wanted device is not here.
        app.auth.key.KeyFault: a file of keys cannot be read, or a key in the environment is none.
        app.tracing.TracingUnavailable: it is asked for, and OpenTelemetry is not installed.
        app.jobs.webhook.SecretUnfit, app.jobs.destination.DestinationRefused: no webhook could go.
    """
    tracing = tracing_of(settings)
    sources = KeySources(settings.home, settings.api_keys_file, settings.api_key)
    keys = KeyWatch(sources, settings.watch_interval_s)
    gate = Gate(
        keys,
        LinkSigner(settings.home, settings.signed_link_s),
        open_without_keys=settings.no_auth or is_loopback(settings.host),
    )
    engine = build_engine(settings, on_broken)
    jobs = open_store(settings)
    runner = open_runner(settings, jobs)
    retention = open_retention(settings, jobs)
    courier = open_courier(settings, jobs)
    explainer = Explainer(settings.max_explanations)
    intake = Intake(settings.datasets_folder, engine.store, _intake_options(settings))
    metrics = Metrics(
        figures=lambda: _figures(engine.live),
        device_memory_bytes=lambda: device_memory_bytes(engine.batcher.device),
    )
    examiner = build_examiner(settings, engine, jobs)

    metrics.registry.register(ShadowFigures(engine.live))

    def not_ready() -> str | None:
        return _not_ready(engine, keys, draining)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.batcher.start()
        engine.decoder.warm_up()
        await engine.live.start()
        examiner.start()
        keys.start()
        if settings.jobs:
            runner.start()
            retention.start()
        if courier is not None:
            courier.start()
        yield
        if courier is not None:
            await courier.stop()
        await examiner.stop()
        await runner.stop()
        await retention.stop()
        await keys.stop()
        await engine.live.stop()
        explainer.close()
        intake.close()
        await engine.batcher.stop(settings.drain_s)
        engine.decoder.close()
        await asyncio.to_thread(engine.compiler.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        await asyncio.to_thread(jobs.database.close)

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
    app.state.jobs, app.state.runner = jobs, runner
    # First in the list: every request walks it from the start.
    hot, plain = _plain_routes(settings, engine.live, gate, not_ready)
    app.router.routes[:0] = [*hot, *plain]
    limits = ExplainLimits(settings.max_body_bytes, settings.request_timeout_ms)
    app.include_router(explain_routes(engine.live, explainer, limits))
    app.include_router(registry_routes(engine.store, engine.live))
    app.include_router(datasets_routes(intake))
    app.include_router(files_routes(intake))
    places = Places(
        settings.home,
        settings.datasets_folder,
        settings.data_root,
        device=settings.device,
        max_processes=settings.job_processes,
    )
    streams = EventStreams(jobs, draining)
    app.include_router(
        fine_tuning_routes(Desk(jobs, runner, engine.store, places, streams, courier))
    )
    app.include_router(curves_routes(jobs, settings.home))
    app.include_router(
        evaluation_routes(
            examiner,
            engine.store,
            intake,
            EvaluationLimits(
                wait_s=settings.evaluation_wait_s,
                datasets=settings.home / "datasets",
                data_root=settings.data_root,
            ),
        )
    )
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
    app.tracing = tracing
    app.hot_path = HotPath(
        hot,
        OriginGuard(app, policy),
        AccessLog(app, metrics, logged),
        repeats=tracing is None,
    )
    return app


def _policy(settings: Settings) -> OriginPolicy:
    return OriginPolicy(
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        max_body_bytes=settings.max_body_bytes,
        max_body_bytes_by_prefix={
            # Streamed to disk, and what lies below them JSON that is held in memory.
            "/v1/datasets": settings.max_dataset_bytes,
            "/v1/datasets/": settings.max_body_bytes,
            "/v1/evaluations": settings.max_dataset_bytes,
            "/v1/evaluations/": settings.max_body_bytes,
            "/v1/files": settings.max_dataset_bytes,
            "/v1/files/": settings.max_body_bytes,
        },
        max_body_bytes_by_ending={"/versions": settings.max_model_bytes},
    )


def _intake_options(settings: Settings) -> DatasetOptions:
    limits = PictureLimits(
        settings.max_picture_bytes, settings.max_picture_pixels, settings.max_picture_side
    )
    return DatasetOptions(
        settings.max_dataset_bytes,
        max_checks=2,
        picture=limits,
        check_timeout_s=settings.dataset_check_timeout_s,
    )


def build_engine(
    settings: Settings, on_broken: Callable[[BaseException], None] = lambda _: None
) -> Engine:
    """The parts that compute, not yet started; see `create_app` for `on_broken`."""
    devices = choose_devices(settings.device)
    threads = settings.threads or thread_count()
    store = ModelStore(settings.models_folder)
    batcher = Batcher(
        *devices,
        num_threads=threads,
        on_broken=on_broken,
        stuck_after_s=settings.stuck_after_s,
    )
    decoder = Decoder(
        num_threads=threads,
        limits=PictureLimits(
            settings.max_picture_bytes, settings.max_picture_pixels, settings.max_picture_side
        ),
        max_pixels_in_flight=settings.max_pixels_in_flight,
        max_waiting=settings.max_queue_items,
        on_device=_decode_on(settings, devices[0]),
    )
    options = LaneOptions(
        max_batch_items=settings.max_batch_items,
        max_queue_items=settings.max_queue_items,
        max_wait_ms=settings.max_wait_ms or None,
        max_delay_ms=settings.max_delay_ms,
    )

    known = KnownChoices(settings.home / "cache" / "choices", settings.precision)
    compiler = Compiler(settings.home / "cache" / "compiled", threads)

    def load(version: Version) -> LoadedVersion:
        loaded = load_everywhere(version, devices, batcher.lost, settings.precision, known)
        return with_drift(loaded, decoder)

    def compile_it(predictor: Predictor) -> None:
        if settings.compile != "off":
            sizes = predictor.lane.sizes
            compiler.submit(predictor.loaded, sizes, always=settings.compile == "on")

    live = LiveModels(
        store,
        load,
        lambda loaded: Predictor(loaded, batcher, decoder, options),
        proven=compile_it,
        on_lost=batcher.lose,
        preload=settings.preload,
        watch_interval_s=settings.watch_interval_s,
        memory_budget_bytes=budget_bytes(settings.memory_budget_mb, devices[0]),
    )
    return Engine(store, batcher, decoder, compiler, live)


def _decode_on(settings: Settings, device: torch.device) -> Decode | None:
    """How the device decodes; None where it is not asked to."""
    if settings.decode_on == "host":
        return None
    if device.type != "cuda":
        raise DeviceUnavailable(f"{device} decodes nothing by itself: take --decode-on host")
    return nvjpeg()


def build_examiner(settings: Settings, engine: Engine, jobs: JobStore) -> Examiner:
    """What evaluates and promotes, not yet started."""
    return Examiner(
        jobs,
        Documents(settings.home / "evaluations"),
        Uploads(settings.home / "evaluations" / "uploads"),
        Evaluator(engine.live, settings.threads or thread_count()),
        engine.store,
        settings.evaluation_timeout_s,
    )


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
        queue_length=predictor.num_waiting_rows,
        seconds={
            "decode": predictor.decode_time.ns / 1e9,
            "queue": lane.queue_s.total,
            "compute": lane.compute_s.total,
            "encode": predictor.encode_time.ns / 1e9,
        },
        outcomes={
            "answered": lane.num_rows,
            "failed": lane.num_failed,
            "refused": lane.num_refused_full + lane.num_refused_late,
            "expired": lane.num_expired,
            "abandoned": lane.num_abandoned,
        },
        batch_sizes=_batch_sizes(predictor),
        queue_wait=lane.queue_s.copy(),
        memory_bytes=predictor.memory_bytes,
    )


def _batch_sizes(predictor: Predictor) -> Histogram:
    histogram = Histogram(BATCH_BUCKETS)
    for rows, count in predictor.lane.statistics.batches.items():
        histogram.observe(rows, count.num_batches)
    return histogram
