"""Scenario P: a 784-128-64-10 perceptron, so small that what is measured is the HTTP front."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import ours, payload
from benchmarks.networks import PERCEPTRON, publish_perceptrons
from benchmarks.rounds import Cell, Round, difference, ratio
from benchmarks.stage import Stage
from benchmarks.system import System
from benchmarks.verdict import Verdict, at_least, at_most, none_of
from models.store import ModelStore

NUM_MANY = 100


@dataclass(frozen=True, slots=True)
class Scenario:
    """Its cells, and what is to be judged by them."""

    cells: Sequence[Cell]

    def verdicts(self, rounds: Sequence[Round]) -> list[Verdict]:
        """The goals of the issue, in its order."""
        verdicts = [
            at_least(
                "V2 JSON, 32 connections, requests/s over the echo's",
                rounds,
                ratio("ours json 32", "echo json 32", "rate_per_s"),
                0.35,
            ),
            at_least(
                "V2 binary, 32 connections, requests/s over the echo's",
                rounds,
                ratio("ours binary 32", "echo binary 32", "rate_per_s"),
                0.45,
            ),
            at_most(
                "V2 JSON, 1 connection, p50 above the echo's in ms",
                rounds,
                difference("ours json 1", "echo json 1", "p50_ms"),
                0.3,
            ),
            at_most(
                "V2 binary, 1 connection, p50 above the echo's in ms",
                rounds,
                difference("ours binary 1", "echo binary 1", "p50_ms"),
                0.3,
            ),
            at_most(
                f"{NUM_MANY} models loaded, CPU a request over that with one, 32 connections",
                rounds,
                ratio("hundred json 32", "ours json 32", "cpu_us"),
                1.05,
            ),
            at_most(
                f"{NUM_MANY} models loaded, CPU a request over that with one, 1 connection",
                rounds,
                ratio("hundred json 1", "ours json 1", "cpu_us"),
                1.05,
            ),
        ]
        names = [cell.name for cell in self.cells if not cell.name.startswith("loop")]
        return verdicts + [none_of(f"faults of {name}", rounds, name, ["faults"]) for name in names]


def prepare(stage: Stage, settings: Mapping[str, str]) -> Scenario:
    """Start every system of the scenario and make its cells."""
    numbers = payload.row()
    as_json, as_binary = (
        payload.v2_json(PERCEPTRON, numbers),
        payload.v2_binary(PERCEPTRON, numbers),
    )
    one = _server(stage, "ours", [PERCEPTRON], settings)
    others = [f"model-{number:03}" for number in range(1, NUM_MANY)]
    many = _server(stage, "hundred", [PERCEPTRON, *others], settings)
    answers = [stage.ask(one, as_json), stage.ask(one, as_binary)]
    echo = stage.start(ours.echo("echo P", [len(answer) for answer in answers]))
    cells = [_loop(stage, as_json, batch) for batch in (1, 32)]
    for kind, sent, answer in zip(("json", "binary"), (as_json, as_binary), answers, strict=True):
        echoed = payload.Payload(
            f"echo-{kind}", f"/echo/{len(answer)}", sent.body, {**sent.headers}
        )
        for connections in (1, 32):
            cells += [
                stage.closed(f"ours {kind} {connections}", one, sent, connections),
                stage.closed(f"echo {kind} {connections}", echo, echoed, connections),
            ]
    for connections in (1, 32):
        cells.append(stage.closed(f"hundred json {connections}", many, as_json, connections))
    return Scenario(cells)


def _server(stage: Stage, name: str, models: Sequence[str], settings: Mapping[str, str]) -> System:
    home = stage.folder / f"home-{name}-p"
    publish_perceptrons(ModelStore(home / "models"), list(models))
    return stage.start(ours.server(f"{name} P", home, models, settings))


def _loop(stage: Stage, sent: payload.Payload, batch: int) -> Cell:
    body = stage.folder / "perceptron.body"
    body.write_bytes(sent.body)
    home = stage.folder / "home-ours-p"
    loop = stage.start(ours.bare_loop(f"loop P {batch}", home, PERCEPTRON, body))
    return stage.in_process(f"loop batch {batch}", loop, batch)
