"""Every benchmark runs in its smallest form and comes to a verdict; figures mean nothing here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.peers.__main__ import CACHE
from benchmarks.peers.peer import PEERS

pytestmark = pytest.mark.slow
QUICK = ("--quick", "--scenario", "P")
DEADLINE_S = 400.0


def told_by(name: str, *arguments: str) -> str:
    """What a benchmark prints, which must end well."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def states(told: str) -> dict[str, str]:
    """Goal -> its state, from the tables of verdicts."""
    rows = [line.strip("| \n").split("|") for line in told.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 4]
    return {what: state for what, _, _, state in cells if state in ("met", "open", "missed")}


@pytest.mark.parametrize("name", ["serve", "poisson", "beside"])
def test_of_a_server(name: str) -> None:
    found = states(told_by(name, *QUICK))
    assert any("p99" in what or "requests/s" in what for what in found)
    faults = {what: state for what, state in found.items() if what.startswith("faults")}
    assert faults
    assert set(faults.values()) == {"met"}, faults


def test_growth_keeps_points_a_table_and_a_figure(tmp_path: Path) -> None:
    rows = ("--rows", "jobs", "dataset", "json")
    found = states(told_by("growth", "--quick", *rows, "--folder", str(tmp_path)))
    assert {what.partition(":")[0] for what in found} == {
        "jobs stored",
        "samples of a dataset",
        "numbers in a JSON body",
    }
    (points,) = tmp_path.glob("*.jsonl")
    assert len(points.read_text().splitlines()) == 6
    assert next(tmp_path.glob("*.svg")).stat().st_size > 10_000
    again = told_by("growth", "--points", str(points))
    assert states(again) == found


def test_start_says_whether_its_goals_are_reached() -> None:
    told = told_by("start", "--rounds", "1")
    for row in (
        r"\| /livez, seconds +\| [0-9.]+ .* at most 0\.5 ",
        r"\| /readyz, seconds more than importing torch +\| -?[0-9.]+ .* at most 1\.5 ",
        r"\| the first prediction, seconds more than importing torch +\| -?[0-9.]+ .* at most 2 ",
    ):
        assert re.search(row, told), row


def test_a_peer_that_is_installed_is_measured() -> None:
    here = [peer.name for peer in PEERS if (peer.environment(CACHE).folder / "installed").is_file()]
    if not here:
        pytest.skip("no peer is installed; `python -m benchmarks.peers` does that")
    assert states(told_by("peers", *QUICK, "--only", here[0]))
