"""How sure an accuracy is, in words: its interval, and how many samples would narrow it."""

from typing import Final

from training.report import Report, wilson_interval

MARGIN: Final = 0.01
"""Known within one point is known well enough to tell good from better."""
MOST_SAMPLES: Final = 1 << 24


def certainty(report: Report) -> str:
    """The accuracy of `report` with its 95 % interval, and what would be enough to be sure."""
    low, high = report.accuracy_interval
    sentence = (
        f"{report.accuracy:.1%} of {report.num_samples} samples right, between {low:.1%} and "
        f"{high:.1%} with 95 % confidence"
    )
    enough = samples_enough(report.accuracy)
    if report.num_samples >= enough:
        return f"{sentence}, which is sure to a point"
    return f"{sentence}; about {enough:,} samples would be enough to know it within one point"


def samples_enough(accuracy: float, margin: float = MARGIN) -> int:
    """How many samples give an interval (Wilson's, 95 %) of at most `margin` to either side."""
    low, high = 1, MOST_SAMPLES
    while low < high:
        middle = (low + high) // 2
        ends = wilson_interval(round(accuracy * middle), middle)
        if (ends[1] - ends[0]) / 2 <= margin:
            high = middle
        else:
            low = middle + 1
    return low
