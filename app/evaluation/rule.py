"""What must hold for an alias to move, and whether it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.evaluation.answer import Evaluation
from training.comparison import Comparison
from training.report import Report

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Rule(BaseModel):
    """What must hold for an alias to move; everything that is given must hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: Share | None = Field(
        None, description="Accuracy of the candidate, at least.", examples=[0.9]
    )
    min_absolute_change: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None,
        description="Accuracy of the candidate minus that of the holder, at least, on the samples "
        "that both answered. Below zero allows a loss.",
        examples=[0.0],
    )
    min_relative_change: Annotated[float, Field(ge=-1, le=100)] | None = Field(
        None, description="The same as a share of the holder's accuracy."
    )
    max_class_drop: Share | None = Field(
        None, description="No class may lose more recall than this against the holder."
    )
    min_class_recall: Share | None = Field(
        None, description="No class may have less recall than this."
    )
    max_calibration_error: Share | None = Field(
        None, description="Expected calibration error of the candidate, at most."
    )
    max_latency_ms: Positive | None = Field(
        None, description="Median time on the device of one input alone, at most."
    )
    max_latency_ratio: Positive | None = Field(
        None, description="The same, as a multiple of the holder's."
    )
    max_p_value: Share | None = Field(
        None, description="McNemar's test against the holder, at most, and the candidate better."
    )

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("a rule must ask for something, such as min_absolute_change")
        return self


@dataclass(frozen=True, slots=True)
class Check:
    """One part of a rule.

    Attributes:
        rule: its name.
        wanted: the bound.
        candidate, holder: both figures; None where there is none.
        holds: whether it does.
        sentence: the same in words.
    """

    rule: str
    wanted: float
    candidate: float | None
    holder: float | None
    holds: bool
    sentence: str


def judge(rule: Rule, evaluation: Evaluation) -> Iterator[Check]:
    """Every part of `rule` that can be asked; without a holder, nothing is compared with it."""
    report = evaluation.report
    yield from _of_candidate(rule, report, evaluation)
    if len(evaluation.models) > 1:
        yield from _of_both(rule, evaluation)


def _of_candidate(rule: Rule, report: Report, evaluation: Evaluation) -> Iterator[Check]:
    occurring = [one for one in report.classes if one.support]
    worst = min(occurring, key=lambda one: one.recall)
    candidates = (
        ("threshold", rule.threshold, report.accuracy, "accuracy", True),
        ("min_class_recall", rule.min_class_recall, worst.recall, f"recall of {worst.label}", True),
        (
            *("max_calibration_error", rule.max_calibration_error),
            *(report.calibration_error, "calibration error", False),
        ),
        (
            *("max_latency_ms", rule.max_latency_ms),
            *(evaluation.speeds[0].alone_p50_ms, "milliseconds for one input", False),
        ),
    )
    for name, wanted, figure, what, is_least in candidates:
        if wanted is not None:
            holds = figure >= wanted if is_least else figure <= wanted
            yield Check(name, wanted, figure, None, holds, _one(what, figure, wanted, is_least))


def _of_both(rule: Rule, evaluation: Evaluation) -> Iterator[Check]:
    pair = evaluation.findings.comparison
    if pair is None:
        yield from _incomparable(rule)
    else:
        yield from _of_accuracy(rule, pair)
        if rule.max_class_drop is not None:
            yield _class_drop(rule.max_class_drop, evaluation)
    if rule.max_latency_ratio is not None:
        own_ms, other_ms = (one.alone_p50_ms for one in evaluation.speeds)
        wanted = rule.max_latency_ratio
        holds = own_ms <= wanted * other_ms
        sentence = f"{own_ms:.3g} ms for one input against {other_ms:.3g} ms, at most {wanted:g}x"
        yield Check("max_latency_ratio", wanted, own_ms, other_ms, holds, f"{sentence} wanted")


def _incomparable(rule: Rule) -> Iterator[Check]:
    sentence = "the two versions know no class of this dataset in common"
    for name in ("min_absolute_change", "min_relative_change", "max_class_drop", "max_p_value"):
        wanted: float | None = getattr(rule, name)
        if wanted is not None:
            yield Check(name, wanted, None, None, False, sentence)


def _of_accuracy(rule: Rule, pair: Comparison) -> Iterator[Check]:
    own, other = pair.accuracy, pair.other_accuracy
    if rule.min_absolute_change is not None:
        yield _change("min_absolute_change", rule.min_absolute_change, own, other, own - other)
    if rule.min_relative_change is not None:
        change = (own - other) / other if other else float(own > 0)
        yield _change("min_relative_change", rule.min_relative_change, own, other, change)
    if rule.max_p_value is not None:
        holds = pair.p_value <= rule.max_p_value and own > other
        sentence = (
            f"accuracy {own:.4f} against {other:.4f} with p = {pair.p_value:.3g}, better with at "
            f"most {rule.max_p_value:g} wanted"
        )
        yield Check("max_p_value", rule.max_p_value, own, other, holds, sentence)


def _change(name: str, wanted: float, own: float, other: float, change: float) -> Check:
    # Shares of whole numbers: what is equal on paper differs in the last bit here.
    holds = change >= wanted - 1e-12
    sentence = f"accuracy {own:.4f} against {other:.4f} is {change:+.4f}, {wanted:+g} wanted"
    return Check(name, wanted, own, other, holds, sentence)


def _class_drop(wanted: float, evaluation: Evaluation) -> Check:
    """The class that lost the most recall, among those that both know."""
    report, other = evaluation.findings.reports
    assert report is not None
    assert other is not None  # there is a comparison
    before = {one.label: one.recall for one in other.classes if one.support}
    drops = [(before[one.label] - one.recall, one) for one in report.classes if one.label in before]
    drop, worst = max(drops, key=lambda pair: pair[0])
    held = before[worst.label]
    sentence = (
        f"recall of {worst.label} {worst.recall:.4f} against {held:.4f}, "
        f"a drop of at most {wanted:g} wanted"
    )
    return Check("max_class_drop", wanted, worst.recall, held, drop <= wanted + 1e-12, sentence)


def _one(what: str, figure: float, wanted: float, is_least: bool) -> str:
    return f"{what} {figure:.4g}, at {'least' if is_least else 'most'} {wanted:g} wanted"
