"""What a request names: its base and its dataset, and what choices depend on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.networks import is_built_in
from models.store import ModelStore
from training.backbone import Backbone, find_backbone
from training.config import DataConfig
from training.datasets import measured_on, read_source, source_of_pairs
from training.faults import DatasetFaults
from training.methods import FROM_SCRATCH, GIVEN, SPLIT, FineTuneRequest, Method
from training.resolution import Facts
from training.source import TEST, TRAIN, VALIDATION, Part, Source


def asked_backbone(request: FineTuneRequest, home: Path) -> Backbone:
    """The base that the request names; for fresh weights it may be a network alone."""
    is_name = is_built_in(request.base) and not ModelStore(home / "models").names().count(
        request.base
    )
    if request.method == FROM_SCRATCH and is_name:
        return Backbone.of_name(request.base)
    return find_backbone(request.base, home, request.weights)


def asked_source(request: FineTuneRequest, pairs: Any = None) -> Source:
    """The dataset, with the part of the other one that figures come from as its validation part."""
    if pairs is not None:
        return source_of_pairs(pairs)
    config = DataConfig.of(
        dataset=request.dataset, data_root=request.data_root, label_column=request.label_column
    )
    source = read_source(config)
    if request.validation_dataset is None:
        return source
    other = read_source(config.model_copy(update={"dataset": request.validation_dataset}))
    part = other.parts[measured_on(other.parts)]
    unknown = [name for name in other.classes if name not in source.classes]
    if unknown:
        fault = f"classes {', '.join(unknown[:10])} are not in the training dataset"
        raise DatasetFaults(other.name, [fault])
    positions = torch.tensor([source.classes.index(name) for name in other.classes])
    held = Part(part.samples, positions[part.targets])
    return replace(source, parts={**source.parts, VALIDATION: held})


def kept_apart(source: Source, settings: Method) -> Source:
    """The source whose own validation part is measured instead of choosing the weights."""
    if settings.validation == GIVEN:
        return source
    parts = dict(source.parts)
    given = parts.pop(VALIDATION, None)
    return replace(source, parts={TEST: given, **parts} if given else parts)


def data_config(request: FineTuneRequest, settings: Method) -> DataConfig:
    """Nothing is held out but by a split."""
    splits = settings.validation == SPLIT
    return DataConfig.of(
        dataset=request.dataset,
        picture_size=request.picture_size,
        validation_fraction=settings.validation_fraction if splits else 0.0,
        test_fraction=settings.test_fraction if splits else 0.0,
        split_seed=settings.split_seed,
        memory_budget_mb=request.compute.memory_budget_mb,
        num_workers=request.compute.num_workers,
    )


def facts_of(source: Source, backbone: Backbone) -> Facts:
    """What the choices depend on."""
    look = source.parts[TRAIN].samples.look()
    takes = backbone.preprocessing
    channels = look.shape[0] if look.pictures else 0
    if takes is not None:
        channels = takes.raw_shape[0] if takes.accepts_pictures else 0
    counts = source.parts[TRAIN].targets.bincount(minlength=len(source.classes))
    return Facts(
        tuple(counts.tolist()),
        channels,
        frozenset(source.parts) - {TRAIN},
        backbone.labels == source.classes,
    )
