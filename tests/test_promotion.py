"""The gate: an alias moves when the rule holds, and only then; a move of others is never lost."""

import time

import pytest
from conftest import publish_cnn
from pydantic import ValidationError
from test_evaluation import digits, engine, trained_store

from app.errors import NotPromoted
from app.evaluation.evaluator import Evaluator
from app.evaluation.rule import Rule
from app.main import Engine
from app.promotion import Promotion, Proposal, promote
from models.store import AliasMoved

__all__ = ["engine", "trained_store"]
pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def untrained_in_production(engine: Engine) -> None:
    if engine.store.aliases("digits")["production"] != 1:
        engine.store.move_alias("digits", "production", 1)


async def promoted(engine: Engine, version: int = 2, watch=lambda _: None, **rule) -> Promotion:
    proposal = Proposal("digits", "production", version, Rule(**rule), digits(), "ada", "test")
    evaluator = Evaluator(engine.live, 1)
    return await promote(proposal, evaluator, engine.store, time.monotonic() + 60, watch)


async def test_a_better_version_takes_the_alias_and_leaves_evidence(engine: Engine) -> None:
    found = await promoted(engine, threshold=0.9, min_absolute_change=0.1, max_p_value=0.01)
    assert (found.promoted, found.previous) == (True, 1)
    move = engine.store.history("digits", "production")[-1]
    assert (move.to, move.previous, move.by) == (2, 1, "ada")
    assert move.evidence["candidate"]["accuracy"] > 0.9 > move.evidence["holder"]["accuracy"]
    assert [one["holds"] for one in move.evidence["checks"]] == [True] * 3
    assert move.why.startswith("promoted: accuracy")


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        ({"threshold": 1.0}, "threshold: accuracy"),
        ({"min_absolute_change": 1.0}, "is +0."),
        ({"min_relative_change": 50.0}, "min_relative_change"),
        ({"min_class_recall": 1.0}, "recall of"),
        ({"max_calibration_error": 0.0}, "calibration error"),
        ({"max_latency_ms": 1e-6}, "milliseconds"),
        ({"max_latency_ratio": 1e-6}, "ms for one input against"),
    ],
)
async def test_a_rule_that_fails_moves_nothing_and_says_both_figures(
    engine: Engine, rule: dict[str, float], word: str
) -> None:
    before = engine.store.history("digits")
    found = await promoted(engine, **rule)
    assert not found.promoted
    assert word in found.sentence
    assert engine.store.history("digits") == before
    assert found.evaluation is not None


async def test_a_worse_version_loses_classes(engine: Engine) -> None:
    engine.store.move_alias("digits", "production", 2)
    found = await promoted(engine, version=1, max_class_drop=0.05, max_p_value=0.05)
    assert [one.rule for one in found.checks if not one.holds] == ["max_p_value", "max_class_drop"]
    assert "against" in found.checks[0].sentence


async def test_one_failed_part_is_enough_and_all_parts_are_told(engine: Engine) -> None:
    found = await promoted(engine, threshold=0.5, max_calibration_error=0.0)
    assert [(one.rule, one.holds) for one in found.checks] == [
        ("threshold", True),
        ("max_calibration_error", False),
    ]


async def test_a_move_of_somebody_else_is_never_overwritten(engine: Engine) -> None:
    def somebody(_: object) -> None:
        if engine.store.aliases("digits")["production"] == 1:
            engine.store.move_alias("digits", "production", 2, by="somebody")

    third = publish_cnn(engine.store, "digits", seed=9).number
    with pytest.raises(AliasMoved, match="holds 2, not 1"):
        await promoted(engine, version=third, watch=somebody, threshold=0.0)
    assert engine.store.history("digits")[-1].by == "somebody"


async def test_without_a_holder_only_the_candidate_is_judged(engine: Engine) -> None:
    proposal = Proposal(
        *("digits", "fresh", 2, Rule(threshold=0.5, min_absolute_change=0.5)),
        *(digits(), "ada", "test"),
    )
    found = await promote(proposal, Evaluator(engine.live, 1), engine.store, time.monotonic() + 60)
    assert (found.promoted, found.previous) == (True, None)
    assert [one.rule for one in found.checks] == ["threshold"]
    engine.store.move_alias("digits", "fresh", None)


async def test_samples_that_were_seen_are_no_evidence(engine: Engine) -> None:
    proposal = Proposal(
        *("digits", "production", 2, Rule(threshold=0.0)),
        *(digits(part="validation"), "ada", "test"),
    )
    found = await promote(proposal, Evaluator(engine.live, 1), engine.store, time.monotonic() + 60)
    assert not found.promoted
    assert "there is no evidence: all 160 samples" in found.sentence


async def test_what_is_held_already_is_not_promoted(engine: Engine) -> None:
    with pytest.raises(NotPromoted):
        await promoted(engine, version=1, threshold=0.0)


async def test_an_empty_rule_is_no_rule() -> None:
    with pytest.raises(ValidationError, match="must ask for something"):
        Rule()
