"""Probes and figures: `/livez`, `/readyz`, `/metrics`."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Response

from app.api.permission import requires
from app.api.schema import shown
from app.engine.short_slices import short_slices
from app.metrics import Metrics, Scrape

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"

_SERIES = 'pytorchlib_inputs_total{model="digits",outcome="answered",version="1"} 42.0\n'


def health_routes(ready: Callable[[], str | None], metrics: Metrics) -> APIRouter:
    """The probe routes.

    Args:
        ready: None when requests can be answered, else the reason why not.
        metrics: what `/metrics` tells.
    """
    router = APIRouter(tags=["health"])
    not_ready: dict[int | str, dict[str, Any]] = {
        503: {"description": "Not ready; the body says why."}
    }

    @router.get("/livez", summary="Whether the process is alive.", responses=shown({"live": True}))
    async def livez() -> dict[str, bool]:
        return {"live": True}

    @router.get(
        "/readyz",
        summary="Whether requests can be answered now.",
        responses={**shown({"ready": True}), **not_ready},
    )
    async def readyz(response: Response) -> dict[str, bool | str]:
        reason = ready()
        if reason is None:
            return {"ready": True}
        response.status_code = 503
        return {"ready": False, "reason": reason}

    @router.get(
        "/metrics",
        summary="Counts and times for Prometheus.",
        dependencies=[requires("metrics")],
        response_class=Response,
        responses={
            200: {
                "content": {"text/plain": {"example": _SERIES}},
                "description": "Prometheus' text format.",
            }
        },
    )
    async def read_metrics() -> Response:
        return Response(await written(metrics), media_type=PROMETHEUS)

    return router


async def written(metrics: Metrics) -> bytes:
    """What Prometheus reads; requests are answered meanwhile."""
    return await asyncio.to_thread(_text, metrics.scrape())


def _text(scrape: Scrape) -> bytes:
    with short_slices():
        return scrape.text()
