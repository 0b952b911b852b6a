"""`python -m benchmarks.peers`: other serving systems and ours, with the same weights and requests.

Installs LitServe, MLServer, BentoML and Ray Serve, each into an environment of its own, starts them
as their documentation advises with batching on, checks that all answer alike, and measures them in
the same rounds as our server. Needs gigabytes of disk and, the first time, the network.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import networks, ours, payload, resnet_scenario
from benchmarks.payload import Payload
from benchmarks.peers.environments import Environment, EnvironmentFailed
from benchmarks.peers.peer import PEERS, Answer, Peer, ours_p, ours_r
from benchmarks.record import tell
from benchmarks.rounds import Round, ratio, undisturbed
from benchmarks.session import Session, compute_layout, front_layout, parser
from benchmarks.stage import Layout, Stage
from benchmarks.system import System, SystemFailed
from benchmarks.verdict import Verdict, at_least, none_of
from models.store import ModelStore

CACHE = Path.home() / ".cache" / "pytorchlib" / "peers"
OURS = "PyTorchLib"
NUM_CHECKED = 4
Installed = Sequence[tuple[Peer, Environment]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """P or R, as far as all systems share it.

    Attributes:
        connections: of the closed loops, fewest first.
        goal: how many times the best peer's requests a second ours are to be, at the most.
        publish: into a store, for our server.
        network: the same one with the same weights.
        model: its name in our store.
        sample: the n-th row or picture.
        send, read: for our server.
    """

    name: str
    layout: Layout
    connections: Sequence[int]
    goal: float
    publish: Callable[[ModelStore], None]
    network: Callable[[], Any]
    model: str
    sample: Callable[[int], Any]
    send: Callable[[Any], Payload]
    read: Callable[[bytes], Answer]


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
    if name == "P":
        model = networks.PERCEPTRON
        return Scenario(
            name,
            front_layout(),
            (1, 32),
            5.0,
            lambda store: networks.publish_perceptrons(store, [model]),
            networks.perceptron,
            model,
            payload.row,
            lambda numbers: payload.v2_json(model, numbers),
            ours_p,
        )
    return Scenario(
        name,
        compute_layout(),
        (1, 16),
        1.0,
        networks.publish_resnet,
        networks.resnet,
        networks.RESNET,
        payload.photograph,
        lambda picture: payload.multipart(resnet_scenario.PATH, picture),
        ours_r,
    )


def measure(session: Session, scenario: Scenario, installed: Installed) -> None:
    """Start everyone, leave out who answers differently, and measure the others."""
    with session.stage(scenario.layout) as stage:
        own = start_ours(stage, scenario, session.settings)
        peers = list(start_peers(session, stage, scenario, installed))
        peers = [peer for peer in peers if _agrees(session, stage, scenario, own, peer)]
        cells = [
            stage.closed(f"{one.name} {count}", one.system, one.send(scenario.sample(0)), count)
            for one in (own, *peers)
            for count in scenario.connections
        ]
        rounds = session.measure(cells)
    verdicts = verdicts_of(scenario, [peer.name for peer in peers], undisturbed(rounds))
    session.add(scenario.name, scenario.layout.sentence(), cells, rounds, verdicts)


def start_ours(stage: Stage, scenario: Scenario, settings: dict[str, str]) -> Contestant:
    """Our server over a store that holds the network."""
    home = stage.folder / "home"
    scenario.publish(ModelStore(home / "models"))
    launch = ours.server(
        f"{OURS} {scenario.name}", home, [scenario.model], {**resnet_scenario.EAGER, **settings}
    )
    return Contestant(OURS, stage.start(launch), scenario.send, scenario.read)


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
    """Ours over the best of them and over each, at the most connections."""
    if not peers:
        return []
    most = scenario.connections[-1]
    mine = f"{OURS} {most}"
    return [
        at_least(
            f"requests/s over the best peer's, {most} connections",
            rounds,
            lambda samples: (
                samples[mine]["rate_per_s"]
                / max(samples[f"{peer} {most}"]["rate_per_s"] for peer in peers)
            ),
            scenario.goal,
        ),
        *(
            at_least(
                f"requests/s over {peer}'s, {count} connections",
                rounds,
                ratio(f"{OURS} {count}", f"{peer} {count}", "rate_per_s"),
                scenario.goal if count == most else 1.0,
            )
            for peer in peers
            for count in scenario.connections
        ),
        none_of(f"faults of {mine}", rounds, mine, ["faults"]),
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
