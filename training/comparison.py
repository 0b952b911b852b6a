"""Two versions on the same samples: what one gained and lost against the other, and whether that
can be chance.
"""

import math
from dataclasses import dataclass

from torch import Tensor

MAX_LISTED = 48
"""Gained and lost samples that are listed, of each so many; all are counted."""
MOST_EXACT = 10_000
"""Up to so many samples that the two disagree on, the test is exact."""
SIGNIFICANCE = 0.05
Z_TWO_SIDED, Z_POWER = 1.959963984540054, 0.8416212335729143
"""Quantiles of the normal distribution: for 5 % on both sides together, and for a power of 80 %."""
SMALLEST_DIFFERENCE = 0.01
"""Where two versions look alike, this difference in accuracy is what one would want to see."""


@dataclass(frozen=True, slots=True)
class Changed:
    """One sample that one of the two has right and the other has wrong.

    Attributes:
        index: of the sample, in the part that was evaluated.
        target: name of its class.
        answer: of the candidate.
        other_answer: of the version that it was compared with.
    """

    index: int
    target: str
    answer: str
    other_answer: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found.

    Attributes:
        num_samples: samples that both answered.
        accuracy: of the candidate over them.
        other_accuracy: of the other version.
        num_both_right, num_both_wrong: where they agree about being right or wrong.
        num_gained: right with the candidate, wrong with the other.
        num_lost: wrong with the candidate, right with the other.
        p_value: McNemar's test, two-sided: how often a difference of at least this size would be
            seen if neither were better.
        num_needed: samples that would be enough to show a difference such as was seen, with a
            probability of 80 % at the 5 % level; None where it was shown.
        sentence: the same in words.
        gained, lost: the first of these samples, with both answers.
    """

    num_samples: int
    accuracy: float
    other_accuracy: float
    num_both_right: int
    num_both_wrong: int
    num_gained: int
    num_lost: int
    p_value: float
    num_needed: int | None
    sentence: str
    gained: tuple[Changed, ...]
    lost: tuple[Changed, ...]


class PairedCounts:
    """Answers of two versions, counted batch by batch.

    Args:
        labels: of the candidate.
        other_labels: of the version that it is compared with.
    """

    def __init__(self, labels: tuple[str, ...], other_labels: tuple[str, ...]) -> None:
        self._labels, self._other_labels = labels, other_labels
        self._num_both_right = self._num_both_wrong = self._num_gained = self._num_lost = 0
        self._gained: list[Changed] = []
        self._lost: list[Changed] = []

    def update(
        self,
        predicted: Tensor,
        targets: Tensor,
        other_predicted: Tensor,
        other_targets: Tensor,
        indices: Tensor,
    ) -> None:
        """Count one batch; int64 `[n]` each, positions in the labels of the one and the other."""
        right, other_right = predicted == targets, other_predicted == other_targets
        self._num_both_right += int((right & other_right).sum())
        self._num_both_wrong += int((~right & ~other_right).sum())
        for only, listed in (
            (right & ~other_right, self._gained),
            (~right & other_right, self._lost),
        ):
            for place in only.nonzero().flatten()[: MAX_LISTED - len(listed)].tolist():
                listed.append(
                    Changed(
                        int(indices[place]),
                        self._labels[int(targets[place])],
                        self._labels[int(predicted[place])],
                        self._other_labels[int(other_predicted[place])],
                    )
                )
        self._num_gained += int((right & ~other_right).sum())
        self._num_lost += int((~right & other_right).sum())

    def comparison(self) -> Comparison | None:
        """What was found; None where no sample was answered by both."""
        gained, lost = self._num_gained, self._num_lost
        num = gained + lost + self._num_both_right + self._num_both_wrong
        if not num:
            return None
        p_value = mcnemar(gained, lost)
        needed = None if p_value <= SIGNIFICANCE else samples_needed(gained, lost, num)
        return Comparison(
            num_samples=num,
            accuracy=(self._num_both_right + gained) / num,
            other_accuracy=(self._num_both_right + lost) / num,
            num_both_right=self._num_both_right,
            num_both_wrong=self._num_both_wrong,
            num_gained=gained,
            num_lost=lost,
            p_value=p_value,
            num_needed=needed,
            sentence=_sentence(gained, lost, num, p_value, needed),
            gained=tuple(self._gained),
            lost=tuple(self._lost),
        )


def mcnemar(num_gained: int, num_lost: int) -> float:
    """Two-sided p-value: exact up to 10,000 discordant samples, with Edwards' correction beyond.

    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947.
    """
    discordant = num_gained + num_lost
    if discordant == 0:
        return 1.0
    if discordant > MOST_EXACT:
        z = max(0.0, abs(num_gained - num_lost) - 1) / math.sqrt(discordant)
        return math.erfc(z / math.sqrt(2))
    fewer = min(num_gained, num_lost)
    log_half = discordant * math.log(2)
    tail = math.fsum(
        math.exp(_log_choose(discordant, number) - log_half) for number in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def samples_needed(num_gained: int, num_lost: int, num_samples: int) -> int:
    """How many samples would show the difference that was seen, or of one point where none was.

    Connor, "Sample size for testing differences in proportions for the paired-sample design",
    1987: power 80 %, two-sided level 5 %.
    """
    difference = abs(num_gained - num_lost) / num_samples or SMALLEST_DIFFERENCE
    discordant = max((num_gained + num_lost) / num_samples, difference)
    spread = Z_TWO_SIDED * math.sqrt(discordant)
    spread += Z_POWER * math.sqrt(discordant - difference * difference)
    return max(num_samples + 1, math.ceil((spread / difference) ** 2))


def _sentence(
    num_gained: int, num_lost: int, num_samples: int, p_value: float, needed: int | None
) -> str:
    seen = f"{num_gained} samples gained and {num_lost} lost of {num_samples}"
    if needed is None:
        better = "better" if num_gained > num_lost else "worse"
        return f"{seen}: the candidate is {better}; chance does not explain it (p = {p_value:.2g})."
    what = "this difference" if num_gained != num_lost else "a difference of one point in accuracy"
    return (
        f"{seen}: that can be chance (p = {p_value:.2g}); about {needed:,} samples would be "
        f"enough to show {what}."
    )


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)
