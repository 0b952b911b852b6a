"""`python -m benchmarks.serve`: our server against the limits that are measured beside it.

Scenario P is a small perceptron, R is ResNet-18 from a JPEG. The limits are a Starlette route that
only echoes, and the bare loop of the computation; all of it runs in the same rounds.
"""

import sys
from collections.abc import Sequence

from benchmarks import perceptron_scenario, resnet_scenario
from benchmarks.rounds import undisturbed
from benchmarks.session import Session, compute_layout, front_layout, parser


def main(arguments: Sequence[str]) -> None:
    """Measure, print the tables and one line of JSON, and keep them where that is asked."""
    options = parser(__doc__ or "")
    options.add_argument(
        "--patience-ms",
        type=float,
        help="time that callers give a request under overload, 0 for no limit of theirs; without "
        f"it {resnet_scenario.PATIENCE:g} times what one undisturbed request takes",
    )
    session = Session("serve", arguments, options.parse_args(arguments))
    for name in session.options.scenario:
        SCENARIOS[name](session)
    session.finish()


def measure_p(session: Session) -> None:
    """The perceptron: the server on one core, the client on another."""
    layout = front_layout()
    with session.stage(layout) as stage:
        scenario = perceptron_scenario.prepare(stage, session.settings)
        rounds = session.measure(scenario.cells)
    verdicts = scenario.verdicts(undisturbed(rounds))
    session.add("P", layout.sentence(), scenario.cells, rounds, verdicts)


def measure_r(session: Session) -> None:
    """ResNet-18: two cores for the server, the client beside it."""
    layout = compute_layout()
    with session.stage(layout) as stage:
        scenario = resnet_scenario.prepare(stage, session.settings, session.options.patience_ms)
        rounds = session.measure(scenario.cells)
    verdicts = scenario.verdicts(undisturbed(rounds))
    sentence = (
        f"{layout.sentence()}; under overload callers give a request "
        f"{scenario.patience_ms:.0f} ms (X-Request-Timeout-Ms)"
    )
    session.add("R", sentence, scenario.cells, rounds, verdicts)


SCENARIOS = {"P": measure_p, "R": measure_r}

if __name__ == "__main__":
    main(sys.argv[1:])
