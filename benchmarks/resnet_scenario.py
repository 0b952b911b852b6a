"""Scenario R: ResNet-18 from a JPEG of 500x375 pixels, where the network costs most.

Overload is measured here too, with a generator that does not wait for the server.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import ours, payload
from benchmarks.networks import RESNET, publish_resnet
from benchmarks.rounds import Cell, Round, Samples, difference, ratio
from benchmarks.stage import Remembered, Stage
from benchmarks.system import System
from benchmarks.verdict import Verdict, at_least, at_most, none_of
from models.store import ModelStore

PATH = f"/v1/models/{RESNET}/predict"
BUSY = "multipart 16"
LOOPS = {"loop batch 1": 1, "loop batch 8": 8}
# The time a caller gives a request under overload, as a multiple of one undisturbed request. The
# 99th percentile at 0.8 of capacity is about five of them, and the goal allows twice that.
PATIENCE = 10.0
FACTORS = (0.8, 2.0, 5.0)
SERVER_FAULTS = ("num_503", "num_504", "num_other_5xx")
LOST = ("num_resets", "num_timeouts", "num_unconnected", "num_unreadable")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Its cells, the time that callers gave under overload, and what is to be judged."""

    cells: Sequence[Cell]
    patience_ms: float

    def verdicts(self, rounds: Sequence[Round]) -> list[Verdict]:
        """The goals of the issue, in its order."""
        verdicts = [
            at_least(
                "multipart, 16 connections, requests/s over the faster bare loop's",
                rounds,
                lambda samples: samples[BUSY]["rate_per_s"] / _loop_rate(samples),
                0.93,
            ),
            at_most(
                "multipart, 1 connection, p50 above the bare loop's in ms",
                rounds,
                difference("multipart 1", "loop batch 1", "p50_ms"),
                1.0,
            ),
        ]
        for factor in FACTORS[1:]:
            verdicts += _overload_verdicts(rounds, factor)
        verdicts.append(self._memory(rounds))
        names = ("multipart 1", BUSY, "raw 1", "raw 16", _offered(0.8))
        return verdicts + [none_of(f"faults of {name}", rounds, name, ["faults"]) for name in names]

    def _memory(self, rounds: Sequence[Round]) -> Verdict:
        """Under overload, in the last rounds over the first; one round says nothing."""
        used = [
            max(one.samples[_offered(factor)]["memory_bytes"] for factor in FACTORS[1:])
            for one in rounds
        ]
        third = max(1, len(used) // 3)
        growth = statistics.median(used[-third:]) / statistics.median(used[:third])
        state = "met" if growth <= 1.05 else "missed"
        return Verdict(
            "memory under overload, last rounds over the first",
            f"{growth:.4g}",
            "at most 1.05",
            state,
        )


EAGER: Final = {"precision": "fp32", "compile": "off"}
"""What the loop and the peers do; `--set precision=auto` shows what users get."""


def multipart(model: str) -> Callable[[bytes], payload.Payload]:
    """What makes a form of a picture, for one of the models."""
    return lambda picture: payload.multipart(f"/v1/models/{model}/predict", picture)


def prepare(
    stage: Stage, settings: Mapping[str, str], patience_ms: float | None = None
) -> Scenario:
    """Start every system of the scenario and make its cells.

    Args:
        patience_ms: what callers give a request under overload; 0 for no limit of theirs; None
            for ten times what one undisturbed request takes here.
    """
    home = stage.folder / "home-ours-r"
    publish_resnet(ModelStore(home / "models"))
    settings = {**EAGER, **settings}
    server = stage.start(ours.server("ours R", home, [RESNET], settings))
    picture = payload.photograph()
    form, raw = payload.multipart(PATH, picture), payload.raw_picture(PATH, picture)
    alone = stage.closed("multipart 1", server, form, 1)
    busy = stage.closed(BUSY, server, form, 16)
    capacity = Remembered(busy)
    if patience_ms is None:
        patience_ms = PATIENCE * alone.measure()["p50_ms"]
    hurried = form.with_headers(X_Request_Timeout_Ms=f"{patience_ms:.0f}") if patience_ms else form
    cells = [
        alone,
        capacity.cell,
        stage.closed("raw 1", server, raw, 1),
        stage.closed("raw 16", server, raw, 16),
        *(_loop(stage, picture, name, batch) for name, batch in LOOPS.items()),
        *(_overload(stage, server, hurried, capacity, factor) for factor in FACTORS),
    ]
    return Scenario(cells, patience_ms)


def _overload(
    stage: Stage, server: System, sent: payload.Payload, capacity: Remembered, factor: float
) -> Cell:
    def rate_per_s() -> float:
        return max(1.0, factor * capacity.median("rate_per_s"))

    return stage.open(_offered(factor), server, sent, rate_per_s)


def _overload_verdicts(rounds: Sequence[Round], factor: float) -> list[Verdict]:
    cell = _offered(factor)
    calm = _offered(FACTORS[0])
    return [
        at_least(
            f"{cell}, goodput over capacity",
            rounds,
            lambda samples: samples[cell]["goodput_per_s"] / samples[BUSY]["rate_per_s"],
            0.9,
        ),
        at_most(
            f"{cell}, admitted p99 over that at 0.8",
            rounds,
            ratio(cell, calm, "p99_ms"),
            2.0,
        ),
        at_most(
            f"{cell}, p99 of refusals in ms",
            rounds,
            lambda samples: samples[cell]["refusal_p99_ms"],
            50.0,
        ),
        none_of(f"{cell}, answers 5xx", rounds, cell, SERVER_FAULTS),
        none_of(f"{cell}, without an answer", rounds, cell, LOST),
    ]


def _loop_rate(samples: Samples) -> float:
    return max(samples[name]["rate_per_s"] for name in LOOPS)


def _offered(factor: float) -> str:
    return f"offered {factor:g} of capacity"


def _loop(stage: Stage, picture: bytes, name: str, batch: int) -> Cell:
    body = stage.folder / "picture.jpg"
    body.write_bytes(picture)
    loop = stage.start(ours.bare_loop(f"{name} R", stage.folder / "home-ours-r", RESNET, body))
    return stage.in_process(name, loop, batch)
