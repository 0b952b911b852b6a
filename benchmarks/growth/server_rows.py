"""What a server costs as it holds more models, and as it has answered more requests."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from benchmarks import ours, payload
from benchmarks.growth.asking import ROOMY, Asked, get
from benchmarks.growth.row import Curve, Measure, Row
from benchmarks.load import closed_loop
from benchmarks.networks import PERCEPTRON, publish_perceptrons
from benchmarks.process_tree import PROC
from benchmarks.rounds import Sample
from benchmarks.session import front_layout
from benchmarks.stage import running
from benchmarks.system import System
from models.store import ModelStore

MODELS: Final = (1, 4, 16, 64, 128, 256)
REQUESTS: Final = (5_000, 10_000, 20_000, 40_000, 80_000, 160_000)
CONNECTIONS: Final = 16
BURST_S: Final = 1.0


def rows() -> list[Row]:
    """All of this file."""
    return [
        Row(
            "models",
            "models loaded",
            MODELS,
            [
                Curve("cpu_us", "server's CPU us a request", 0.0),
                Curve("start_cpu_s", "CPU s from start to ready", 0.0),
                Curve("load_cpu_s", "CPU s to load all", 1.0),
                Curve("memory_bytes", "memory in bytes", 1.0, "count"),
                Curve("list_us", "CPU us of GET /v1/models", 1.0),
                Curve("scrape_us", "CPU us of GET /metrics", 1.0),
            ],
            _models,
            num_rounds=3,
        ),
        Row(
            "soak",
            "requests answered",
            REQUESTS,
            [
                Curve("memory_bytes", "memory in bytes", 0.0, "count"),
                Curve("num_files", "open files", 0.0, "count"),
                Curve("p99_ms", "p99 in ms", 0.0, "wall"),
                Curve("scrape_us", "CPU us of GET /metrics", 0.0),
            ],
            _soak,
            num_rounds=3,
            in_order=True,
        ),
    ]


@contextmanager
def _models(folder: Path) -> Iterator[Measure]:
    """A server of its own for each measurement: none is loaded before it is asked for."""
    names = [PERCEPTRON, *(f"model-{number:03}" for number in range(1, MODELS[-1]))]

    def measure(size: int) -> Sample:
        home = folder / f"home-{size}"
        if not home.exists():
            publish_perceptrons(ModelStore(home / "models"), names[:size])
        with _server(folder, home) as asked:
            started = asked.system.cpu_us()
            for name in names[:size]:
                asked.cost(payload.v2_binary(name, payload.row()), seconds=0.0)
            loaded = asked.system.cpu_us()
            sample = asked.cost(payload.v2_binary(PERCEPTRON, payload.row()))
            return {
                **sample,
                "start_cpu_s": started / 1e6,
                "load_cpu_s": (loaded - started) / 1e6,
                "list_us": asked.cost(get("/v1/models"))["cpu_us"],
                "scrape_us": asked.cost(get("/metrics"))["cpu_us"],
            }

    yield measure


@contextmanager
def _soak(folder: Path) -> Iterator[Measure]:
    """A fresh server each round, asked on and on."""
    home = folder / "home"
    publish_perceptrons(ModelStore(home / "models"), [PERCEPTRON])
    sent, cores = payload.v2_binary(PERCEPTRON, payload.row()), front_layout().client
    with ExitStack() as stack:
        state: dict[str, Asked] = {}
        answered = [0]

        def burst(asked: Asked) -> Sample:
            figures = closed_loop(
                sent, asked.system.port, connections=CONNECTIONS, seconds=BURST_S, cores=cores
            )
            answered[0] += figures.num_requests
            return {"p99_ms": figures.p99_ms}

        def measure(size: int) -> Sample:
            if size == REQUESTS[0]:
                stack.close()
                state["asked"] = stack.enter_context(_server(folder, home))
                answered[0] = 0
            asked = state["asked"]
            with running(asked.system):
                sample = burst(asked)
                while answered[0] < size:
                    sample = burst(asked)
                memory, files = asked.system.memory_bytes(), _num_files(asked.system)
            scrape = asked.cost(get("/metrics"))
            return {
                **sample,
                "memory_bytes": float(memory),
                "num_files": float(files),
                "scrape_us": scrape["cpu_us"],
            }

        yield measure


@contextmanager
def _server(folder: Path, home: Path) -> Iterator[Asked]:
    launch = ours.server("ours", home, [], ROOMY)
    with System(launch, front_layout().server, folder / "ours.log") as system:
        yield Asked(system)


def _num_files(system: System) -> int:
    """That its processes hold open; those of connections that just ended are given a moment."""
    time.sleep(0.3)
    total = 0
    for pid in system.tree.pids():
        with suppress(OSError):
            total += len(os.listdir(PROC / str(pid) / "fd"))
    return total
