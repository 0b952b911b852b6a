"""What `docs/evaluations.md` tells can be done as it stands, and every rule is in its table."""

import json
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from test_evaluations import client, trained_store

from app.evaluation.rule import Rule

__all__ = ["client", "trained_store"]
TEXT = (Path(__file__).resolve().parent.parent / "docs" / "evaluations.md").read_text("utf-8")
COMMANDS = re.findall(r"http://127\.0\.0\.1:8000(\S+) \\?\s+-d '([^']+)'", TEXT)


def test_there_are_three_examples() -> None:
    assert len(COMMANDS) == 3


@pytest.mark.parametrize(("path", "body"), COMMANDS)
def test_an_example_answers(client: TestClient, path: str, body: str) -> None:
    if "promote" in path and client.get("/v1/models/digits").json()["aliases"]["production"] == 2:
        pytest.skip("version 2 was promoted before")
    answer = client.post(path, json=json.loads(body))
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "succeeded"


def test_every_rule_is_described() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == set(Rule.model_fields)


@pytest.mark.parametrize("num_classes", [2, 10, 130])
def test_the_page_is_drawn_for_few_and_many_classes(num_classes: int) -> None:
    import torch

    from app.api.evaluation_page import bars, matrix, reliability
    from training.report import Counts

    counts = Counts(num_classes)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(num_classes, (900,), generator=generator)
    counts.update(torch.randn(900, num_classes, generator=generator), targets)
    report = counts.report([f"class {index}" for index in range(num_classes)]).to_json()
    shape = matrix(report)
    assert (shape["picture"] is None) == (num_classes <= 100)
    assert sum(cell["count"] for cell in shape["cells"]) == (900 if num_classes <= 100 else 0)
    assert len(bars(report["classes"])) == min(num_classes, 30)
    for bar in reliability(report["bins"]):
        assert 0 <= bar["y"] <= 320
        assert bar["y"] + bar["height"] == pytest.approx(320, abs=0.02)
