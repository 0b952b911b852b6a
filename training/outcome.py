"""How a run of fine-tuning ended, and what is told of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from training.answers import FILE, Answers
from training.certainty import certainty
from training.methods import CROSS_VALIDATION, GIVEN
from training.resolution import Choice
from training.source import TRAIN, VALIDATION
from training.train import Trained

OUT_OF_FOLD: Final = "out-of-fold"
"""What figures are called that come from folds."""


@dataclass(frozen=True)
class FineTuned:
    """How a run ended.

    Attributes:
        trained: the network and what a checkpoint should say of it.
        choices: what every `auto` became, and why.
        answers: to samples that it, or its fold's network, did not learn from; None where there
            are none.
        validation: how the figures came about, how sure they are and what chose the weights, in
            words.
        notes: what else a person should know.
    """

    trained: Trained
    choices: Mapping[str, Choice]
    answers: Answers | None
    validation: str
    notes: tuple[str, ...]

    @property
    def out_of_fold(self) -> Answers | None:
        """The answers, if they are those of folds."""
        return self.answers if self.trained.measured_on == OUT_OF_FOLD else None


def summary(done: FineTuned) -> dict[str, Any]:
    """What is told of it as JSON, without the version."""
    trained = done.trained
    return {
        "method": trained.method,
        "base": trained.config.model_dump().get("base"),
        "parent": trained.parent,
        "metrics": trained.report.figures(),
        "interval": list(trained.report.accuracy_interval),
        "report": trained.report.to_json(),
        "measured_on": trained.measured_on,
        "validation": done.validation,
        "resolved": {name: choice.to_json() for name, choice in done.choices.items()},
        "hyperparameters": trained.config.model_dump(mode="json").get("hyperparameters"),
        "history": [asdict(epoch) for epoch in trained.fitted.history],
        "best": asdict(trained.fitted.best),
        "answers": FILE if done.answers else None,
        "dataset": {
            "name": trained.dataset.name,
            "fingerprint": trained.dataset.fingerprint,
            "classes": list(trained.dataset.classes),
        },
        "environment": dict(trained.fitted.environment),
        "notes": list(done.notes),
        "seconds": trained.fitted.seconds,
    }


def how_measured(trained: Trained, settings: Any, answers: Answers) -> str:
    """How the figures came about, how sure they are, and what chose the weights."""
    sentences = [f"{certainty(trained.report)}; {_measured(trained, settings)}"]
    if num := answers.num_seen:
        sentences.append(
            f"{num} samples were left out, because the base had seen them"
            if answers.num_evidence
            else "The base had seen all of these samples before, so this flatters"
        )
    return ". ".join([*sentences, _chosen(trained, settings)]) + "."


def _measured(trained: Trained, settings: Any) -> str:
    if trained.measured_on == TRAIN:
        return "but it learned from these very samples, so this says little"
    if trained.measured_on == OUT_OF_FOLD:
        return (
            f"cross-validated in {settings.folds} stratified folds, each answered by a network "
            "that did not learn from it; the published one learned from all samples"
        )
    if settings.validation == GIVEN and trained.measured_on == VALIDATION:
        return "measured on the validation part, which also chose the weights, so this flatters"
    return f"measured on the {trained.measured_on} part, which it did not learn from"


def _chosen(trained: Trained, settings: Any) -> str:
    best, held = trained.fitted.best.epoch, trained.dataset.validation
    if held:
        return f"The weights of epoch {best} were chosen by {len(held)} samples that were held out"
    if settings.validation == CROSS_VALIDATION and trained.measured_on != OUT_OF_FOLD:
        return (
            f"Epoch {best} was chosen by {settings.folds} folds of the training part, and the "
            "published network learned from all of it"
        )
    return f"The weights are those of the last epoch, {best}: nothing was chosen"
