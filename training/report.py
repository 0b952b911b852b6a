"""Counts while predictions stream by, and the report that they make.

What is kept is a matrix of classes x classes, a few histograms and at most ten thousand logits, so
memory does not grow with the data. One `Counts` serves the command line, the training loop, and
evaluations in the server.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from training.temperature import KeptLogits, Temperature

NUM_BINS = 15
TOP_K = (1, 3, 5)
NUM_CONFUSED_PAIRS = 10
Z_95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % on each side."""


class ReportError(Exception):
    """Predictions and targets cannot be counted."""


@dataclass(frozen=True, slots=True)
class ClassReport:
    """One class. Where nothing divides, a figure is 0, as scikit-learn has it.

    Attributes:
        label: its name.
        precision: of the samples that were given this class, the share that have it.
        recall: of the samples that have this class, the share that were given it.
        f1: harmonic mean of the two.
        support: samples that have this class.
        predicted: samples that were given this class.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True, slots=True)
class Bin:
    """One bin of the reliability diagram: samples with `lower` <= confidence < `upper`.

    `confidence` and `accuracy` are means over its samples, None where it is empty.
    """

    lower: float
    upper: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """Samples of class `target` that were given class `predicted`."""

    target: str
    predicted: str
    count: int
    share_of_target: float


@dataclass(frozen=True, slots=True)
class Report:
    """What an evaluation found.

    Attributes:
        num_samples: samples counted.
        accuracy: share of samples whose most probable class is the right one.
        accuracy_interval: its 95 % interval after Wilson (1927).
        top_k: k -> share of samples whose right class is among the k most probable.
        macro_precision, macro_recall, macro_f1: plain means over the classes that occur, among
            the targets or among the predictions.
        negative_log_likelihood: mean of -log(probability of the right class), in nats.
        brier_score: mean squared distance between the probabilities and the truth, summed over
            the classes: 0 to 2 (Brier 1950).
        calibration_error: expected calibration error: mean distance between confidence and
            accuracy over equal-width bins, weighted by their counts (Naeini et al. 2015).
        bins: the reliability diagram behind it.
        temperature: what the logits that were counted should be divided by; None where the
            samples do not say.
        classes: in the order of the labels.
        confusion: row: the class a sample has; column: the class it was given.
        confused_pairs: the most frequent mistakes, most frequent first.
    """

    num_samples: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    top_k: dict[int, float]
    macro_precision: float
    macro_recall: float
    macro_f1: float
    negative_log_likelihood: float
    brier_score: float
    calibration_error: float
    bins: tuple[Bin, ...]
    temperature: Temperature | None
    classes: tuple[ClassReport, ...]
    confusion: tuple[tuple[int, ...], ...]
    confused_pairs: tuple[ConfusedPair, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, strings and finite numbers, ready for `json.dumps`."""
        return asdict(self) | {"top_k": {str(k): share for k, share in self.top_k.items()}}

    def figures(self) -> dict[str, float]:
        """The single numbers, for a manifest, a log line or a table."""
        return {
            "num_samples": self.num_samples,
            "accuracy": self.accuracy,
            **{f"top_{k}": share for k, share in self.top_k.items() if k > 1},
            "macro_precision": self.macro_precision,
            "macro_recall": self.macro_recall,
            "macro_f1": self.macro_f1,
            "negative_log_likelihood": self.negative_log_likelihood,
            "brier_score": self.brier_score,
            "calibration_error": self.calibration_error,
        }


class Counts:
    """Predictions counted batch by batch.

    Args:
        num_classes: width of the logits.

    Attributes:
        confusion: int64 `[classes, classes]`, row target, column prediction.
        ranks: int64 `[classes]`: how many samples had their right class at this place, 0 the best.
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 1:
            raise ReportError(f"a report needs at least one class, not {num_classes}")
        self.num_classes = num_classes
        self.num_samples = 0
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.ranks = torch.zeros(num_classes, dtype=torch.int64)
        self._bin_counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self._bin_right = torch.zeros(NUM_BINS, dtype=torch.int64)
        self._bin_confidence = torch.zeros(NUM_BINS, dtype=torch.float64)
        self._log_loss = self._squares = 0.0
        self._kept = KeptLogits(num_classes)

    @property
    def accuracy(self) -> float:
        """Share of right answers so far; 0 before the first sample."""
        return int(self.ranks[0]) / self.num_samples if self.num_samples else 0.0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Count one batch.

        Args:
            logits: float32 `[n, classes]`, before softmax, on any device.
            targets: int64 `[n]`, each in 0..classes-1.

        Raises:
            ReportError: a wrong shape, a target that is no class, or a logit that is not finite.
        """
        self._check(logits, targets)
        logits, targets = logits.detach().cpu(), targets.detach().cpu()
        self._kept.add(logits, targets)
        logits = logits.double()
        at_target = logits.gather(1, targets.unsqueeze(1))
        best, predicted = logits.max(dim=1)
        log_total = logits.logsumexp(dim=1)
        self.num_samples += len(targets)
        _add_each(self.confusion.view(-1), targets * self.num_classes + predicted)
        _add_each(self.ranks, _ranks(logits, at_target, targets))
        self._log_loss += float((log_total - at_target.squeeze(1)).sum())
        self._squares += _squares(logits, log_total, at_target.squeeze(1))
        self._count_bins((best - log_total).exp(), predicted == targets)

    def report(self, labels: Sequence[str], top_k: Sequence[int] = TOP_K) -> Report:
        """The report on all that was counted.

        Args:
            labels: class names in the order of the logits.
            top_k: the k for which shares are wanted; those above the number of classes are left
                out.

        Raises:
            ReportError: nothing was counted, or the labels are not as many as the classes.
        """
        if len(labels) != self.num_classes:
            raise ReportError(f"{len(labels)} labels for {self.num_classes} classes")
        if not self.num_samples:
            raise ReportError("there is nothing to report: no sample was evaluated")
        classes = self._classes(labels)
        occurring = [one for one in classes if one.support or one.predicted]
        bins = self._bins()
        return Report(
            num_samples=self.num_samples,
            accuracy=self.accuracy,
            accuracy_interval=wilson_interval(int(self.ranks[0]), self.num_samples),
            top_k={k: self._top(k) for k in top_k if k <= self.num_classes},
            macro_precision=_mean([one.precision for one in occurring]),
            macro_recall=_mean([one.recall for one in occurring]),
            macro_f1=_mean([one.f1 for one in occurring]),
            negative_log_likelihood=self._log_loss / self.num_samples,
            brier_score=self._squares / self.num_samples,
            calibration_error=_calibration_error(bins, self.num_samples),
            bins=bins,
            temperature=self._kept.fit(),
            classes=classes,
            confusion=tuple(tuple(row) for row in self.confusion.tolist()),
            confused_pairs=self._confused_pairs(labels),
        )

    def _check(self, logits: Tensor, targets: Tensor) -> None:
        wanted = (len(targets), self.num_classes)
        if logits.shape != wanted or targets.ndim != 1:
            raise ReportError(
                f"logits of shape {list(logits.shape)} and targets of shape "
                f"{list(targets.shape)} do not fit {self.num_classes} classes"
            )
        if not len(targets):
            return
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= self.num_classes:
            wrong = low if low < 0 else high
            raise ReportError(f"target {wrong} is no class: there are {self.num_classes}")
        if not bool(logits.isfinite().all()):
            raise ReportError("the network answered with numbers that are not finite")

    def _count_bins(self, confidence: Tensor, right: Tensor) -> None:
        places = (confidence * NUM_BINS).long().clamp_(max=NUM_BINS - 1)
        _add_each(self._bin_counts, places)
        _add_each(self._bin_right, places[right])
        self._bin_confidence.index_add_(0, places, confidence)

    def _top(self, k: int) -> float:
        return int(self.ranks[:k].sum()) / self.num_samples

    def _classes(self, labels: Sequence[str]) -> tuple[ClassReport, ...]:
        rights = self.confusion.diagonal().tolist()
        supports = self.confusion.sum(dim=1).tolist()
        predicteds = self.confusion.sum(dim=0).tolist()
        return tuple(
            ClassReport(
                label=label,
                precision=right / predicted if predicted else 0.0,
                recall=right / support if support else 0.0,
                f1=2 * right / (support + predicted) if support + predicted else 0.0,
                support=support,
                predicted=predicted,
            )
            for label, right, support, predicted in zip(
                labels, rights, supports, predicteds, strict=True
            )
        )

    def _bins(self) -> tuple[Bin, ...]:
        return tuple(
            Bin(
                lower=index / NUM_BINS,
                upper=(index + 1) / NUM_BINS,
                count=count,
                confidence=confidence / count if count else None,
                accuracy=right / count if count else None,
            )
            for index, (count, right, confidence) in enumerate(
                zip(
                    self._bin_counts.tolist(),
                    self._bin_right.tolist(),
                    self._bin_confidence.tolist(),
                    strict=True,
                )
            )
        )

    def _confused_pairs(self, labels: Sequence[str]) -> tuple[ConfusedPair, ...]:
        mistakes = self.confusion.clone()
        mistakes.fill_diagonal_(0)
        supports = self.confusion.sum(dim=1)
        # Stable, so that pairs of equal count keep the order of the labels.
        order = mistakes.flatten().sort(descending=True, stable=True)
        pairs = []
        for count, place in zip(
            order.values[:NUM_CONFUSED_PAIRS].tolist(),
            order.indices[:NUM_CONFUSED_PAIRS].tolist(),
            strict=True,
        ):
            if not count:
                break
            target, predicted = divmod(place, self.num_classes)
            share = count / int(supports[target])
            pairs.append(ConfusedPair(labels[target], labels[predicted], count, share))
        return tuple(pairs)


def wilson_interval(num_right: int, num_samples: int, z: float = Z_95) -> tuple[float, float]:
    """Bounds of a share, 95 % unless another `z` is given.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927. Unlike
    the plain normal interval it holds for few samples and for shares near 0 and 1.
    """
    share = num_right / num_samples
    spread = z * z / num_samples
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / num_samples + spread / (4 * num_samples))
    lower, upper = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, lower), min(1.0, upper)


def _ranks(logits: Tensor, at_target: Tensor, targets: Tensor) -> Tensor:
    """int64 `[n]`: how many classes come before the right one; of equals, the lower index does."""
    ahead = (logits > at_target).sum(dim=1)
    places = torch.arange(logits.shape[1])
    tied = (logits == at_target) & (places < targets.unsqueeze(1))
    return ahead + tied.sum(dim=1)


def _squares(logits: Tensor, log_total: Tensor, at_target: Tensor) -> float:
    """Squared distances between the probabilities and the truth, over all rows and classes."""
    of_all = (logits - log_total.unsqueeze(1)).exp_().square_().sum()
    return float(of_all + (1 - 2 * (at_target - log_total).exp_()).sum())


def _add_each(counts: Tensor, places: Tensor) -> None:
    """Count every place once; unlike a histogram it costs nothing for places that do not occur."""
    counts.index_add_(0, places, torch.ones_like(places))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _calibration_error(bins: Sequence[Bin], num_samples: int) -> float:
    return sum(
        one.count / num_samples * abs(one.accuracy - one.confidence)
        for one in bins
        if one.accuracy is not None and one.confidence is not None
    )
