"""`python -m benchmarks.growth`: how costs grow with sizes, as exponents with their intervals.

Every row visits its sizes in rounds, in another order each time. A cost keeps its target where the
upper end of the interval does (plus 0.05 for processor time, 0.10 for time on the clock), for the
cost itself and for what it rises above the smallest size's. Everything measured is kept as points,
from which `--points FILE` tells the same again without measuring.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import orjson

from benchmarks.growth import engine_rows, http_rows, jobs_rows, server_rows, training_rows
from benchmarks.growth.figure import draw
from benchmarks.growth.row import Found, Row, found_in
from benchmarks.machine import this_machine
from benchmarks.record import RESULTS, Record, Table, command_of, tell
from benchmarks.verdict import goals_table

ROWS = {
    row.name: row
    for row in (
        *engine_rows.rows(),
        *http_rows.rows(),
        *server_rows.rows(),
        *training_rows.rows(),
        *jobs_rows.rows(),
    )
}
"""All rows, by name."""


def main(arguments: Sequence[str]) -> None:
    """Measure, print the table and one line of JSON, and keep all of it where that is asked."""
    options = _options().parse_args(arguments)
    began = datetime.now(UTC)
    founds = _read(options.points, options.rows) if options.points else _measure(options)
    verdicts = [verdict for found in founds for verdict in found.verdicts()]
    record = Record(
        "growth",
        command_of("growth", arguments),
        this_machine(),
        [
            "Exponent of the medians over rounds (Theil-Sen), with a 95 % interval from drawing "
            "rounds again; `rise` is that of what the cost rises above the smallest size's",
            *(["**A smoke run: these figures mean nothing**"] if options.quick else []),
        ],
        [goals_table("Exponents", verdicts), _units(founds)],
        {"verdicts": [asdict(verdict) for verdict in verdicts]},
        began,
    )
    record.show(write=False)
    if options.write or options.folder:
        path = record.write(options.folder or RESULTS)
        path.with_suffix(".jsonl").write_bytes(_lines(founds))
        draw(founds, path.with_suffix(".svg"))
        tell(f"written to {path.name}, with its points (.jsonl) and its figure (.svg)")


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    add = options.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which; all")
    add("--rounds", type=int, help="how many; without it each row's own number, 3 to 7")
    add("--quick", action="store_true", help="a smoke run: one round of the two smallest sizes")
    add("--write", action="store_true", help="keep the outcome in benchmarks/results")
    add("--folder", type=Path, help="keep it there instead")
    add("--points", type=Path, help="measure nothing; read what an earlier run kept (.jsonl)")
    return options


def _measure(options: argparse.Namespace) -> list[Found]:
    founds = []
    for name in options.rows:
        row: Row = ROWS[name]
        sizes = row.sizes[:2] if options.quick else row.sizes
        num_rounds = options.rounds or (1 if options.quick else row.num_rounds)
        tell(f"{name}: {row.size}, {num_rounds} rounds")
        # what a killed server left behind may still be writing there
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            founds.append(Found(row, row.measure(Path(folder), num_rounds, sizes)))
        for verdict in founds[-1].verdicts():
            tell(f"  {verdict.what}: {verdict.measured}, {verdict.goal}: {verdict.state}")
    return founds


def _read(path: Path, names: Sequence[str]) -> list[Found]:
    points = [json.loads(line) for line in path.read_text().splitlines()]
    kept = {name: [point for point in points if point["row"] == name] for name in names}
    return [found_in(ROWS[name], own) for name, own in kept.items() if own]


def _lines(founds: Sequence[Found]) -> bytes:
    points = [point for found in founds for point in found.points()]
    return b"".join(orjson.dumps(point) + b"\n" for point in points)


def _units(founds: Sequence[Found]) -> Table:
    rows = [("cost", "at the smallest", "at the largest", "of one more")]
    for found in founds:
        for curve in found.row.curves:
            costs = found.medians(curve)
            ends = (
                f"{cost:.4g} at {size:,}"
                for cost, size in zip(
                    (costs[0], costs[-1]), (found.sizes[0], found.sizes[-1]), strict=True
                )
            )
            unit = f"{found.exponent(curve).unit:.3g}"
            rows.append((f"{found.row.name}: {curve.what}", *ends, unit))
    return Table("Costs", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
