"""Verdicts: a goal is met only where the whole interval keeps it; records read as text and JSON."""

import json
import math

from benchmarks.machine import this_machine
from benchmarks.record import Record, Table, aligned
from benchmarks.rounds import Cell, Round, ratio
from benchmarks.verdict import at_least, at_most, cells_table, none_of


def rounds_of(*rates: float) -> list[Round]:
    return [
        Round({"ours": {"rate_per_s": rate, "faults": 0.0}, "limit": {"rate_per_s": 1.0}}, 0.0, 1.0)
        for rate in rates
    ]


OVER = ratio("ours", "limit", "rate_per_s")


def test_met_open_and_missed() -> None:
    rounds = rounds_of(0.8, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4)
    assert at_least("rate", rounds, OVER, 0.5).state == "met"
    assert at_least("rate", rounds, OVER, 1.1).state == "open"
    assert at_least("rate", rounds, OVER, 2.0).state == "missed"
    assert at_most("rate", rounds, OVER, 2.0).state == "met"
    assert at_most("rate", rounds, OVER, 1.1).state == "open"
    assert at_most("rate", rounds, OVER, 0.5).state == "missed"


def test_what_could_not_be_measured_is_missed() -> None:
    rounds = rounds_of(math.nan, math.nan, math.nan)
    assert at_least("rate", rounds, OVER, 0.5).state == "missed"
    assert at_most("rate", rounds, OVER, 0.5).state == "missed"


def test_one_fault_in_one_round_is_one_too_many() -> None:
    rounds = rounds_of(1.0, 1.0, 1.0)
    assert none_of("faults", rounds, "ours", ["faults"]).state == "met"
    bad = Round({"ours": {"rate_per_s": 1.0, "faults": 1.0}}, 0.0, 1.0)
    assert none_of("faults", [*rounds, bad], "ours", ["faults"]).state == "missed"


def test_cells_are_told_by_their_medians() -> None:
    table = cells_table("cells", [Cell("ours", dict)], rounds_of(1.0, 5.0, 2.0))
    assert table.rows[1][:2] == ("ours", "2")
    assert table.rows[1][-1] == "0"


def test_a_table_is_markdown() -> None:
    assert aligned([("a", "column"), ("value", "1")]) == (
        "| a     | column |\n| ----- | ------ |\n| value | 1      |"
    )


def test_a_record_is_one_line_of_json_without_nan() -> None:
    table = Table("t", [("a",), ("1",)])
    record = Record("story", "python", this_machine(), ["quickly"], [table], {"x": math.nan})
    assert json.loads(record.line())["x"] is None
    assert "- quickly" in str(record)
    assert "\n" not in record.line()
