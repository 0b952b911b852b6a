"""What commands found, in lines for people."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the commands import these once they need them
    from models.manifest import Manifest
    from training.info import Info
    from training.measure import Measured
    from training.quantize import Quantized
    from training.report import Report

LABELS_SHOWN = 5
CLASSES_SHOWN = 20
PAIRS_SHOWN = 5


def of_import(manifest: "Manifest", notes: Sequence[str]) -> Iterator[str]:
    """The network and the preprocessing, with what was taken for granted."""
    from training.assumed import describe

    labels = manifest.labels
    shown = ", ".join(labels[:LABELS_SHOWN]) + (", …" if len(labels) > LABELS_SHOWN else "")
    yield f"network        {manifest.network.name}, {len(labels)} classes: {shown}"
    for note in notes:
        yield f"               {note}"
    yield f"preprocessing  {describe(manifest.preprocessing)}"
    if manifest.preprocessing.accepts_pictures:
        yield "               assumed; --resize --crop --mean --std --channels change it"


def of_check(measured: "Measured") -> Iterator[str]:
    """How right the model was, and what was strange about the samples."""
    report = measured.report
    low, high = report.accuracy_interval
    yield (
        f"accuracy       {report.accuracy:.1%} ({low:.1%} to {high:.1%} with 95 % confidence) "
        f"on {report.num_samples} samples of {measured.dataset}"
    )
    for note in measured.notes:
        yield f"               {note}"


def of_quantization(quantized: "Quantized") -> Iterator[str]:
    """What eight bits cost, and on which samples."""
    cost = quantized.cost
    low, high = cost.agreement_interval
    yield (
        f"accuracy     {cost.report.accuracy:.2%} on {cost.report.num_samples} samples of "
        f"{cost.where}; before, {cost.comparison.other_accuracy:.2%}"
    )
    yield f"agreement    {cost.agreement:.2%} get the same class ({low:.2%} to {high:.2%})"
    yield f"             {cost.comparison.sentence}"


def of_report(report: "Report") -> Iterator[str]:
    """Single figures, classes where they are few, and the most frequent mistakes."""
    low, high = report.accuracy_interval
    top = "".join(f", top {k} {share:.2%}" for k, share in report.top_k.items() if k > 1)
    yield f"accuracy     {report.accuracy:.2%} ({low:.2%} to {high:.2%}){top}"
    yield f"samples      {report.num_samples}"
    yield (
        f"macro        precision {report.macro_precision:.4f}, recall {report.macro_recall:.4f}, "
        f"F1 {report.macro_f1:.4f}"
    )
    yield f"log loss     {report.negative_log_likelihood:.4f}"
    best = f", best at temperature {report.temperature.value:.3f}" if report.temperature else ""
    yield f"calibration  error {report.calibration_error:.4f}{best}"
    yield from _classes(report)
    for pair in report.confused_pairs[:PAIRS_SHOWN]:
        yield f"{pair.target} taken for {pair.predicted}: {pair.count}"


def of_info(found: "Info") -> Iterator[str]:
    """Versions, then devices."""
    for package, version in found.versions.items():
        yield f"{package:12} {version}"
    yield f"{'python':12} {found.python}, {found.system}"
    yield f"{'cuda':12} {found.cuda or 'not in this build of torch'}"
    yield f"{'threads':12} {found.num_threads}"
    for one in found.devices:
        memory = f", {one.memory_bytes / 2**30:.1f} GiB" if one.memory_bytes else ""
        yield f"{one.device:12} {one.name}{memory}, {' and '.join(one.precisions)}"
        yield f"{'':12} a small tensor computed there: {one.sample}"


def _classes(report: "Report") -> Iterator[str]:
    occurring = [one for one in report.classes if one.support]
    if len(occurring) > CLASSES_SHOWN:
        return
    width = max(len(one.label) for one in occurring)
    yield f"{'class':{width}}  precision  recall      F1  support"
    for one in occurring:
        figures = f"{one.precision:9.4f}  {one.recall:6.4f}  {one.f1:6.4f}  {one.support:7}"
        yield f"{one.label:{width}}  {figures}"
