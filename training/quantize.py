"""A version that computes with eight bits, made from a trained one by looking at samples.

Samples tell how large the numbers between the layers become; samples that were held out tell what
the rounding costs. The result is a version like any other.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import torch
from torch import Tensor, nn

from models import checkpoint
from models.checkpoint import Checkpoint
from models.manifest import Lineage, Manifest, NetworkSpec
from models.networks import INT8
from models.seen import Seen, read_seen, short_digests
from models.store import ModelStore, Version
from training.calibration import calibrated
from training.comparison import Comparison
from training.config import DataConfig
from training.datasets import Dataset
from training.feed import in_batches
from training.measure import opened
from training.progress import Progress
from training.report import Report, wilson_interval
from training.source import TRAIN, Part
from training.state import environment
from training.trial import Answered, Contender, Trial, run_trial

METHOD: Final = "quantize"
BATCH: Final = 32
NUM_SAMPLES: Final = 256
"""Samples that are looked at, where nothing else is said."""
HELD_OUT: Final = 0.5
"""Share to measure on, of a dataset without parts that the model did not learn from."""
LEAST_AGREEMENT: Final = 0.98
"""So large a share of the held-out samples must get the class that the parent gives them..."""
ENOUGH_SAMPLES: Final = 200
"""...where there are so many of them; fewer say too little."""


class QuantizationRefused(Exception):
    """There is no version with eight bits to be made, or none that answers well enough."""


@dataclass(frozen=True)
class Cost:
    """What eight bits cost, on samples that were held out.

    Attributes:
        report: of the version with eight bits.
        comparison: of it with its parent, the `other`.
        num_agreeing: samples that get the same class from both.
        where: which samples these are, for a person.
    """

    report: Report
    comparison: Comparison
    num_agreeing: int
    where: str

    @property
    def agreement(self) -> float:
        """Share of the samples that get the same class from both."""
        return self.num_agreeing / self.comparison.num_samples

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return wilson_interval(self.num_agreeing, self.comparison.num_samples)

    def figures(self) -> dict[str, Any]:
        """As the manifest keeps them."""
        return {
            "parent_accuracy": self.comparison.other_accuracy,
            "agreement": self.agreement,
            "agreement_interval": list(self.agreement_interval),
            "num_samples": self.comparison.num_samples,
        }


@dataclass(frozen=True)
class Quantized:
    """A network with eight bits, what it costs, and all that its checkpoint needs.

    Attributes:
        network: in `eval()`, on the CPU.
        golden_inputs: samples as preprocessing's `finish` takes them.
        seen: what its weights know, the samples that were looked at included.
    """

    network: nn.Module
    manifest: Manifest
    golden_inputs: Tensor
    seen: Seen
    cost: Cost


def quantize(
    version: Version, parent: Checkpoint, config: DataConfig, num_samples: int = NUM_SAMPLES
) -> Generator[Progress, None, Quantized]:
    """Make the form with eight bits of `version`, and measure it against `version` itself.

    Args:
        version: its folder holds the list of samples that it has seen.
        parent: loaded from it.
        config: which dataset. Samples of its training part are looked at; its test or validation
            part is measured.
        num_samples: to look at, spread over the training part.

    Raises:
        QuantizationRefused: it has eight bits already, nothing was held out, or the two do not
            agree on enough samples.
        models.int8_network.NotQuantizable: the network has no such form.
        training.faults.DatasetError: the dataset cannot be used.
        training.trial.ClassesUnknown: it has classes that the model does not know.
    """
    if parent.manifest.network.name.startswith(INT8):
        raise QuantizationRefused(f"{version} computes with eight bits already")
    dataset, _ = yield from opened(parent.manifest, config)
    if dataset.measured_on == TRAIN:
        raise QuantizationRefused(f"{dataset.name} holds nothing out that could be measured")
    looked_at = _spread(dataset.train, num_samples)
    inputs = (one for one, _ in _batches(parent.manifest, looked_at, dataset))
    network = yield from calibrated(parent.network, inputs, len(looked_at))
    cost = yield from _cost(version, network, parent, dataset)
    if len(dataset.parts[dataset.measured_on]) >= ENOUGH_SAMPLES:
        _require_agreement(version, cost)
    digests = looked_at.source_digests()
    seen = Seen.of(short_digests([]), digests).with_parent(
        read_seen(version.folder, parent.manifest.files)
    )
    manifest = _manifest(version, parent.manifest, dataset, len(looked_at), cost)
    return Quantized(network, manifest, _golden_inputs(parent, looked_at), seen, cost)


def publish(quantized: Quantized, store: ModelStore, name: str, by: str = "local") -> Version:
    """Publish as the next version of the model `name`; raises as `ModelStore.publish` does."""

    def write(folder: Any) -> None:
        checkpoint.save(
            folder,
            quantized.network,
            quantized.manifest,
            quantized.golden_inputs,
            quantized.seen,
        )

    return store.publish(name, write, why="quantized", by=by)


def _cost(
    version: Version, network: nn.Module, parent: Checkpoint, dataset: Dataset
) -> Generator[Progress, None, Cost]:
    manifest, part = parent.manifest, dataset.parts[dataset.measured_on]
    contenders = [Contender(name, manifest.labels) for name in (f"{version} in int8", str(version))]
    trial = Trial(contenders, dataset.classes, leave_out_seen=False)
    networks = (network, parent.network)
    num_agreeing = 0

    def answers() -> Iterator[Answered]:
        nonlocal num_agreeing
        done = 0
        for inputs, targets in _batches(manifest, part, dataset):
            with torch.inference_mode():
                small, whole = (one(inputs) / (manifest.temperature or 1.0) for one in networks)
            num_agreeing += int((small.argmax(1) == whole.argmax(1)).sum())
            yield Answered(torch.arange(done, done + len(targets)), targets, (small, whole))
            done += len(targets)

    findings = yield from run_trial(trial, answers(), len(part))
    report, comparison = findings.reports[0], findings.comparison
    assert report is not None
    assert comparison is not None
    where = f"the {dataset.measured_on} part of {dataset.name}"
    return Cost(report, comparison, num_agreeing, where)


def _require_agreement(version: Version, cost: Cost) -> None:
    if cost.agreement < LEAST_AGREEMENT:
        raise QuantizationRefused(
            f"with eight bits, {cost.agreement:.1%} of {cost.comparison.num_samples} samples get "
            f"the class that {version} gives them; {LEAST_AGREEMENT:.0%} are needed, so nothing "
            "was published"
        )


def _manifest(
    version: Version, parent: Manifest, dataset: Dataset, num_samples: int, cost: Cost
) -> Manifest:
    metrics: dict[str, Any] = {
        **cost.report.figures(),
        "accuracy_interval": list(cost.report.accuracy_interval),
        "measured_on": dataset.measured_on,
        "quantization": cost.figures(),
    }
    lineage = Lineage(
        parent=str(version),
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        method=METHOD,
        options={"num_calibration_samples": num_samples},
        environment=environment(),
    )
    return Manifest(
        network=NetworkSpec(name=INT8 + parent.network.name, options=parent.network.options),
        preprocessing=parent.preprocessing,
        labels=parent.labels,
        temperature=parent.temperature,
        metrics=metrics,
        lineage=lineage,
        created=datetime.now(UTC),
    )


def _batches(manifest: Manifest, part: Part, dataset: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
    return in_batches(part, manifest.preprocessing.finish, BATCH, dataset.num_workers)


def _spread(part: Part, num_samples: int) -> Part:
    """Some of the samples, spread over the part."""
    stride = max(1, len(part) // num_samples)
    return part.select(torch.arange(0, len(part), stride)[:num_samples])


def _golden_inputs(parent: Checkpoint, looked_at: Part) -> Tensor:
    """The parent's own, or else of the samples that were looked at."""
    if parent.golden is not None:
        return parent.golden.inputs
    first = range(min(len(looked_at), checkpoint.MAX_GOLDEN_SAMPLES))
    return torch.stack([looked_at.samples.read(index)[0] for index in first])
