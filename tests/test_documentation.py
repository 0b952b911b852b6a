"""What the documentation repeats from the code is up to date, and what it names exists."""

import json
import re
import subprocess
import sys
from pathlib import Path

from starlette.testclient import TestClient

ROOT = Path(__file__).resolve().parent.parent


def test_generated_pages_are_up_to_date() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr


def test_links_between_documents_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("models/*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
