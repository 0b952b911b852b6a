"""What is right and wrong with a dataset: everything at once, with names. Imports no torch."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from training.dataset_manifest import DatasetReport, Fault, SampleRecord, Severity
from training.dataset_names import PARTS, TRAIN, class_names
from training.near_duplicates import find_alike
from training.picture_check import PictureLook

MAX_FILES: Final = 1000
TINY_CLASS: Final = 10
"""Training pictures below which a class says little about itself."""
IMBALANCE: Final = 10
"""Times that the largest class may have the smallest's samples."""
TOLERATED_SHARE: Final = 0.05
"""Of all samples: more contradictions or leaks than this make every figure meaningless."""
BRIGHTNESS_DISTANCE: Final = 2.0
"""Deviations that the mean of a colour may be away from what a model was trained on."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a model sees: channels and pixels; means and deviations of 0..1 where it normalises."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None


_RANK: Final[dict[Severity, int]] = {"error": 0, "warning": 1, "note": 2}


def report_of(
    samples: Sequence[SampleRecord],
    refused: Sequence[Fault] = (),
    expected: Expectation | None = None,
    known_classes: Sequence[str] = (),
) -> DatasetReport:
    """The report on `samples`.

    Args:
        samples: all that can be used.
        refused: what was found in files that cannot be.
        expected: of a model that is to see them.
        known_classes: class folders, also those in which nothing could be used.
    """
    classes = class_names([one.label for one in samples] + list(known_classes))
    counts = {name: dict.fromkeys(sorted({s.part for s in samples}), 0) for name in classes}
    for sample in samples:
        counts[sample.label][sample.part] += 1
    faults = [
        *refused,
        *_class_faults(counts),
        *_same_bytes(samples),
        *_alike(samples),
        *_looks(samples),
        *(_against(samples, expected) if expected else ()),
    ]
    faults.sort(key=lambda fault: _RANK[fault.severity])
    return DatasetReport(
        usable=not any(fault.severity == "error" for fault in faults),
        faults=tuple(faults),
        classes=counts,
        pictures=_figures(samples),
    )


def fault(kind: str, severity: Severity, files: Sequence[str], sentence: str) -> Fault:
    """A fault with the first thousand of the files that it concerns."""
    return Fault(
        kind=kind,
        severity=severity,
        files=tuple(files[:MAX_FILES]),
        count=len(files),
        sentence=sentence,
    )


def _class_faults(counts: Mapping[str, Mapping[str, int]]) -> Iterator[Fault]:
    training = {name: parts.get(TRAIN, 0) for name, parts in counts.items()}
    if len(counts) < 2:
        found = f"only {next(iter(counts))!r}" if counts else "none"
        yield fault("classes", "error", [], f"two classes or more are needed; there is {found}")
        return
    empty = [name for name, count in training.items() if not count]
    if empty:
        yield fault(
            "empty_classes",
            "error",
            empty,
            f"{_some(empty)} {_have(empty)} no sample to learn from",
        )
    tiny = [name for name, count in training.items() if 0 < count < TINY_CLASS]
    if tiny:
        yield fault(
            "tiny_classes",
            "warning",
            tiny,
            f"{_some(tiny)} {_have(tiny)} fewer than {TINY_CLASS} samples to learn from",
        )
    filled = [count for count in training.values() if count]
    if filled and max(filled) > IMBALANCE * min(filled):
        small = [name for name, count in training.items() if count == min(filled)]
        yield fault(
            "imbalance",
            "warning",
            small,
            f"the largest class has {max(filled) / min(filled):.0f} times as many samples as "
            f"{_some(small)}; class weights help",
        )


def concerned(samples: Sequence[SampleRecord], kind: str) -> list[SampleRecord] | None:
    """The samples that must go so that a fault of this kind is gone; None where that is unknown.

    Of duplicates all but the first; of what leaks, what is learned from, so that figures stay
    comparable; of what stands under two labels, all.
    """
    if kind in _LOOKS:
        wanted = _LOOKS[kind][1]
        return [one for one in samples if one.look is not None and wanted(one.look)]
    prefix, _, problem = kind.partition("_")
    if prefix not in ("exact", "near") or problem not in _MUST_GO:
        return None
    if prefix == "exact":
        return [one for group in _exact_groups(samples) for one in _MUST_GO[problem](group)]
    twins: dict[str, list[SampleRecord]] = defaultdict(list)
    for sample in samples:
        twins[sample.sha256].append(sample)
    groups, _ = _near_groups(samples)
    going = [one for group in groups for one in _MUST_GO[problem](group)]
    return [twin for one in going for twin in twins[one.sha256]]


def _duplicates_that_go(group: Sequence[SampleRecord]) -> Sequence[SampleRecord]:
    return group[1:] if len({(one.part, one.label) for one in group}) == 1 else ()


def _leaks_that_go(group: Sequence[SampleRecord]) -> Sequence[SampleRecord]:
    last = max(PARTS.index(one.part) for one in group)
    return [one for one in group if PARTS.index(one.part) < last]


def _conflicts_that_go(group: Sequence[SampleRecord]) -> Sequence[SampleRecord]:
    return group if len({one.label for one in group}) > 1 else ()


_MUST_GO: Final[Mapping[str, Callable[[Sequence[SampleRecord]], Sequence[SampleRecord]]]] = {
    "duplicates": _duplicates_that_go,
    "leakage": _leaks_that_go,
    "conflicts": _conflicts_that_go,
}


def _exact_groups(samples: Sequence[SampleRecord]) -> list[list[SampleRecord]]:
    by_digest: dict[str, list[SampleRecord]] = defaultdict(list)
    for sample in samples:
        by_digest[sample.sha256].append(sample)
    return [group for group in by_digest.values() if len(group) > 1]


def _near_groups(samples: Sequence[SampleRecord]) -> tuple[list[list[SampleRecord]], bool]:
    """Groups of samples that look alike, one of each that have the same bytes; and if all."""
    first: dict[str, SampleRecord] = {}
    for sample in samples:
        first.setdefault(sample.sha256, sample)  # the same bytes are told already
    looked = [one for one in first.values() if one.look is not None and one.look.hash]
    found = find_alike([int(one.look.hash, 16) for one in looked if one.look and one.look.hash])
    return [[looked[position] for position in group] for group in found.groups], found.is_whole


def _same_bytes(samples: Sequence[SampleRecord]) -> Iterator[Fault]:
    yield from _repeated(_exact_groups(samples), len(samples), "the same bytes", "exact")


def _alike(samples: Sequence[SampleRecord]) -> Iterator[Fault]:
    groups, is_whole = _near_groups(samples)
    yield from _repeated(groups, len(samples), "pictures that look alike", "near")
    if not is_whole:
        yield fault(
            "search_cut",
            "note",
            [],
            "there are so many pictures that look alike that not all pairs were compared",
        )


def _repeated(
    groups: Sequence[Sequence[SampleRecord]], total: int, what: str, prefix: str
) -> Iterator[Fault]:
    within = [group for group in groups if len({(s.part, s.label) for s in group}) == 1]
    contradicting = [group for group in groups if len({s.label for s in group}) > 1]
    leaking = [group for group in groups if len({s.part for s in group}) > 1]
    if within:
        names = _names(within)
        sentence = f"{len(within)} groups of {what} within one class; one of each is enough"
        yield fault(f"{prefix}_duplicates", "warning", names, sentence)
    for kind, found, problem in (
        ("conflicts", contradicting, "under two labels"),
        ("leakage", leaking, "both to learn from and to be measured on"),
    ):
        if found:
            is_error = prefix == "exact" and len(_names(found)) > TOLERATED_SHARE * total
            yield fault(
                f"{prefix}_{kind}",
                "error" if is_error else "warning",
                _names(found),
                f"{len(found)} groups of {what} {problem}",
            )


def _looks(samples: Sequence[SampleRecord]) -> Iterator[Fault]:
    for kind, (sentence, wanted) in _LOOKS.items():
        names = [one.name for one in samples if one.look is not None and wanted(one.look)]
        if names:
            yield fault(kind, "note", names, f"{len(names)} pictures {sentence}")


_LOOKS: Final[Mapping[str, tuple[str, Callable[[PictureLook], bool]]]] = {
    "rotated": ("are turned by EXIF; they are read upright", lambda one: one.orientation != 1),
    "cmyk": ("are CMYK; their colours are converted", lambda one: one.mode == "CMYK"),
    "sixteen_bit": ("have 16 bits; the upper 8 are kept", lambda one: one.mode.startswith("I")),
    "alpha": ("are transparent; that is dropped", lambda one: one.alpha),
}


def _against(samples: Sequence[SampleRecord], expected: Expectation) -> Iterator[Fault]:
    looked = [one for one in samples if one.look is not None]
    if not looked:
        return
    grey = [one.name for one in looked if one.look and one.look.channels == 1]
    if expected.channels == 3 and len(grey) > len(looked) / 2:
        yield fault(
            "colours", "warning", grey, f"{len(grey)} pictures are grey, and the model sees colours"
        )
    if expected.channels == 1 and len(grey) < len(looked) / 2:
        yield fault("colours", "note", [], "most pictures have colours, and the model sees grey")
    small = [
        one.name
        for one in looked
        if one.look and min(one.look.width, one.look.height) < min(expected.height, expected.width)
    ]
    if small:
        yield fault(
            "small",
            "warning" if len(small) > len(looked) / 2 else "note",
            small,
            f"{len(small)} pictures are smaller than the {expected.width}x{expected.height} "
            "pixels that the model sees; they are enlarged",
        )
    yield from _brightness(looked, expected)


def _brightness(looked: Sequence[SampleRecord], expected: Expectation) -> Iterator[Fault]:
    if expected.mean is None or expected.deviation is None:
        return
    means = np.array([np.mean(one.look.mean) for one in looked if one.look]) / 255
    distance = abs(float(means.mean()) - float(np.mean(expected.mean)))
    if distance > BRIGHTNESS_DISTANCE * float(np.mean(expected.deviation)):
        yield fault(
            "brightness",
            "warning",
            [],
            f"the pictures' mean is {means.mean():.2f}, and the model was trained around "
            f"{np.mean(expected.mean):.2f}",
        )


def _figures(samples: Sequence[SampleRecord]) -> dict[str, object] | None:
    looks = [one.look for one in samples if one.look is not None]
    if not looks:
        return None
    widths, heights = [one.width for one in looks], [one.height for one in looks]
    colours = [one for one in looks if len(one.mean) == 3] or looks
    return {
        "count": len(looks),
        "width": {"least": min(widths), "median": int(np.median(widths)), "most": max(widths)},
        "height": {"least": min(heights), "median": int(np.median(heights)), "most": max(heights)},
        "formats": dict(Counter(one.format for one in looks)),
        "modes": dict(Counter(one.mode for one in looks)),
        "mean": np.mean([one.mean for one in colours], axis=0).round(1).tolist(),
        "deviation": np.mean([one.deviation for one in colours], axis=0).round(1).tolist(),
    }


def _names(groups: Sequence[Sequence[SampleRecord]]) -> list[str]:
    return [sample.name for group in groups for sample in group]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"
