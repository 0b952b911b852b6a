"""Answers of folds as evidence for a version that learned from every sample there is."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_evaluation import digits, engine, trained_store

from app.evaluation.evaluator import Evaluator
from app.evaluation.rule import Rule
from app.main import Engine
from app.promotion import Promotion, Proposal, promote
from training.answers import Answers, digest_rows
from training.datasets import split_source
from training.measure import as_trained

__all__ = ["engine", "trained_store"]
pytestmark = pytest.mark.anyio
JOB = "ftjob-0123456789abcdef01234567"


@pytest.fixture
def run(engine: Engine) -> Iterator[Path]:
    """The folder of the job that made version 2, which chose its weights by 160 samples."""
    if engine.store.aliases("digits")["production"] != 1:
        engine.store.move_alias("digits", "production", 1)
    folder = engine.store.folder.parent / "runs" / JOB
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    (folder / "answers.safetensors").unlink(missing_ok=True)


def answers_of(engine: Engine, num_wrong: int = 0) -> Answers:
    """Right answers to the 160 samples, but for the first few."""
    manifest = engine.store.version("digits", 2).manifest()
    part = split_source(as_trained(manifest, "digits")).parts["validation"]
    digests = tuple(part.samples.read(index)[1] for index in range(len(part)))
    logits = torch.nn.functional.one_hot(part.targets, 10).float() * 9
    logits[:num_wrong] = logits[:num_wrong].roll(1, 1)
    none = torch.zeros(len(part), dtype=torch.bool)
    return Answers(manifest.labels, digest_rows(digests), part.targets, logits, none)


async def promoted(engine: Engine, version: int = 2, alias: str = "production") -> Promotion:
    rule = Rule(threshold=0.9, min_absolute_change=0.1)
    question = replace(digits(part="validation"), run=JOB)
    proposal = Proposal("digits", alias, version, rule, question, "ada", JOB)
    evaluator = Evaluator(engine.live, 1)
    return await promote(proposal, evaluator, engine.store, time.monotonic() + 60)


async def test_what_folds_answered_is_compared_with_the_holder(engine: Engine, run: Path) -> None:
    answers_of(engine, num_wrong=3).save(run)
    done = await promoted(engine)
    assert done.promoted, done.sentence
    found = done.evaluation
    assert found is not None
    assert (found.num_out_of_fold, found.report.num_samples) == (160, 160)
    assert found.report.accuracy == pytest.approx(157 / 160)
    assert "Against digits:1, which has" in found.sentence
    assert "160 samples were answered out of fold" in found.to_json()["notes"][0]
    move = engine.store.history("digits", "production")[-1]
    assert (move.to, move.evidence["num_out_of_fold"]) == (2, 160)
    assert move.evidence["candidate"]["accuracy"] == pytest.approx(157 / 160)


async def test_what_the_base_had_seen_is_left_out_and_counted(engine: Engine, run: Path) -> None:
    answers = answers_of(engine, num_wrong=40)
    replace(answers, seen=torch.arange(160) < 40).save(run)
    done = await promoted(engine)
    assert done.promoted, done.sentence
    assert done.evaluation is not None
    assert done.evaluation.findings.num_left_out == 40
    assert done.evaluation.report.accuracy == 1.0


async def test_without_a_holder_the_figures_alone_decide(engine: Engine, run: Path) -> None:
    answers_of(engine, num_wrong=3).save(run)
    done = await promoted(engine, alias="fresh")
    assert (done.promoted, done.previous) == (True, None), done.sentence
    assert [one.rule for one in done.checks] == ["threshold"]
    engine.store.move_alias("digits", "fresh", None)


async def test_a_holder_that_saw_the_samples_leaves_none(engine: Engine, run: Path) -> None:
    engine.store.move_alias("digits", "production", 2)
    answers_of(engine).save(run)
    done = await promoted(engine, version=1)
    assert not done.promoted
    assert "there is no evidence: all 160 samples were left out" in done.sentence


async def test_answers_of_another_list_of_classes_are_not_used(engine: Engine, run: Path) -> None:
    replace(answers_of(engine), classes=tuple("9876543210")).save(run)
    assert "there is no evidence" in (await promoted(engine)).sentence
