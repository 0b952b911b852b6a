"""The gate: a candidate is evaluated against the holder of an alias, and the alias moves if the
rule holds. One function serves the route and the jobs that promote.
"""

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from app.errors import NotPromoted
from app.evaluation.answer import Evaluation
from app.evaluation.evaluator import Evaluator
from app.evaluation.question import Question
from app.evaluation.rule import Check, Rule, judge
from models.store import ModelStore
from training.progress import Progress
from training.trial import NoEvidence


@dataclass(frozen=True, slots=True)
class Proposal:
    """What is to be promoted.

    Attributes:
        name: of the model.
        alias: that would move.
        version: the candidate.
        rule: what must hold.
        question: on which samples; its model and the version to compare with are filled in.
        by: who asks, for the history.
        source: what made the evidence, such as the id of a job.
    """

    name: str
    alias: str
    version: int
    rule: Rule
    question: Question
    by: str
    source: str


@dataclass(frozen=True, slots=True)
class Promotion:
    """What came of it.

    Attributes:
        promoted: whether the alias moved.
        previous: the version that held it before.
        checks: every part of the rule.
        sentence: why it moved, or did not.
        evaluation: the evidence; None where there was none to be had.
    """

    proposal: Proposal
    promoted: bool
    previous: int | None
    checks: tuple[Check, ...]
    sentence: str
    evaluation: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the evaluation itself."""
        return {
            "model": self.proposal.name,
            "alias": self.proposal.alias,
            "version": self.proposal.version,
            "previous": self.previous,
            "promoted": self.promoted,
            "sentence": self.sentence,
            "rule": self.proposal.rule.model_dump(exclude_none=True),
            "checks": [asdict(one) for one in self.checks],
        }


async def promote(
    proposal: Proposal,
    evaluator: Evaluator,
    store: ModelStore,
    deadline: float,
    watch: Callable[[Progress], None] = lambda _: None,
) -> Promotion:
    """Evaluate both versions, and move the alias if the rule holds.

    Args:
        proposal: what is to be promoted.
        evaluator: of this server.
        store: where the alias is.
        deadline: of `time.monotonic`, in seconds.
        watch: as `Evaluator.evaluate` takes it.

    Raises:
        NotPromoted: there is nothing to move.
        models.store.AliasMoved: somebody else moved it meanwhile; nothing is changed.
        As `Evaluator.evaluate`, but for `NoEvidence`, which is a refusal.
    """
    name, alias, version = proposal.name, proposal.alias, proposal.version
    aliases = await asyncio.to_thread(store.aliases, name)
    previous = aliases.get(alias)
    if previous == version:
        raise NotPromoted(f"{name}@{alias} holds version {version} already")
    question = proposal.question.between(
        f"{name}:{version}", None if previous is None else f"{name}:{previous}"
    )
    try:
        evaluation = await evaluator.evaluate(question, deadline, watch)
    except NoEvidence as error:
        check = Check("evidence", 1, 0, None, False, f"there is no evidence: {error}")
        return Promotion(proposal, False, previous, (check,), _refusal(proposal, [check]), None)
    checks = tuple(judge(proposal.rule, evaluation))
    failed = [one for one in checks if not one.holds]
    if failed:
        sentence = _refusal(proposal, failed)
        return Promotion(proposal, False, previous, checks, sentence, evaluation)
    sentence = "; ".join(one.sentence for one in checks)
    await asyncio.to_thread(
        store.move_alias,
        name,
        alias,
        version,
        expected=previous,
        by=proposal.by,
        why=f"promoted: {sentence}"[:1000],
        evidence=_evidence(proposal, checks, evaluation),
    )
    return Promotion(proposal, True, previous, checks, sentence, evaluation)


def _refusal(proposal: Proposal, failed: list[Check]) -> str:
    reasons = "; ".join(f"{one.rule}: {one.sentence}" for one in failed)
    return (
        f"{proposal.name}@{proposal.alias} stays where it is, version {proposal.version} does not "
        f"meet the rule: {reasons}"
    )


def _evidence(
    proposal: Proposal, checks: tuple[Check, ...], evaluation: Evaluation
) -> dict[str, Any]:
    """What a history keeps: every figure, without lists of samples and classes."""
    pair = evaluation.findings.comparison
    sides = [
        {"model": name, "version": version, **(report.figures() if report else {})}
        for (name, version), report in zip(
            evaluation.models, evaluation.findings.reports, strict=True
        )
    ]
    return {
        "source": proposal.source,
        "rule": proposal.rule.model_dump(exclude_none=True),
        "checks": [asdict(one) for one in checks],
        "dataset": {"name": evaluation.dataset, "part": evaluation.part},
        "candidate": sides[0],
        "holder": sides[1] if len(sides) > 1 else None,
        "num_left_out": evaluation.findings.num_left_out,
        "num_out_of_fold": evaluation.num_out_of_fold,
        "num_gained": pair.num_gained if pair else None,
        "num_lost": pair.num_lost if pair else None,
        "p_value": pair.p_value if pair else None,
    }
