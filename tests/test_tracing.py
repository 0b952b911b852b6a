"""Tracing with a real receiver of OTLP over HTTP, and a real server that sends to it."""

import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from app.settings import Settings
from app.tracing import tracing_of
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = 60.0
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Receiver(http.server.BaseHTTPRequestHandler):
    spans: list[Any]

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        body = self.rfile.read(int(self.headers["Content-Length"]))
        message = ExportTraceServiceRequest.FromString(body)
        for resource in message.resource_spans:
            names = {one.key: one.value.string_value for one in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiving() -> Iterator[tuple[str, list[Any]]]:
    spans: list[Any] = []
    kind = type("Kept", (Receiver,), {"spans": spans})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def publish(home: Path) -> None:
    torch.manual_seed(0)
    options = {"inputs": 4, "num_classes": 2, "hidden": [2]}
    manifest = Manifest(
        network=NetworkSpec(name="mlp", options=options),
        preprocessing=Preprocessing(steps=[{"step": "tensor", "shape": [4]}]),
        labels=("no", "yes"),
    )
    network = networks.build("mlp", options)
    store = ModelStore(home / "models")
    store.publish("tiny", lambda folder: checkpoint.save(folder, network, manifest))


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.mark.slow
def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracing_of(Settings(_env_file=None)) is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing_of(Settings(_env_file=None, tracing=True)) is None
    code = "import sys; import app.main; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_a_request_is_a_span_of_its_callers_trace(tmp_path: Path) -> None:
    publish(tmp_path)
    with receiving() as (endpoint, spans):
        options = ["--home", str(tmp_path), "--port", "0", "--log-format", "json"]
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", *options, "--log-requests", "all"],
            cwd=ROOT,
            env={
                "PATH": "/usr/bin:/bin",
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "200",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            ask(process, spans)
            process.send_signal(signal.SIGINT)
            _, log = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.communicate()
    named = {span.name: span for service, span in spans if service == "pytorchlib"}
    for route in ("/v1/models/{model}/predict", "/v2/models/{model}/infer"):
        span = named[f"POST {route}"]
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        told = attributes(span)
        assert told["http.response.status_code"] == 200
        assert (told["pytorchlib.model"], told["pytorchlib.batch_size"]) == ("tiny", 1)
        assert told["pytorchlib.compute_ms"] > 0
        assert {"pytorchlib.decode_ms", "pytorchlib.queue_ms"} <= told.keys()
    assert attributes(named["GET /livez"])["http.response.status_code"] == 200
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    asked = [line for line in lines if "POST /v" in line["message"]]
    assert len(asked) == 2
    assert {line["trace_id"] for line in asked} == {TRACE}
    assert all(line["request_id"] for line in asked)


def ask(process: "subprocess.Popen[str]", spans: list[Any]) -> None:
    assert process.stdout is not None
    address = next(line for line in process.stdout if line.startswith("Serving on")).split()[2]
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    tensor = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    with httpx.Client(base_url=address.rstrip(";"), timeout=DEADLINE_S, headers=parent) as client:
        rows = {"inputs": [[1, 2, 3, 4]]}
        assert client.post("/v1/models/tiny/predict", json=rows).status_code == 200
        assert client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
        assert client.get("/livez").status_code == 200
    until = time.monotonic() + DEADLINE_S
    while len(spans) < 3 and time.monotonic() < until:
        time.sleep(0.05)
