"""One run of a serving benchmark: its options, its layouts, its rounds, and what it tells."""

import argparse
import contextlib
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.load import wrk_version
from benchmarks.machine import cores, this_machine
from benchmarks.record import Record, Table, tell
from benchmarks.rounds import Cell, Round, measure_rounds, undisturbed
from benchmarks.stage import Layout, Stage, Timing
from benchmarks.verdict import Verdict, cells_table, goals_table

FULL = Timing(warm_up_s=2.0, closed_s=6.0, open_s=15.0)
QUICK = Timing(warm_up_s=0.0, closed_s=1.0, open_s=2.0)
NUM_ROUNDS = 7


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every serving benchmark has."""
    options = argparse.ArgumentParser(description=description)
    add = options.add_argument
    add("--quick", action="store_true", help="a smoke run: its figures mean nothing")
    add("--write", action="store_true", help="keep the outcome in benchmarks/results")
    add("--rounds", type=int, help=f"how many; without it {NUM_ROUNDS}, or 1 with --quick")
    add("--seconds", type=float, help=f"of one closed loop; without it {FULL.closed_s:g}")
    add("--scenario", nargs="+", choices=("P", "R"), default=["P", "R"], help="which; both")
    add("--set", nargs="+", type=_setting, default=[], metavar="NAME=VALUE", help=_SET)
    return options


_SET = "settings of our server, by the names in app/settings.py"


class Session:
    """What all scenarios of one run share.

    Args:
        name: of the benchmark.
        arguments: as they were typed.
        options: parsed from them.
    """

    def __init__(self, name: str, arguments: Sequence[str], options: argparse.Namespace) -> None:
        # a stop by whoever started us must end the systems too
        signal.signal(signal.SIGTERM, _leave)
        self.name, self.options = name, options
        self.settings: dict[str, str] = dict(options.set)
        self._command = " ".join([f"python -m benchmarks.{name}", *arguments])
        self._timing = _timing(options)
        self._num_rounds = options.rounds or (1 if options.quick else NUM_ROUNDS)
        self._began = datetime.now(UTC)
        self._method = self._first_sentences()
        self._tables: list[Table] = []
        self._figures: dict[str, Any] = {}

    @contextlib.contextmanager
    def stage(self, layout: Layout) -> Iterator[Stage]:
        """A stage with a folder of its own, which goes with it."""
        # what a killed server left behind may still be writing there
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            Stage(layout, self._timing, Path(folder), tell) as stage,
        ):
            yield stage

    def measure(self, cells: Sequence[Cell]) -> list[Round]:
        """As many rounds as the options say."""
        return measure_rounds(cells, self._num_rounds, tell=tell)

    def note(self, sentence: str) -> None:
        """Tell something that belongs beside the figures."""
        tell(sentence)
        self._method.append(sentence)

    def add(
        self,
        scenario: str,
        sentence: str,
        cells: Sequence[Cell],
        rounds: Sequence[Round],
        verdicts: Sequence[Verdict],
    ) -> None:
        """Keep a scenario's outcome.

        Args:
            sentence: what was particular in how it was measured.
            rounds: all of them; the tables tell the undisturbed ones.
        """
        kept = undisturbed(rounds)
        count = f"{len(kept)} of {len(rounds)} rounds told, the others were disturbed"
        if len(kept) == len(rounds):
            count = f"{len(rounds)} rounds"
        self._method.append(f"{scenario}: {sentence}; {count}")
        self._tables.append(goals_table(f"Scenario {scenario}: goals", verdicts))
        self._tables.append(cells_table(f"Scenario {scenario}: medians", cells, kept))
        self._figures[scenario] = {
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "rounds": [_shortened(asdict(one)) for one in rounds],
        }

    def finish(self) -> None:
        """Print the tables and one line of JSON, and keep them where that was asked."""
        record = Record(
            self.name,
            self._command,
            this_machine(),
            self._method,
            self._tables,
            self._figures,
            self._began,
        )
        record.show(write=self.options.write)

    def _first_sentences(self) -> list[str]:
        timing = self._timing
        sentences = [
            f"Load: {wrk_version()} in a closed loop (one thread, {timing.closed_s:g} s a cell); "
            f"benchmarks.open_loop for overload ({timing.open_s:g} s); both after "
            f"{timing.warm_up_s:g} s of warming up",
            "Every system is started once and frozen while others are measured; cells in random "
            "order each round; medians of per-round values with 95 % bootstrap intervals",
            "Latency of closed loops is as wrk tells it; CPU and memory are of all processes of a "
            "system",
        ]
        if self.settings:
            listed = ", ".join(f"{name}={value}" for name, value in self.settings.items())
            sentences.append(f"Settings of our server: {listed}")
        if self.options.quick:
            sentences.insert(0, "**A smoke run: these figures mean nothing**")
        return sentences


def front_layout() -> Layout:
    """One core for a server that its front bounds, another for the client."""
    own = cores()
    return Layout(own[:1], own[1:2] or own[:1])


def compute_layout() -> Layout:
    """Two cores for a server that its network bounds; the client on two others if there are."""
    own = cores()
    return Layout(own[:2], own[2:4] or own[:2])


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _timing(options: argparse.Namespace) -> Timing:
    usual = QUICK if options.quick else FULL
    if options.seconds is None:
        return usual
    longer = options.seconds / usual.closed_s
    return Timing(usual.warm_up_s, options.seconds, usual.open_s * longer)


def _setting(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _shortened(value: Any) -> Any:
    """Five digits say all that a measurement knows."""
    if isinstance(value, dict):
        return {name: _shortened(inner) for name, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
