"""OpenTelemetry tracing: one span a request, its parent taken from the caller's `traceparent`.

Off unless asked for, and then nothing of OpenTelemetry is imported. Spans leave by OTLP over HTTP;
where to, and all else, is said by the standard variables (`OTEL_EXPORTER_OTLP_ENDPOINT`, ...).
"""

import os
from importlib.metadata import version
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.settings import Settings

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
CARRIED: Final = (b"traceparent", b"tracestate")


class TracingUnavailable(Exception):
    """Tracing is asked for, and what it needs is not installed."""


def tracing_of(settings: Settings) -> "Tracing | None":
    """Tracing, where the settings or the standard variables ask for it.

    Raises:
        TracingUnavailable: the extra `tracing` is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if not settings.tracing and not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        return Tracing()
    except ImportError as error:
        raise TracingUnavailable(
            "tracing needs OpenTelemetry; install pytorchlib[tracing], or turn it off"
        ) from error


class Tracing:
    """Makes the spans of one process and sends them away, a few seconds' worth at a time."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        own = {"service.version": version("pytorchlib")}
        if "OTEL_SERVICE_NAME" not in os.environ:
            own["service.name"] = "pytorchlib"
        self._provider = TracerProvider(resource=Resource.create(own))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("pytorchlib")
        self._propagator = TraceContextTextMapPropagator()
        self._server = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR

    async def request(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` answer within a span; its trace id is in the state of the request."""
        parent = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in CARRIED
        }
        span = self._tracer.start_span(
            scope["method"],
            self._propagator.extract(parent),
            self._server,
            {"http.request.method": scope["method"], "url.path": scope["path"][:1024]},
        )
        trace_id = f"{span.get_span_context().trace_id:032x}"
        scope.setdefault("state", {})["trace_id"] = trace_id

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._tell_status(span, message["status"])
            await send(message)

        try:
            await app(scope, receive, watched)
        finally:
            _tell_request(span, scope)
            span.end()

    def close(self) -> None:
        """Send what is left, for as long as the exporter's timeout allows; blocks."""
        self._provider.shutdown()

    def _tell_status(self, span: Any, status: int) -> None:
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(self._error)


def _tell_request(span: Any, scope: Scope) -> None:
    """What became known while the request was answered: route, model, and where the time went."""
    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    request_id = scope["state"].get("request_id")
    if request_id is not None:
        span.set_attribute("pytorchlib.request_id", request_id)
    predictor = scope.get("model")
    if predictor is not None:
        span.set_attribute("pytorchlib.model", predictor.name)
        span.set_attribute("pytorchlib.version", predictor.version)
    prediction = scope.get("prediction")
    if prediction is not None:
        span.set_attribute("pytorchlib.decode_ms", scope["decode_ms"])
        span.set_attribute("pytorchlib.queue_ms", prediction.queue_ms)
        span.set_attribute("pytorchlib.compute_ms", prediction.compute_ms)
        span.set_attribute("pytorchlib.batch_size", prediction.batch_size)
