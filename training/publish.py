"""What was trained becomes a version in the model store, with where it comes from."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import checkpoint
from models.checkpoint import MAX_GOLDEN_SAMPLES
from models.manifest import Lineage, Manifest
from models.seen import Seen, read_seen, short_digests
from models.store import ModelStore, StoreError, Version
from training.agreement import agreement
from training.source import TRAIN, VALIDATION
from training.train import Trained


def publish(
    trained: Trained,
    store: ModelStore,
    name: str,
    *,
    run: str | None = None,
    by: str = "local",
    is_gated: bool = False,
) -> Version:
    """Publish `trained` as the next version of the model `name`.

    Args:
        trained: from `training.train` or `training.transfer`.
        store: where.
        name: of the model.
        run: what made it; publishing it again gives the version that is already there.
        by: who, for the alias's history.
        is_gated: a gate decides on `production`, also on a model's first version.

    Raises:
        models.store.StoreError: the store refuses.
    """
    manifest, golden = manifest_of(trained, run), golden_inputs(trained)
    if agreement := agreement_of(trained):
        metrics = {**manifest.metrics, "agreement": agreement}
        manifest = manifest.model_copy(update={"metrics": metrics})
    seen = seen_by(trained).with_parent(_seen_by_parent(trained.parent, store))

    def write(folder: Path) -> None:
        checkpoint.save(folder, trained.network, manifest, golden, seen)

    return store.publish(name, write, run=run, by=by, is_gated=is_gated)


def manifest_of(trained: Trained, run: str | None = None) -> Manifest:
    """Network, preprocessing, labels, figures and lineage."""
    dataset, best = trained.dataset, trained.fitted.best
    metrics: dict[str, Any] = {
        **trained.report.figures(),
        "accuracy_interval": list(trained.report.accuracy_interval),
        "measured_on": trained.measured_on or dataset.measured_on,
        "best_epoch": best.epoch,
        "best_step": best.step,
        "training_seconds": round(trained.fitted.seconds, 3),
    }
    config = trained.config.model_dump(mode="json")
    lineage = Lineage(
        parent=trained.parent,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        method=trained.method,
        options=config,
        seed=config.get("seed"),
        run=run,
        environment=dict(trained.fitted.environment),
    )
    return Manifest(
        network=trained.spec,
        preprocessing=dataset.preprocessing,
        labels=dataset.classes,
        metrics=metrics,
        lineage=lineage,
    )


def seen_by(trained: Trained) -> Seen:
    """The samples that the weights were learned from and chosen by."""
    parts = trained.dataset.parts
    none = short_digests([])
    validation = parts[VALIDATION].source_digests() if VALIDATION in parts else none
    return Seen.of(parts[TRAIN].source_digests(), validation)


def agreement_of(trained: Trained) -> dict[str, Any]:
    """How often other precisions give held-out samples the class that fp32 gives them."""
    dataset = trained.dataset
    if dataset.measured_on == TRAIN:
        return {}
    part, finish = dataset.parts[dataset.measured_on], dataset.preprocessing.finish
    return agreement(trained.network, part, finish)


def golden_inputs(trained: Trained) -> Tensor:
    """Samples spread over the validation part (or the training part), before `finish`."""
    parts = trained.dataset.parts
    samples = parts.get(VALIDATION, parts[TRAIN]).samples
    stride = max(1, len(samples) // MAX_GOLDEN_SAMPLES)
    indices = range(0, len(samples), stride)[:MAX_GOLDEN_SAMPLES]
    return torch.stack([samples.read(index)[0] for index in indices])


def _seen_by_parent(parent: str | None, store: ModelStore) -> Seen:
    """Nothing, where the weights did not begin as those of a version in this store."""
    if parent is None or ":" not in parent:
        return Seen()
    try:
        version = store.resolve(parent)
    except StoreError:
        return Seen()
    return read_seen(version.folder, version.manifest().files)


def with_temperature(
    store: ModelStore,
    version: Version,
    temperature: float,
    *,
    source: str,
    dataset: str,
    by: str = "local",
) -> Version:
    """Publish the same weights as a new version whose probabilities are softened or sharpened.

    Args:
        store: where.
        version: whose weights, golden inputs and list of seen samples are taken over.
        temperature: the network's own logits are divided by it.
        source: what fitted it, such as the id of an evaluation.
        dataset: on which samples.
        by: who, for the alias's history.

    Raises:
        models.store.StoreError: the store refuses.
        models.checkpoint.CheckpointError: the version cannot be read.
    """
    manifest = version.manifest()
    lineage = manifest.lineage.model_copy(
        update={
            "parent": str(version),
            "method": "calibrate",
            "options": {**manifest.lineage.options, "calibrated_on": dataset, "source": source},
            "run": None,
        }
    )
    changed = manifest.model_copy(
        update={"temperature": temperature, "lineage": lineage, "created": datetime.now(UTC)}
    )

    def write(folder: Path) -> None:
        for name in manifest.files:
            shutil.copyfile(version.folder / name, folder / name)
        checkpoint.seal(folder, changed)

    return store.publish(version.name, write, by=by)
