"""What an evaluation found, as plain values, with small pictures of what went wrong."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import Tensor

from models.picture import PictureError
from models.preprocessing import Preprocessing
from training.certainty import certainty
from training.mistakes import Mistake
from training.report import Report
from training.samples import Samples, picture_of
from training.trial import Findings

THUMBNAIL_PIXELS: Final = 96
MAX_CLASSES_IN_FULL: Final = 100
"""A larger confusion matrix is told by the cells that are not empty."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast one version answered.

    Attributes:
        samples_per_second: over the whole evaluation, reading included.
        alone_p50_ms, alone_p90_ms: a single input on the device, without waiting.
        batch_rows: rows of its usual batch.
        batch_ms: of the usual batch on the device.
    """

    samples_per_second: float
    alone_p50_ms: float
    alone_p90_ms: float
    batch_rows: int
    batch_ms: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found.

    Attributes:
        models: name and version of the candidate, and of the version it was compared with.
        labels: of each of them.
        temperatures: of each of them, as they were applied.
        dataset, part: what was measured.
        findings: the figures.
        speeds: of each version.
        names: index of a sample that is listed -> what a person calls it.
        thumbnails: index of a sample that is listed -> the picture as a data URI.
        unreadable: samples that could not be read, a sentence each, a bounded list.
        num_unreadable: how many there were.
        num_out_of_fold: samples to which the candidate's answers are those of its folds.
        seconds: that it took.
    """

    models: tuple[tuple[str, int], ...]
    labels: tuple[tuple[str, ...], ...]
    temperatures: tuple[float, ...]
    dataset: str
    part: str
    findings: Findings
    speeds: tuple[Speed, ...]
    names: dict[int, str]
    thumbnails: dict[int, str]
    unreadable: tuple[str, ...]
    num_unreadable: int
    num_out_of_fold: int
    seconds: float

    @property
    def report(self) -> Report:
        """Of the candidate; there is one, or there would be no evaluation."""
        report = self.findings.reports[0]
        assert report is not None
        return report

    @property
    def sentence(self) -> str:
        """How good the candidate is, how sure that is, and how it compares."""
        told, pair = certainty(self.report), self.findings.comparison
        if pair is None:
            return f"{told}."
        (name, version), holds = self.models[1], pair.other_accuracy
        return f"{told}. Against {name}:{version}, which has {holds:.1%} right: {pair.sentence}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`; the pictures stand apart under `thumbnails`."""
        found = self.findings
        sides = [self._side(place) for place in range(len(self.models))]
        return {
            **sides[0],
            "dataset": {"name": self.dataset, "part": self.part},
            "num_samples": found.num_offered,
            "num_left_out": found.num_left_out,
            "num_unreadable": self.num_unreadable,
            "num_out_of_fold": self.num_out_of_fold,
            "unreadable": list(self.unreadable),
            "compared_with": sides[1] if len(sides) > 1 else None,
            "comparison": self._comparison(),
            "classes_apart": [asdict(one) for one in found.apart],
            "worst_mistakes": [self._mistake(one) for one in found.mistakes],
            "sentence": self.sentence,
            "notes": [*self._folds(), *found.notes],
            "seconds": round(self.seconds, 3),
            "thumbnails": {str(index): uri for index, uri in self.thumbnails.items()},
        }

    def _folds(self) -> list[str]:
        if not self.num_out_of_fold:
            return []
        return [
            f"{self.num_out_of_fold} samples were answered out of fold: by networks that learned "
            "as the candidate did, but not from them. The candidate itself learned from them all."
        ]

    def _side(self, place: int) -> dict[str, Any]:
        name, version = self.models[place]
        report, seen = self.findings.reports[place], self.findings.seen[place]
        return {
            "model": name,
            "version": version,
            "seen": {"trained_on": seen.trained_on, "selected_on": seen.selected_on},
            "report": None if report is None else self._report(report, place),
            "speed": asdict(self.speeds[place]),
        }

    def _report(self, report: Report, place: int) -> dict[str, Any]:
        told = report.to_json()
        if len(report.classes) > MAX_CLASSES_IN_FULL:
            told["confusion"] = None
            told["confusion_cells"] = [
                [row, column, count]
                for row, counts in enumerate(report.confusion)
                for column, count in enumerate(counts)
                if count
            ]
        if report.temperature is not None:
            # What a manifest holds divides the network's own logits.
            told["temperature"]["value"] *= self.temperatures[place]
        told["applied_temperature"] = self.temperatures[place]
        return told

    def _comparison(self) -> dict[str, Any] | None:
        if self.findings.comparison is None:
            return None
        told = asdict(self.findings.comparison)
        for side in ("gained", "lost"):
            for one in told[side]:
                one["name"] = self.names.get(one["index"])
        return told

    def _mistake(self, one: Mistake) -> dict[str, Any]:
        labels = self.labels[0]
        return {
            "index": one.index,
            "name": self.names.get(one.index),
            "target": labels[one.target],
            "predicted": labels[one.predicted],
            "probability": one.probability,
            "loss": one.loss,
        }


def thumbnails_of(
    samples: Samples, indices: Sequence[int], preprocessing: Preprocessing
) -> dict[int, str]:
    """Small pictures as the network saw them; none where it sees numbers."""
    if not preprocessing.accepts_pictures:
        return {}
    found = {}
    for index in indices:
        try:
            found[index] = _data_uri(samples.read(index)[0])
        except (PictureError, ValueError, OSError):
            continue  # gone since it was evaluated: its name is shown without it
    return found


def _data_uri(pixels: Tensor) -> str:
    picture = picture_of(pixels)
    is_small = max(picture.size) <= THUMBNAIL_PIXELS
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    file, kind = io.BytesIO(), "png" if is_small and picture.width <= 32 else "jpeg"
    picture.save(file, kind.upper(), **({} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
