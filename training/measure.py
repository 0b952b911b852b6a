"""A checkpoint measured on a dataset of any kind, by the names of its classes.

The model's own preprocessing is used, and the dataset's classes are found among its labels, so a
dataset may have fewer classes than the model, in any order. A dataset that the model learned from
is split as it was then, so that what is measured was never seen.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.manifest import Manifest
from training.config import DataConfig
from training.datasets import Dataset, open_dataset, split_by
from training.evaluate import evaluate
from training.feed import in_batches
from training.progress import Progress
from training.report import Report
from training.source import Part
from training.trial import ClassesUnknown, classes_unknown, positions

__all__ = ["ClassesUnknown", "Measured", "as_trained", "measure", "opened", "whole"]

BATCH = 64
_SPLIT = ("validation_fraction", "test_fraction", "split_seed")


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found.

    Attributes:
        report: the figures.
        dataset: its name.
        part: which of its parts was measured.
        where: the same for a person, with how the part came about.
        notes: what a person should know of the dataset, such as files that were skipped.
        sample: some of the samples, as preprocessing's `finish` takes them.
    """

    report: Report
    dataset: str
    part: str
    where: str
    notes: tuple[str, ...]
    sample: Tensor


def measure(
    network: nn.Module,
    manifest: Manifest,
    config: DataConfig,
    device: torch.device,
    part: str | None = None,
) -> Generator[Progress, None, Measured]:
    """Evaluate `network` on what `config` names.

    Args:
        network: in `eval()`; moved to `device`.
        manifest: says its preprocessing and labels.
        config: which dataset, and how it is split where it has no parts of its own; but one that
            the manifest's lineage knows by its fingerprint is split as in training.
        device: where to compute.
        part: `train`, `validation` or `test`; the one that figures come from if None.

    Raises:
        ClassesUnknown: the labels do not hold one of the dataset's classes.
        training.faults.DatasetError: the dataset cannot be used.
        training.report.ReportError: the answers cannot be counted.
    """
    dataset, is_known = yield from opened(manifest, config)
    name = part or dataset.measured_on
    measured = _relabelled(_part(dataset, name), dataset.classes, manifest.labels)
    network.to(device)
    temperature = manifest.temperature or 1.0

    def predict(inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(inputs.to(device))
        return logits.float() / temperature

    finish = manifest.preprocessing.finish
    batches = in_batches(measured, finish, BATCH, dataset.num_workers)
    report = yield from evaluate(predict, batches, manifest.labels, len(measured))
    notes = (*dataset.notes, *_doubts(dataset, manifest, is_known))
    where = _where(dataset, name, is_known)
    return Measured(report, dataset.name, name, where, notes, _some(measured))


def opened(
    manifest: Manifest, config: DataConfig
) -> Generator[Progress, None, tuple[Dataset, bool]]:
    """The dataset that `config` names, and whether it is the one that the model learned from.

    That one is split as it was then; any other one as `config` says. Raises as `open_dataset`.
    """
    undivided = config.model_copy(update={"validation_fraction": 0.0, "test_fraction": 0.0})
    dataset = yield from open_dataset(undivided, manifest.preprocessing)
    is_known = dataset.fingerprint == manifest.lineage.dataset_fingerprint
    return split_by(dataset, _as_in_training(manifest, config) if is_known else config), is_known


def whole(dataset: str, **options: object) -> DataConfig:
    """Settings under which nothing is held out of a dataset without parts: all of it is measured.

    Raises:
        training.config.ConfigError: an option is unknown or out of range.
    """
    return DataConfig.of(dataset=dataset, validation_fraction=0, test_fraction=0, **options)


def as_trained(manifest: Manifest, dataset: str, **options: object) -> DataConfig:
    """Settings of a built-in dataset under which the parts are those of the model's own training.

    Raises:
        training.config.ConfigError: an option is unknown or out of range.
    """
    trained = manifest.lineage.options if manifest.lineage.dataset == dataset else {}
    shares = {name: trained[name] for name in _SPLIT if name in trained}
    return DataConfig.of(dataset=dataset, **shares, **options)


def _as_in_training(manifest: Manifest, config: DataConfig) -> DataConfig:
    options = manifest.lineage.options
    return DataConfig.of(
        **{
            **config.model_dump(),
            **{name: options[name] for name in _SPLIT if name in options},
        }
    )


def _where(dataset: Dataset, part: str, is_known: bool) -> str:
    if is_known:
        return f"the {part} part of {dataset.name}, split as in its training"
    is_all = len(dataset.parts) == 1
    return f"all samples of {dataset.name}" if is_all else f"the {part} part of {dataset.name}"


def _doubts(dataset: Dataset, manifest: Manifest, is_known: bool) -> tuple[str, ...]:
    """A folder that has grown since is another dataset, and yet holds what was learned."""
    if is_known or dataset.name != manifest.lineage.dataset:
        return ()
    return (
        f"the model learned from a dataset that is called {dataset.name} too and held other "
        "samples; it may have seen some of these",
    )


def _part(dataset: Dataset, name: str) -> Part:
    if name not in dataset.parts:
        there = ", ".join(dataset.parts)
        raise ClassesUnknown(f"{dataset.name} has no part {name!r}; it has {there}")
    return dataset.parts[name]


def _relabelled(part: Part, classes: Sequence[str], labels: Sequence[str]) -> Part:
    """The part with targets that are positions in the model's labels."""
    known = positions(classes, labels)
    if bool((known < 0).any()):
        raise classes_unknown("the model", classes, labels)
    return Part(part.samples, known[part.targets])


def _some(part: Part, num: int = 16) -> Tensor:
    """Samples spread over the part, `[n, *raw_shape]`."""
    stride = max(1, len(part) // num)
    indices = range(0, len(part), stride)[:num]
    return torch.stack([part.samples.read(index)[0] for index in indices])
