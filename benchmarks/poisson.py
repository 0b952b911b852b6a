"""`python -m benchmarks.poisson`: the tail at half and 0.8 of capacity, against an ideal batcher.

Requests arrive at random moments and are timed from them; capacity is what the server manages of
such (`benchmarks.stage.Capacity`). The ideal (`benchmarks/ideal_batcher.py`) gets the same
requests when they were sent, late where the generator stood still, and takes as long for each
batch as was measured in the same round: the median, on a machine that is slow and stands still as
the bare loops of that round saw it (`benchmarks/pace.py`). It is told in two ways. *Batches alone*:
its batches take what the bare loop takes for the network and softmax; to each latency a constant
is added, the median that one connection sees without other load minus the bare loop's for one row:
HTTP once, with nobody else there. *HTTP in the batch*: reading, parsing and encoding are in its
batches, which on a small network is most of them, and nothing is added. One request takes what a
closed loop of one connection saw, so many as keep the server busy what a loop of so many did, and
all other numbers of them lie on the line through both: loops in between fall out of step, and tell
of two batches where there could be one.
"""

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from benchmarks import ours
from benchmarks.ideal_batcher import BatchTimes, latencies_s
from benchmarks.open_loop import Plan
from benchmarks.pace import Pace, heard
from benchmarks.resnet_scenario import EAGER
from benchmarks.rounds import Cell, Round, Sample, Samples, undisturbed
from benchmarks.session import Session, compute_layout, front_layout, parser
from benchmarks.stage import Stage, Timing, connections_named, stalls_of
from benchmarks.tensor_scenario import SCENARIOS, TensorScenario
from benchmarks.verdict import Verdict, at_most, none_of
from models.store import ModelStore

LOADS: Final = (0.5, 0.8)
GOAL: Final = 1.2
SIZES: Final = (1, 2, 4, 8, 16, 32)
NUM_RUNS: Final = 5
LAYOUTS: Final = {"P": front_layout, "R": compute_layout}
Ideal = Callable[[Samples], tuple[BatchTimes, float]]


def main(arguments: Sequence[str]) -> None:
    """Measure, print the tables and one line of JSON, and keep them where that is asked."""
    session = Session("poisson", arguments, parser(__doc__ or "").parse_args(arguments))
    for name in session.options.scenario:
        measure(session, name)
    session.finish()


def measure(session: Session, name: str) -> None:
    """One scenario: its batch times, its capacity and its tails, in the same rounds."""
    scenario, layout = SCENARIOS[name], LAYOUTS[name]()
    with session.stage(layout) as stage:
        cells = prepare(stage, scenario, session.settings)
        rounds = session.measure(cells)
        verdicts = verdicts_of(undisturbed(rounds), stage.timing, scenario.busy)
    sentence = (
        f"{layout.sentence()}; V2 binary, float32 {list(scenario.shape)}; the ideal has "
        f"the arrivals of the measured loop, batches of {', '.join(map(str, SIZES))}, the median "
        f"p99 of {NUM_RUNS} runs, each from another moment of the machine's pace"
    )
    session.add(name, sentence, cells, rounds, verdicts)


def prepare(stage: Stage, scenario: TensorScenario, settings: Mapping[str, str]) -> list[Cell]:
    """Start the server and the bare loop, and make the cells."""
    home = stage.folder / f"home-{scenario.model}"
    scenario.publish(ModelStore(home / "models"))
    launch = ours.server("ours", home, [scenario.model], {**EAGER, **settings})
    server = stage.start(launch)
    sent = scenario.sent()
    stage.ask(server, sent)
    body = stage.folder / "row.npy"
    body.write_bytes(_npy(scenario.row()))
    loop = stage.start(ours.bare_loop("loop", home, scenario.model, body))
    capacity = stage.capacity(server, sent, scenario.busy)
    return [
        *(stage.in_process(_batch(size), loop, size) for size in SIZES),
        stage.closed(connections_named(1), server, sent, 1),
        *capacity.cells,
        *(stage.open(_offered(load), server, sent, capacity.share(load)) for load in LOADS),
    ]


def verdicts_of(rounds: Sequence[Round], timing: Timing, busy: int) -> list[Verdict]:
    """p99 over the ideal's, and that nothing failed."""
    verdicts = []
    for load in LOADS:
        for way, ideal in (("batches alone", alone), ("HTTP in the batch", whole(busy))):
            what = f"{_offered(load)}, p99 over the ideal's ({way})"
            verdicts.append(at_most(what, rounds, _over(load, ideal, timing), GOAL))
    names = [_offered(load) for load in LOADS]
    verdicts += [none_of(f"faults of {name}", rounds, name, ["faults"]) for name in names]
    return verdicts + [none_of(f"refusals of {name}", rounds, name, ["num_429"]) for name in names]


def alone(samples: Samples) -> tuple[BatchTimes, float]:
    """Times of the bare loop, and the seconds that HTTP adds where nobody else is there."""
    usual_s = {size: samples[_batch(size)]["p50_ms"] / 1000 for size in SIZES}
    unloaded_s = samples[connections_named(1)]["p50_ms"] / 1000
    return BatchTimes(usual_s), max(0.0, unloaded_s - usual_s[1])


def whole(busy: int) -> Ideal:
    """What the server takes for so many requests at once, by closed loops of one and of `busy`."""

    def ideal(samples: Samples) -> tuple[BatchTimes, float]:
        one_s, busy_s = (samples[connections_named(many)]["p50_ms"] / 1000 for many in (1, busy))
        row_s = (busy_s - one_s) / (busy - 1)
        numbers = range(1, SIZES[-1] + 1)
        return BatchTimes({number: one_s + row_s * (number - 1) for number in numbers}), 0.0

    return ideal


def pace(samples: Samples) -> Pace:
    """Of the machine, while the bare loops of a round ran."""
    return Pace([span for size in SIZES for span in heard(samples[_batch(size)])])


def ideal_p99_ms(
    sample: Sample, ideal: tuple[BatchTimes, float], machine: Pace, timing: Timing
) -> float:
    """The p99 of an ideal batcher that got the requests of an open loop when they were sent."""
    plan = Plan(0, sample["asked_per_s"], timing.open_s, timing.warm_up_s, seed=int(sample["seed"]))
    due = np.array(plan.moments())
    sent = due.copy()
    for begin, end in stalls_of(sample):
        sent[(due >= begin) & (due < end)] = end
    counted = due >= timing.warm_up_s
    times, constant_s = ideal
    found = []
    for run in range(NUM_RUNS):
        at_s = machine.length_s * run / NUM_RUNS
        late_s = latencies_s(sent.tolist(), times, machine, constant_s=constant_s, at_s=at_s)
        found.append(np.percentile((late_s + sent - due)[counted], 99))
    return float(np.median(found)) * 1000


def _over(load: float, ideal: Ideal, timing: Timing) -> Callable[[Samples], float]:
    def statistic(samples: Samples) -> float:
        sample = samples[_offered(load)]
        return sample["p99_ms"] / ideal_p99_ms(sample, ideal(samples), pace(samples), timing)

    return statistic


def _batch(size: int) -> str:
    return f"bare loop, batch {size}"


def _offered(load: float) -> str:
    return f"offered {load:g} of capacity"


def _npy(row: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, row)
    return file.getvalue()


if __name__ == "__main__":
    main(sys.argv[1:])
