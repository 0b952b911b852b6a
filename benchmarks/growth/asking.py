"""A server that is asked one request after the other, and what that costs it."""

import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks import ours
from benchmarks.payload import Payload
from benchmarks.record import tell
from benchmarks.resnet_scenario import EAGER
from benchmarks.rounds import Sample
from benchmarks.session import front_layout
from benchmarks.stage import Stage, Timing, running, with_costs
from benchmarks.system import HOST, System

ROOMY: Final = {
    "max_inputs": str(1 << 16),
    "max_queue_items": str(1 << 16),
    "max_batch_items": "1024",
    "max_body_bytes": str(128 << 20),
    "max_picture_bytes": str(64 << 20),
    **EAGER,
}
"""Settings under which the largest sizes are still answered."""
SECONDS: Final = 0.7
LEAST_ASKED: Final = 3
PATIENCE_S: Final = 120.0
GET: Final = "GET"


class Asked:
    """A started server."""

    def __init__(self, system: System) -> None:
        self.system = system

    def cost(self, payload: Payload, seconds: float = SECONDS) -> Sample:
        """What a request costs the server's processes, after one that is not counted.

        Returns:
            `cpu_us` a request, `num_requests`, `memory_bytes`.
        """
        with running(self.system), self._connection() as connection:
            _ask(connection, payload)
            return with_costs(self.system, lambda: _ask_for(connection, payload, seconds))

    @contextmanager
    def _connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection(HOST, self.system.port, timeout=PATIENCE_S)
        try:
            yield connection
        finally:
            connection.close()


def get(path: str) -> Payload:
    """A request without a body."""
    return Payload(GET, path, b"")


@contextmanager
def asking(folder: Path, home: Path, preload: list[str]) -> Iterator[Asked]:
    """A server over the models in `home`, frozen while it is not asked."""
    timing = Timing(warm_up_s=0.0, closed_s=SECONDS, open_s=SECONDS)
    with Stage(front_layout(), timing, folder, tell) as stage:
        yield Asked(stage.start(ours.server("ours", home, preload, ROOMY)))


def _ask_for(connection: http.client.HTTPConnection, payload: Payload, seconds: float) -> Sample:
    count, until = 0, time.monotonic() + seconds
    while time.monotonic() < until or count < LEAST_ASKED:
        _ask(connection, payload)
        count += 1
    return {"num_requests": float(count)}


def _ask(connection: http.client.HTTPConnection, payload: Payload) -> bytes:
    if payload.name == GET:
        connection.request(GET, payload.path)
    else:
        connection.request("POST", payload.path, payload.body, dict(payload.headers))
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{payload.name} is answered with {answer.status}: {body[:300]!r}")
    return body
