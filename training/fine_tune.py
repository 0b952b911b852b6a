"""Fine-tuning whole: a base, a dataset and a method become a network with its evidence.

`fine_tune` is for Python and the command line; `work` is the same with plain JSON on either side,
for a process that does nothing else. Whatever happened before in the run's folder is gone on with:
features lie in the cache, each fold and each phase has snapshots of its own, and publishing one
run twice gives the same version.
"""

import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final

from models.store import ModelStore
from training.answers import Answers
from training.backbone import Backbone
from training.begun import as_begun
from training.datasets import measured_on, open_source
from training.fit import FitResult, never
from training.ingredients import (
    asked_backbone,
    asked_source,
    data_config,
    facts_of,
    kept_apart,
)
from training.learner import Learner
from training.methods import FROM_SCRATCH, FineTuneRequest
from training.outcome import OUT_OF_FOLD, FineTuned, how_measured, summary
from training.phases import Phases
from training.progress import Progress
from training.publish import publish
from training.ranks import Ranks, ranks_for
from training.resolution import Choice, resolve, resolved
from training.source import TRAIN
from training.train import Trained

RESULT: Final = "result.json"


def work(
    options: Mapping[str, Any],
    *,
    home: Path,
    folder: Path,
    run: str,
    by: str = "local",
    stop: Callable[[], bool] = never,
) -> Generator[Progress, None, dict[str, Any]]:
    """`fine_tune`, and the publication of its result.

    Args:
        options: fields of `training.methods.FineTuneRequest`, as JSON has them.
        home: the home folder: `models`, `weights` and `cache` are its own.
        folder: of this run; the same one after an interruption.
        run: its id, which the lineage names.
        by: who, for the history of aliases.
        stop: asked all the time; once it says yes, the run ends soon with the best it has.

    Returns:
        JSON: `version` (None where no name was given), `method`, `base`, `parent`, `metrics`,
        `report`, `measured_on`, `validation`, `resolved`, `hyperparameters`, `history`, `answers`
        (a file of the folder), `dataset`, `environment`, `notes`, `seconds`. Also in the folder,
        as `result.json`.

    Raises:
        What `fine_tune` raises; training.config.ConfigError; models.store_error.StoreError.
    """
    request = FineTuneRequest.of(**options)
    done = yield from fine_tune(request, home, folder, stop=stop)
    version = None
    if request.name is not None:
        yield Progress("publish", 0, 1)
        store = ModelStore(home / "models")
        version = str(publish(done.trained, store, request.name, run=run, by=by))
    text = json.dumps({"version": version, **summary(done)}, indent=1)
    (folder / RESULT).write_text(text + "\n")
    result: dict[str, Any] = json.loads(text)
    return result


def fine_tune(
    request: FineTuneRequest,
    home: Path,
    folder: Path,
    *,
    stop: Callable[[], bool] = never,
    on_resolved: Callable[[Mapping[str, Choice]], None] = lambda _: None,
    backbone: Backbone | None = None,
    pairs: Any = None,
    ranks: Ranks | None = None,
) -> Generator[Progress, None, FineTuned]:
    """Make what `request` asks for.

    Args:
        request: base, dataset, method and settings.
        home: where the store and the cache are.
        folder: of this run.
        stop: see `work`.
        on_resolved: told what every `auto` became, before anything is learned.
        backbone: the base itself, instead of its name.
        pairs: the dataset from Python, instead of its name.
        ranks: processes that share the steps of all layers; started as `request.compute` says
            where there are none. Features and the last layer alone are this process's.

    Yields:
        Phases `read`, `features`, `cross-validate`, `train`, `validate`, `epoch`, `evaluate`.

    Raises:
        training.backbone.BaseUnknown, RunMismatch, and what opening, features and fitting raise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_processes = request.compute.num_processes
    with as_begun(request, folder) as notes, ranks_for(num_processes, ranks) as shared:
        backbone = backbone or asked_backbone(request, home)
        source = asked_source(request, pairs)
        choices = resolve(request.method, request.settings, facts_of(source, backbone))
        on_resolved(choices)
        settings: Any = resolved(request.settings, choices)
        dataset = yield from open_source(
            kept_apart(source, settings), data_config(request, settings), backbone.preprocessing
        )
        learner = Learner(request, settings, backbone, dataset, home, stop, shared)
        phases = Phases(learner, dataset, folder)
        yield from phases.prepare()
        yield from phases.cross_validate()
        fitted = yield from phases.learn()
        answers = yield from phases.answers()
    shown = measured_on(source.parts)
    shown = dataset.measured_on if shown == TRAIN else shown
    shown = OUT_OF_FOLD if phases.out_of_fold else shown
    trained = _trained(phases, fitted, answers, shown)
    evidence = answers if shown != TRAIN else None
    if evidence:
        evidence.save(folder)
    said = (*backbone.notes, *dataset.notes, *fitted.notes, *learner.notes, *notes)
    return FineTuned(trained, choices, evidence, how_measured(trained, settings, answers), said)


def _trained(phases: Phases, fitted: FitResult, answers: Answers, shown: str) -> Trained:
    """The network with what a checkpoint should say of it."""
    learner, request = phases.learner, phases.learner.request
    hyperparameters = learner.settings.model_dump(mode="json")
    told = {
        "dataset": phases.dataset.name,
        "hyperparameters": hyperparameters,
        "weights": None,
    }
    return Trained(
        learner.spec,
        phases.network,
        phases.dataset,
        request.model_copy(update=told),
        fitted,
        answers.report(),
        request.method,
        learner.backbone.parent if request.method != FROM_SCRATCH else None,
        shown,
    )
