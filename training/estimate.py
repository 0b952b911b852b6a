"""What a run would do, without doing it: choices, memory, time, and warnings on the dataset.

Opens the base, lists the dataset, reads a few samples and measures a step on random inputs.
Nothing is written and no sample is learned from.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import networks
from models.device import choose_device
from models.preprocessing import Preprocessing
from training.importing import noise
from training.ingredients import asked_backbone, asked_source, facts_of
from training.layout import laid_out, layout_of
from training.methods import (
    FINE_TUNE,
    FROM_SCRATCH,
    GIVEN,
    LINEAR_PROBE,
    NOTHING_HELD,
    SPLIT,
    FineTuneRequest,
)
from training.normalisation import draft_preprocessing
from training.resolution import Facts, resolve, resolved
from training.source import TRAIN, Part, Source
from training.train import spec_of

MEASURED_S = 2.0
"""After so long no further step is measured."""
SAMPLES_READ = 8
FEW = 20
SMALL_BATCH = 4


def dry_run(options: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """What `training.fine_tune.work` would do with the same options.

    Returns:
        JSON: `method`, `resolved`, `hyperparameters`, `num_samples`, `classes`, `memory_bytes`,
        `seconds_per_epoch` (over pictures), `backbone_seconds` (one pass for features),
        `seconds` (all of it, roughly), `measured` (in words), `warnings`.

    Raises:
        What `work` raises before it reads the dataset.
    """
    request = FineTuneRequest.of(**options)
    backbone = asked_backbone(request, home)
    source = asked_source(request)
    facts = facts_of(source, backbone)
    choices = resolve(request.method, request.settings, facts)
    settings: Any = resolved(request.settings, choices)
    steps = backbone.preprocessing or draft_preprocessing(
        source.parts[TRAIN].samples.look(), request.picture_size
    )
    spec = (
        backbone.spec_for(len(source.classes))
        if backbone.state
        else spec_of(backbone.spec.name, steps, len(source.classes), source.name)
    )
    device = choose_device(request.compute.device)
    network = networks.build(spec.name, spec.options).to(device)
    network = network.to(memory_format=layout_of(network))
    cost = _Cost(network, steps, device)
    num, held = facts.num_samples, sum(map(len, source.parts.values())) - facts.num_samples
    reading = _reading_seconds(source.parts[TRAIN], steps) * (num + held)
    folds = settings.folds if settings.validation == "cross_validation" else 0
    passes = 0.0 if request.method == LINEAR_PROBE else float(settings.epochs)
    forward, step = cost.forward_seconds(), cost.step_seconds()
    features = 0.0 if request.method == FROM_SCRATCH else forward * (num + held)
    epoch = 0.0 if request.method == LINEAR_PROBE else step * num + forward * held
    batch = min(settings.batch_size, num) if request.method != LINEAR_PROBE else 16
    trains = request.method != LINEAR_PROBE
    return {
        "method": request.method,
        "resolved": {name: choice.to_json() for name, choice in choices.items()},
        "hyperparameters": settings.model_dump(mode="json"),
        "num_samples": num,
        "classes": list(source.classes),
        "memory_bytes": cost.memory_bytes(batch, trains=trains)
        + _resident(request, steps, num + held),
        "seconds_per_epoch": round(epoch, 3),
        "backbone_seconds": round(features, 3),
        "seconds": round(reading + features + epoch * passes * (1 + folds), 3),
        "measured": f"on {device}, with {torch.get_num_threads()} threads, by a few steps on noise "
        "while nothing else was held back; a busy machine takes longer",
        "warnings": [
            *source.notes,
            *backbone.notes,
            *_warnings(source, facts, settings, request.compute.num_processes),
        ],
    }


class _Cost:
    """Time and memory of one network, from steps on noise."""

    def __init__(self, network: nn.Module, steps: Preprocessing, device: torch.device) -> None:
        self._network, self._device = network, device
        x = steps.finish(noise(steps, SMALL_BATCH).to(device))
        self._x: Tensor = laid_out(x, layout_of(network))

    def forward_seconds(self) -> float:
        """For one sample, in a batch of a few."""
        self._network.eval()

        def forward() -> None:
            with torch.no_grad():
                self._network(self._x)

        return self._seconds(forward)

    def step_seconds(self) -> float:
        """Forward and backward for one sample."""
        self._network.train()
        targets = torch.zeros(len(self._x), dtype=torch.int64, device=self._device)

        def step() -> None:
            F.cross_entropy(self._network(self._x), targets).backward()  # type: ignore[no-untyped-call]

        return self._seconds(step)

    def memory_bytes(self, batch_size: int, *, trains: bool) -> int:
        """Weights; where they learn, their gradients, two momenta, and what backward needs."""
        weights = sum(int(one.nbytes) for one in self._network.state_dict().values())
        if not trains:
            return weights + self._x[:1].numel() * 4 * batch_size * 8
        saved = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._network(self._x)
        return weights * 4 + saved * batch_size // len(self._x)

    def _seconds(self, run: Any) -> float:
        run()  # the first time, memory and kernels are made ready
        begun, num = time.perf_counter(), 0
        while num < 3 and time.perf_counter() - begun < MEASURED_S:
            run()
            num += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return (time.perf_counter() - begun) / num / len(self._x)


def _reading_seconds(part: Part, steps: Preprocessing) -> float:
    """To read and decode one sample; what cannot be read is the run's to complain about."""
    samples, begun = part.samples.prepared(steps), time.perf_counter()
    num = min(SAMPLES_READ, len(samples))
    for index in range(num):
        try:
            samples.read(index)
        except (ValueError, OSError):
            continue
    return (time.perf_counter() - begun) / num


def _resident(request: FineTuneRequest, steps: Preprocessing, num_samples: int) -> int:
    size = 1 if steps.accepts_pictures else 4
    total: int = num_samples * math.prod(steps.raw_shape) * size
    return total if total <= request.compute.memory_budget_mb << 20 else 0


def _warnings(source: Source, facts: Facts, settings: Any, num_processes: int) -> list[str]:
    few = [
        f"{name} has {count} samples"
        for name, count in zip(source.classes, facts.counts, strict=True)
        if count < FEW
    ]
    found = [f"below {FEW} samples a class is hardly learned: {', '.join(few[:10])}"] if few else []
    if num_processes > 1:
        found.append(f"measured for one process; {num_processes} share each step of all layers")
    if settings.early_stopping and settings.validation not in (SPLIT, GIVEN):
        found.append("early_stopping needs samples held out by a split; every epoch is run")
    if settings.validation == NOTHING_HELD and not facts.given:
        found.append("nothing is held out, so nothing will say how good the result is")
    if hasattr(settings, "layer_factor") and settings.validation == "cross_validation":
        found.append(
            f"{FINE_TUNE} with cross-validation trains {settings.folds + 1} times; "
            "validation=split trains once"
        )
    return found
