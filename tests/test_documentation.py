"""What the documentation repeats from the code is up to date, and what it names exists."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from benchmarks.peers.chart import draw, rates

ROOT = Path(__file__).resolve().parent.parent


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_chart_of_peers_shows_what_was_measured(tmp_path: Path) -> None:
    result = ROOT / "benchmarks" / "results" / "2026-11-28-0609-peers.md"
    found = rates(result.read_text())
    table = re.findall(r"^\| (?!faults)([\w ]+) 32 +\| (\S+)", result.read_text(), re.MULTILINE)
    assert {name: float(per_s) for name, per_s in table} == {
        name: pytest.approx(statistics.median(rounds), rel=0.01) for name, rounds in found.items()
    }
    draw(found, tmp_path / "peers.svg")
    assert (tmp_path / "peers.svg").read_text().count("</g>") > len(found)
    with pytest.raises(ValueError, match="no JSON"):
        rates("# peers")


def test_the_dashboard_asks_for_series_that_exist(client: TestClient, digit_png: bytes) -> None:
    client.post("/v1/models/digits/predict", files={"file": digit_png})
    exposed = client.get("/metrics").text
    panels = json.loads((ROOT / "docs" / "grafana.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"pytorchlib_\w+", target["expr"])
    }
    assert len(asked) >= 8
    for name in asked - {"pytorchlib_device_memory_bytes"}:  # a CPU has none to tell
        assert re.search(rf"^{name}\b", exposed, re.MULTILINE), f"nothing exposes {name}"
