"""`python -m benchmarks.peers`: other serving systems and ours, with the same weights and requests.

Installs LitServe, MLServer, BentoML and Ray Serve, each into an environment of its own, starts them
as their documentation advises with batching on, checks that all answer alike, and measures them in
the same rounds as our server. Needs gigabytes of disk and, the first time, the network.
"""

import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import networks, ours, payload, resnet_scenario
from benchmarks.in_process import SIZES
from benchmarks.payload import Payload
from benchmarks.peers.environments import Environment, EnvironmentFailed
from benchmarks.peers.peer import PEERS, Answer, Peer, ours_binary, ours_p, ours_r
from benchmarks.record import tell
from benchmarks.rounds import Cell, Round, ratio, undisturbed
from benchmarks.session import Session, compute_layout, front_layout, parser
from benchmarks.stage import Layout, Stage, running
from benchmarks.system import HOST, System, SystemFailed
from benchmarks.verdict import Verdict, at_least, none_of
from models.store import ModelStore

CACHE = Path.home() / ".cache" / "pytorchlib" / "peers"
OURS = "PyTorchLib"
NUM_CHECKED = 4
COMPILING_S = 240.0
UNCHANGED_S = 30.0
NOTHING_S = 90.0
"""A form of which nothing is compiled by then has nothing to compile, as int8."""
Installed = Sequence[tuple[Peer, Environment]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have our server answer.

    Attributes:
        name: for the tables.
        model: its name in our store.
        settings: of the server, by the names in `app/settings.py`.
        send, read: as for a peer.
        goals: how many times the best peer's requests a second ours are to be, at the most
            connections.
        is_exact: whether its numbers must be the peers'; another precision changes them.
        loop: the bare loop's precision, where it is to be compared with that.
    """

    name: str
    model: str
    settings: Mapping[str, str]
    send: Callable[[Any], Payload]
    read: Callable[[bytes], Answer]
    goals: Sequence[float]
    is_exact: bool = True
    loop: str | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """P or R, as far as all systems share it.

    Attributes:
        connections: of the closed loops, fewest first.
        publish: into a store, for our server.
        network: the same one with the same weights.
        sample: the n-th row or picture.
        ways: ours, of which the first must answer as the peers do.
    """

    name: str
    layout: Layout
    connections: Sequence[int]
    publish: Callable[[ModelStore], None]
    network: Callable[[], Any]
    sample: Callable[[int], Any]
    ways: Sequence[Way]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A started system, what it is sent, and how its answer reads."""

    name: str
    system: System
    send: Callable[[Any], Payload]
    read: Callable[[bytes], Answer]


def main(arguments: Sequence[str]) -> None:
    """Install, check, measure, print, and keep the outcome where that is asked."""
    options = parser(__doc__ or "")
    names = [peer.name for peer in PEERS]
    options.add_argument("--envs", type=Path, default=CACHE, help="folder of the environments")
    options.add_argument("--only", nargs="+", choices=names, default=names, help="which peers")
    session = Session("peers", _without_folder(arguments), options.parse_args(arguments))
    installed = list(install(session))
    for name in session.options.scenario:
        measure(session, scenario_named(name), installed)
    session.finish()


def install(session: Session) -> Iterator[tuple[Peer, Environment]]:
    """The peers that are asked for and can be installed; of the others it is told why not."""
    for peer in PEERS:
        if peer.name not in session.options.only:
            continue
        environment = peer.environment(session.options.envs)
        try:
            environment.install()
        except EnvironmentFailed as error:
            session.note(f"{peer.name} could not be installed: {error}")
        else:
            session.note(f"{peer.name}: {', '.join(environment.wanted)}")
            yield peer, environment


def scenario_named(name: str) -> Scenario:
    """P or R."""
    return perceptron() if name == "P" else resnet()


def perceptron() -> Scenario:
    """Ours in JSON, as the peers have it, and in the binary form that none of them has."""
    model = networks.PERCEPTRON
    eager = resnet_scenario.EAGER
    return Scenario(
        "P",
        front_layout(),
        (1, 32),
        lambda store: networks.publish_perceptrons(store, [model]),
        networks.perceptron,
        payload.row,
        [
            Way(
                f"{OURS} JSON",
                model,
                eager,
                lambda numbers: payload.v2_json(model, numbers),
                ours_p,
                (5.0, 7.0),
            ),
            Way(
                f"{OURS} binary",
                model,
                eager,
                lambda numbers: payload.v2_binary(model, numbers),
                ours_binary,
                (9.0,),
            ),
        ],
    )


def resnet() -> Scenario:
    """Ours in eager fp32 as the peers, as users get it, and its int8 version."""
    multipart, full, int8 = resnet_scenario.multipart, networks.RESNET, networks.RESNET_INT8
    return Scenario(
        "R",
        compute_layout(),
        (1, 16),
        networks.publish_resnet_forms,
        networks.resnet,
        payload.photograph,
        [
            Way(OURS, full, resnet_scenario.EAGER, multipart(full), ours_r, (1.0,), loop="fp32"),
            Way(
                f"{OURS} auto",
                full,
                {},
                multipart(full),
                ours_r,
                (2.0,),
                is_exact=False,
                loop="auto",
            ),
            Way(
                f"{OURS} int8",
                int8,
                {},
                multipart(int8),
                ours_r,
                (3.0,),
                is_exact=False,
                loop="int8",
            ),
        ],
    )


def measure(session: Session, scenario: Scenario, installed: Installed) -> None:
    """Start everyone, leave out who answers differently, and measure the others."""
    with session.stage(scenario.layout) as stage:
        home = stage.folder / "home"
        scenario.publish(ModelStore(home / "models"))
        own = list(start_ours(stage, home, scenario, session.settings))
        peers = list(start_peers(session, stage, scenario, installed))
        exact = [one for way, one in zip(scenario.ways, own, strict=True) if way.is_exact]
        for one in exact[1:]:
            if not _agrees(session, stage, scenario, own[0], one):
                raise SystemFailed(f"{one.name} does not answer as {own[0].name} does")
        peers = [peer for peer in peers if _agrees(session, stage, scenario, own[0], peer)]
        cells = [
            stage.closed(f"{one.name} {count}", one.system, one.send(scenario.sample(0)), count)
            for one in (*own, *peers)
            for count in scenario.connections
        ]
        cells += [cell for way in scenario.ways for cell in loops_of(stage, home, scenario, way)]
        rounds = session.measure(cells)
    verdicts = verdicts_of(scenario, [peer.name for peer in peers], undisturbed(rounds))
    session.add(scenario.name, scenario.layout.sentence(), cells, rounds, verdicts)


def start_ours(
    stage: Stage, home: Path, scenario: Scenario, settings: dict[str, str]
) -> Iterator[Contestant]:
    """Our server in every way; ways with the same settings share one."""
    systems: dict[Any, System] = {}
    for way in scenario.ways:
        wanted = {**way.settings, **settings}
        kind = (way.model, *sorted(wanted.items()))
        if kind not in systems:
            launch = ours.server(f"{way.name} {scenario.name}", home, [way.model], wanted)
            systems[kind] = stage.start(launch)
            if "precision" not in wanted:
                wait_until_compiled(systems[kind], way.model)
        yield Contestant(way.name, systems[kind], way.send, way.read)


def wait_until_compiled(system: System, model: str) -> None:
    """Let a server compile what it compiles in the background; a form may have nothing to it."""
    num_compiled, begun = -1, time.monotonic()
    with running(system):
        while time.monotonic() < begun + COMPILING_S:
            with urllib.request.urlopen(f"http://{HOST}:{system.port}/v1/models/{model}") as answer:
                now = len(json.load(answer)["production"]["execution"]["compiled"])
            if now == num_compiled and (now or time.monotonic() > begun + NOTHING_S):
                return
            num_compiled = now
            time.sleep(UNCHANGED_S)


def loops_of(stage: Stage, home: Path, scenario: Scenario, way: Way) -> list[Cell]:
    """The bare loop in the same mode, one and eight pictures at a time."""
    if way.loop is None:
        return []
    body = stage.folder / "picture.jpg"
    body.write_bytes(scenario.sample(0))
    launch = ours.bare_loop(f"loop {way.loop}", home, way.model, body, way.loop)
    loop = stage.start(launch)
    return [stage.in_process(f"loop {way.loop}, {size} rows", loop, size) for size in SIZES]


def start_peers(
    session: Session, stage: Stage, scenario: Scenario, installed: Installed
) -> Iterator[Contestant]:
    """The peers that start; of the others it is told why not."""
    weights = networks.write_state_dict(scenario.network(), stage.folder / "weights.pt")
    num_cores = len(scenario.layout.server)
    for peer, environment in installed:
        launch = peer.launch(environment, scenario.name, weights, stage.folder, num_cores)
        try:
            system = stage.start(launch)
        except SystemFailed as error:
            session.note(f"{peer.name} did not start in {scenario.name}: {error}")
        else:
            yield Contestant(peer.name, system, peer.send[scenario.name], peer.read[scenario.name])


def verdicts_of(scenario: Scenario, peers: Sequence[str], rounds: Sequence[Round]) -> list[Verdict]:
    """Each of our ways over the best peer and over each, and over its bare loop."""
    most = scenario.connections[-1]
    verdicts = []
    for way in scenario.ways:
        mine = f"{way.name} {most}"
        if peers:
            verdicts += [
                at_least(
                    f"{way.name}, requests/s over the best peer's, {most} connections",
                    rounds,
                    lambda samples, mine=mine: (
                        samples[mine]["rate_per_s"]
                        / max(samples[f"{peer} {most}"]["rate_per_s"] for peer in peers)
                    ),
                    goal,
                )
                for goal in way.goals
            ]
        if way.loop is not None:
            verdicts.append(
                at_least(
                    f"{way.name}, requests/s over the faster bare loop's, {most} connections",
                    rounds,
                    lambda samples, way=way, mine=mine: (
                        samples[mine]["rate_per_s"]
                        / max(
                            samples[f"loop {way.loop}, {size} rows"]["rate_per_s"] for size in SIZES
                        )
                    ),
                    0.9,
                )
            )
        verdicts.append(none_of(f"faults of {mine}", rounds, mine, ["faults"]))
    first = scenario.ways[0].name
    return verdicts + [
        at_least(
            f"{first}, requests/s over {peer}'s, {count} connections",
            rounds,
            ratio(f"{first} {count}", f"{peer} {count}", "rate_per_s"),
            scenario.ways[0].goals[0] if count == most else 1.0,
        )
        for peer in peers
        for count in scenario.connections
    ]


def _agrees(
    session: Session, stage: Stage, scenario: Scenario, own: Contestant, peer: Contestant
) -> bool:
    """Whether both give the same class, and the same numbers, for a few inputs."""
    for seed in range(NUM_CHECKED):
        sample = scenario.sample(seed)
        try:
            mine, theirs = (
                one.read(stage.ask(one.system, one.send(sample))) for one in (own, peer)
            )
        except SystemFailed as error:
            session.note(f"{peer.name} is left out of {scenario.name}: {error}")
            return False
        if not theirs.agrees(mine):
            session.note(f"{peer.name} is left out of {scenario.name}: it answers differently")
            tell(f"ours: {mine}\n{peer.name}: {theirs}")
            return False
    return True


def _without_folder(arguments: Sequence[str]) -> list[str]:
    """The command without the path of the environments, which is of no interest elsewhere."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == "--envs":
            next(words, None)
        elif not word.startswith("--envs="):
            kept.append(word)
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
