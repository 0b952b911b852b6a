"""A trial: one version, or two side by side, on the same samples; what counts as evidence, and
what is found.

It does not know who predicts: answers come in batches, from the serving path or a bare network.
"""

import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.seen import Seen
from training.comparison import Comparison, PairedCounts
from training.mistakes import Mistake, Mistakes
from training.progress import Progress
from training.report import TOP_K, Counts, Report

NAMED_CLASSES = 10


class ClassesUnknown(Exception):
    """The dataset has classes that the model does not know."""


class NoEvidence(Exception):
    """Every sample was left out, so nothing can be said."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A version in a trial.

    Attributes:
        name: `digits:3`.
        labels: class names in the order of its logits.
        seen: samples that it was trained and selected on.
    """

    name: str
    labels: tuple[str, ...]
    seen: Seen = Seen()


@dataclass(frozen=True, slots=True)
class Answered:
    """A batch of samples with what every contender answered.

    Attributes:
        indices: int64 `[n]`, which samples of the part these are.
        targets: int64 `[n]`, positions in the dataset's classes.
        logits: of each contender, float `[n, its classes]`, divided by its temperature.
    """

    indices: Tensor
    targets: Tensor
    logits: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class SeenCount:
    """How many of the samples that were offered one contender had seen."""

    name: str
    trained_on: int
    selected_on: int


@dataclass(frozen=True, slots=True)
class ClassApart:
    """A class that one of two contenders does not know: no comparison, so it is told apart.

    Attributes:
        label: of the class.
        unknown_to: names of the contenders that do not know it.
        num_samples: samples of this class.
        recall: of the contender that knows it; None where none does.
    """

    label: str
    unknown_to: tuple[str, ...]
    num_samples: int
    recall: float | None


@dataclass(frozen=True, slots=True)
class Findings:
    """What a trial found.

    Attributes:
        num_offered: samples that could be read.
        num_left_out: of these, samples that were no evidence.
        seen: of each contender, in their order.
        reports: of each contender, over the samples whose class it knows; None where it knows none.
        comparison: of the first contender with the second; None where there is one only.
        apart: classes that one of the two does not know.
        mistakes: the worst of the first contender, worst first.
        notes: what a person should know before believing the figures.
    """

    num_offered: int
    num_left_out: int
    seen: tuple[SeenCount, ...]
    reports: tuple[Report | None, ...]
    comparison: Comparison | None
    apart: tuple[ClassApart, ...]
    mistakes: tuple[Mistake, ...]
    notes: tuple[str, ...]


class Trial:
    """The counting of one trial; it belongs to one thread.

    Args:
        contenders: the candidate, and the version that it is compared with, if any.
        classes: names of the dataset's classes, in the order of its targets.
        leave_out_seen: whether samples that a contender has seen are left out.

    Raises:
        ClassesUnknown: of a single contender, any class; of two, all of the first one's.
    """

    def __init__(
        self, contenders: Sequence[Contender], classes: Sequence[str], *, leave_out_seen: bool
    ) -> None:
        self.contenders, self.classes = tuple(contenders), tuple(classes)
        self._positions = [positions(self.classes, one.labels) for one in contenders]
        unknown = self._positions[0] < 0
        if bool(unknown.all() if len(contenders) > 1 else unknown.any()):
            raise classes_unknown(contenders[0].name, self.classes, contenders[0].labels)
        self._leaves_out = leave_out_seen
        self._counts = [Counts(len(one.labels)) for one in contenders]
        self._trained_on = [0] * len(contenders)
        self._selected_on = [0] * len(contenders)
        self._num_offered = self._num_left_out = 0
        self._mistakes = Mistakes()
        self._class_counts = torch.zeros(len(classes), dtype=torch.int64)
        self._pair: PairedCounts | None = None
        if len(contenders) > 1:
            self._pair = PairedCounts(contenders[0].labels, contenders[1].labels)

    @property
    def needs_digests(self) -> bool:
        """Whether anybody has seen anything, so that `admit` looks at digests."""
        return any(one.seen for one in self.contenders)

    @property
    def accuracy(self) -> float:
        """Of the candidate, so far."""
        return self._counts[0].accuracy

    def admit(self, digests: Tensor | None, num_samples: int) -> Tensor:
        """Which of the samples that were read are evidence, bool `[n]`; counts the others.

        Args:
            digests: uint8 `[n, 16]`; None where `needs_digests` is false.
            num_samples: n.
        """
        left_out = torch.zeros(num_samples, dtype=torch.bool)
        for place, one in enumerate(self.contenders):
            if digests is not None and one.seen:
                trained, selected = (
                    one.seen.was_trained_on(digests),
                    one.seen.was_selected_on(digests),
                )
                self._trained_on[place] += int(trained.sum())
                self._selected_on[place] += int((selected & ~trained).sum())
                left_out |= trained | selected
        if not self._leaves_out:
            left_out[:] = False
        self._num_offered += num_samples
        self._num_left_out += int(left_out.sum())
        return ~left_out

    def count(self, batch: Answered) -> None:
        """Count the answers to samples that were admitted.

        Raises:
            training.report.ReportError: answers that cannot be counted.
        """
        self._class_counts += torch.bincount(batch.targets, minlength=len(self.classes))
        targets = [known[batch.targets] for known in self._positions]
        for counts, logits, wanted in zip(self._counts, batch.logits, targets, strict=True):
            counts.update(logits[wanted >= 0], wanted[wanted >= 0])
        known = targets[0] >= 0
        self._mistakes.update(batch.logits[0][known], targets[0][known], batch.indices[known])
        if self._pair is not None:
            both = known & (targets[1] >= 0)
            predicted = [logits[both].argmax(dim=1) for logits in batch.logits]
            self._pair.update(
                predicted[0], targets[0][both], predicted[1], targets[1][both], batch.indices[both]
            )

    def findings(self, top_k: Sequence[int] = TOP_K) -> Findings:
        """What was found.

        Raises:
            NoEvidence: nothing was left to be counted.
        """
        if not self._counts[0].num_samples:
            raise NoEvidence(self._why_nothing())
        reports = tuple(
            counts.report(one.labels, top_k) if counts.num_samples else None
            for one, counts in zip(self.contenders, self._counts, strict=True)
        )
        comparison = self._pair.comparison() if self._pair else None
        seen = tuple(
            SeenCount(one.name, trained, selected)
            for one, trained, selected in zip(
                self.contenders, self._trained_on, self._selected_on, strict=True
            )
        )
        return Findings(
            num_offered=self._num_offered,
            num_left_out=self._num_left_out,
            seen=seen,
            reports=reports,
            comparison=comparison,
            apart=self._apart(),
            mistakes=tuple(self._mistakes.worst_first()),
            notes=tuple(self._notes(seen, comparison)),
        )

    def _apart(self) -> tuple[ClassApart, ...]:
        if self._pair is None:
            return ()
        found = []
        for place, label in enumerate(self.classes):
            knows = [int(known[place]) for known in self._positions]
            if min(knows) < 0 and int(self._class_counts[place]):
                unknown_to = tuple(
                    one.name for one, at in zip(self.contenders, knows, strict=True) if at < 0
                )
                recalls = [
                    _recall(counts, at)
                    for counts, at in zip(self._counts, knows, strict=True)
                    if at >= 0
                ]
                number = int(self._class_counts[place])
                found.append(ClassApart(label, unknown_to, number, next(iter(recalls), None)))
        return tuple(found)

    def _notes(self, seen: Sequence[SeenCount], comparison: Comparison | None) -> Iterable[str]:
        if self._num_left_out:
            yield (
                f"{self._num_left_out} of {self._num_offered} samples were left out: a version was "
                "trained or selected on them, so they are no evidence."
            )
        for one in seen if not self._leaves_out else ():
            if one.trained_on or one.selected_on:
                yield (
                    f"{one.name} was trained on {one.trained_on} and selected on "
                    f"{one.selected_on} of these {self._num_offered} samples: its figures flatter."
                )
        if comparison is not None:
            yield comparison.sentence
        elif self._pair is not None:
            yield "The two versions know no class of this dataset in common: nothing is compared."

    def _why_nothing(self) -> str:
        if self._num_left_out:
            return (
                f"all {self._num_left_out} samples were left out, because a version was trained or "
                "selected on them; evaluate on samples that neither has seen"
            )
        return "there is nothing to report: no sample could be read"


def run_trial(
    trial: Trial,
    batches: Iterable[Answered],
    num_samples: int,
    top_k: Sequence[int] = TOP_K,
) -> Generator[Progress, None, Findings]:
    """Count every batch, and say what was found.

    Args:
        trial: fresh.
        batches: admitted samples with their answers; closing the loop closes it.
        num_samples: how many will come at most; used for the progress only.
        top_k: the k for which shares are wanted.

    Yields:
        After each batch: samples done, accuracy so far, pace and time left.

    Raises:
        NoEvidence: nothing was left to be counted.
        training.report.ReportError: answers that cannot be counted.
    """
    began, done = time.perf_counter(), 0
    for batch in batches:
        trial.count(batch)
        done += len(batch.targets)
        pace = done / max(time.perf_counter() - began, 1e-9)
        yield Progress(
            phase="evaluate",
            step=done,
            num_steps=num_samples,
            accuracy=trial.accuracy,
            images_per_second=pace,
            seconds_left=max(0, num_samples - done) / pace,
        )
    return trial.findings(top_k)


def positions(classes: Sequence[str], labels: Sequence[str]) -> Tensor:
    """Where each of `classes` is among `labels`, int64 `[classes]`; -1 where it is not."""
    known = {label: position for position, label in reversed(list(enumerate(labels)))}
    return torch.tensor([known.get(name, -1) for name in classes], dtype=torch.int64)


def classes_unknown(name: str, classes: Sequence[str], labels: Sequence[str]) -> ClassesUnknown:
    """The error that `name`, with these labels, does not know all of `classes`."""
    unknown = [one for one in classes if one not in set(labels)]
    return ClassesUnknown(
        f"{name} has no label {_listed(unknown)}; its labels are {_listed(labels)}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_CLASSES]) + (" and more" if len(names) > NAMED_CLASSES else "")


def _recall(counts: Counts, place: int) -> float:
    row = counts.confusion[place]
    return int(row[place]) / int(row.sum())
