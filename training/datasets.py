"""Datasets, from a name, a path or Python: read, checked, fingerprinted, split and preprocessed.

What fits the memory budget is read once into one tensor; the rest is checked now and streamed
later. Either way every fault is known before training begins.
"""

from collections.abc import Container, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.device import thread_count
from models.preprocessing import Preprocessing
from training import builtin
from training.arrays import read_npz
from training.config import DataConfig
from training.dataset_store import is_stored
from training.faults import DatasetFaults, DatasetUnavailable
from training.folder import read_folder
from training.items import Items
from training.normalisation import draft_preprocessing, normalised
from training.picture_files import PictureFiles
from training.progress import Progress
from training.reading import Reading
from training.samples import Look
from training.source import (
    TEST,
    TRAIN,
    VALIDATION,
    Part,
    Source,
    class_names,
    plain_labels,
    targets_of,
)
from training.split import hold_out
from training.stored import read_stored
from training.table import read_csv


@dataclass(frozen=True)
class Dataset:
    """Samples that are ready to be learned.

    Attributes:
        name: what a person calls it.
        classes: names in the order of the targets.
        preprocessing: brings a picture or numbers to what the network takes; the samples have
            its picture steps behind them.
        parts: `train`, and `validation` and `test` where there are any.
        fingerprint: hex sha256 over the sources of all samples and their labels; the same
            whatever the split and the preprocessing.
        notes: what a person should know, such as files that were skipped.
        num_workers: processes that read what is streamed.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    parts: Mapping[str, Part]
    fingerprint: str
    notes: tuple[str, ...] = ()
    num_workers: int = 0

    @property
    def train(self) -> Part:
        """What is learned from."""
        return self.parts[TRAIN]

    @property
    def validation(self) -> Part | None:
        """What the best weights are chosen by."""
        return self.parts.get(VALIDATION)

    @property
    def test(self) -> Part | None:
        """What the final figure is measured on."""
        return self.parts.get(TEST)

    @property
    def measured_on(self) -> str:
        """The part that figures come from: `test`, else `validation`, else `train`."""
        return measured_on(self.parts)


def open_dataset(
    config: DataConfig, preprocessing: Preprocessing | None = None, pairs: Any = None
) -> Generator[Progress, None, Dataset]:
    """Open the dataset that `config` names, or the one made of `pairs`.

    Args:
        config: names, split, memory budget.
        preprocessing: of the model that will see the samples; made to fit them if None.
        pairs: a list of `(x, y)` or a `torch.utils.data.Dataset`: Pillow images, arrays or
            tensors with whole numbers or texts.

    Yields:
        Samples read so far, in the phase `read`.

    Raises:
        DatasetUnavailable: there is no such dataset.
        DatasetFaults: everything that is wrong with it, with names.
    """
    source = read_source(config) if pairs is None else source_of_pairs(pairs)
    return (yield from open_source(source, config, preprocessing))


def open_source(
    source: Source, config: DataConfig, preprocessing: Preprocessing | None = None
) -> Generator[Progress, None, Dataset]:
    """What a reader found, read, checked, split and preprocessed; see `open_dataset`."""
    if len(source.classes) < 2:
        raise DatasetFaults(source.name, [f"all labels are {source.classes[0]!r}; two are needed"])
    look = source.parts[TRAIN].samples.look()
    if preprocessing is not None and preprocessing.accepts_pictures:
        _refuse_rows(source.name, look)
    steps = preprocessing or draft_preprocessing(look, config.picture_size)
    parts = {
        name: Part(part.samples.prepared(steps), part.targets)
        for name, part in source.parts.items()
    }
    num_workers = _num_workers(config, parts[TRAIN])
    budget_bytes = config.memory_budget_mb << 20
    reading = Reading(source.name, parts, steps.raw_shape, budget_bytes, num_workers)
    yield from reading.run()
    held = _held_out(reading.parts, config)
    return Dataset(
        name=source.name,
        classes=source.classes,
        preprocessing=preprocessing or normalised(steps, held[TRAIN].samples),
        parts=held,
        fingerprint=reading.fingerprint(source.classes),
        notes=source.notes,
        num_workers=num_workers,
    )


def _refuse_rows(name: str, look: Look) -> None:
    if not look.pictures and len(look.shape) < 2:
        raise DatasetFaults(name, ["it holds rows of numbers, and the model takes pictures"])


def split_by(dataset: Dataset, config: DataConfig) -> Dataset:
    """`dataset`, opened with nothing held out, split as `config` says."""
    return replace(dataset, parts=_held_out(dataset.parts, config))


def split_source(config: DataConfig) -> Source:
    """The dataset that `config` names with its parts held out; nothing is decoded yet.

    The parts are those of `open_dataset`. Raises as it does, faults inside files aside.
    """
    source = read_source(config)
    return replace(source, parts=_held_out(source.parts, config))


def measured_on(parts: Container[str]) -> str:
    """The part that figures come from: `test`, else `validation`, else `train`."""
    return next(name for name in (TEST, VALIDATION, TRAIN) if name in parts)


def read_source(config: DataConfig) -> Source:
    """The dataset that `config` names, before any preprocessing; raises as `open_dataset`."""
    name, path = config.dataset, Path(config.dataset)
    if name in builtin.NAMES:
        return builtin.read_builtin(name, Path(config.data_root))
    if path.is_dir():
        return read_stored(path) if is_stored(path) else read_folder(path)
    if path.is_file() and path.suffix.lower() == ".csv":
        return read_csv(path, config.label_column)
    if path.is_file() and path.suffix.lower() == ".npz":
        return read_npz(path)
    known = ", ".join(builtin.NAMES)
    raise DatasetUnavailable(f"{name!r} is neither one of {known} nor a folder, CSV or NPZ file")


def source_of_pairs(pairs: Any) -> Source:
    """`(x, y)` pairs as a dataset; raises as `open_dataset`."""
    labels = plain_labels([pairs[index][1] for index in range(len(pairs))])
    if not labels:
        raise DatasetFaults("of pairs", ["there are no pairs"])
    classes = class_names(labels)
    samples = Items(pairs, tuple(range(len(labels))))
    return Source("pairs", classes, {TRAIN: Part(samples, targets_of(labels, classes))})


def _num_workers(config: DataConfig, part: Part) -> int:
    """Files are decoded in parallel; a process of its own would not pay for anything else."""
    if config.num_workers is not None:
        return config.num_workers
    return thread_count() if isinstance(part.samples, PictureFiles) else 0


def _held_out(parts: Mapping[str, Part], config: DataConfig) -> dict[str, Part]:
    """With a test and a validation part where `config` wants them and the source has none.

    A source with a validation part and no test part stays so: its maker chose.
    """
    held = dict(parts)
    if TEST not in held and VALIDATION not in held and config.test_fraction:
        _hold_out(held, TEST, config.test_fraction, config.split_seed)
    if VALIDATION not in held and config.validation_fraction:
        _hold_out(held, VALIDATION, config.validation_fraction, config.split_seed)
    return held


def _hold_out(parts: dict[str, Part], name: str, fraction: float, seed: int) -> None:
    train = parts[TRAIN]
    kept, chosen = hold_out(train.targets, fraction, seed, name)
    if len(chosen):
        parts[TRAIN], parts[name] = train.select(kept), train.select(chosen)
