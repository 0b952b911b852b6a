"""Make `docs/grafana.json`, the dashboard over the service's own figures: `make docs`."""

from typing import Any

MODEL = 'model=~"$model"'
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Requests a second, by route and status",
        "reqps",
        (
            (
                "sum by (route, status) (rate(pytorchlib_request_seconds_count[$__rate_interval]))",
                "{{route}} {{status}}",
            ),
        ),
    ),
    (
        "Latency of requests that name a model",
        "s",
        tuple(
            (
                f"histogram_quantile({quantile}, sum by (le) (rate("
                f"pytorchlib_request_seconds_bucket{{{MODEL}}}[$__rate_interval])))",
                f"p{int(quantile * 100)}",
            )
            for quantile in (0.5, 0.95, 0.99)
        ),
    ),
    (
        "Inputs a second, by what became of them",
        "ops",
        (
            (
                f"sum by (outcome) (rate(pytorchlib_inputs_total{{{MODEL}}}[$__rate_interval]))",
                "{{outcome}}",
            ),
        ),
    ),
    (
        "Inputs that wait",
        "short",
        ((f"pytorchlib_queue_length{{{MODEL}}}", "{{model}}:{{version}}"),),
    ),
    (
        "Wait for a batch, 99th percentile",
        "s",
        (
            (
                "histogram_quantile(0.99, sum by (le, model) (rate("
                f"pytorchlib_queue_wait_seconds_bucket{{{MODEL}}}[$__rate_interval])))",
                "{{model}}",
            ),
        ),
    ),
    (
        "Time spent in each stage, seconds a second",
        "s",
        (
            (
                f"sum by (stage) (rate(pytorchlib_stage_seconds_total{{{MODEL}}}"
                "[$__rate_interval]))",
                "{{stage}}",
            ),
        ),
    ),
    (
        "Mean batch size",
        "short",
        (
            (
                f"sum by (model) (rate(pytorchlib_batch_size_sum{{{MODEL}}}[$__rate_interval])) / "
                f"sum by (model) (rate(pytorchlib_batch_size_count{{{MODEL}}}[$__rate_interval]))",
                "{{model}}",
            ),
        ),
    ),
    (
        "Versions loaded, and memory",
        "bytes",
        (
            ("pytorchlib_model_memory_bytes", "{{model}}:{{version}}"),
            ("pytorchlib_device_memory_bytes", "device, {{kind}}"),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; it asks for a Prometheus data source."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "title": "PyTorchLib",
        "uid": "pytorchlib",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model",
                    "type": "query",
                    "datasource": source,
                    "query": "label_values(pytorchlib_queue_length, model)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                },
            ]
        },
        "panels": [_panel(number, source) for number in range(len(PANELS))],
    }


def _panel(number: int, source: dict[str, str]) -> dict[str, Any]:
    title, unit, series = PANELS[number]
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {"x": number % 2 * 12, "y": number // 2 * 8, "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend}
            for index, (expression, legend) in enumerate(series)
        ],
    }
