"""A trial of one version or two: what is evidence, what is told apart, and what is found."""

import hashlib

import pytest
import torch
from torch import Tensor

from models.seen import Seen, short_digests
from training.progress import drive
from training.report import Counts
from training.trial import Answered, ClassesUnknown, Contender, NoEvidence, Trial, run_trial

CLASSES = ("a", "b", "c")


def digests(*numbers: int) -> Tensor:
    return short_digests([hashlib.sha256(bytes([number])).digest() for number in numbers])


def logits_for(labels: tuple[str, ...], answers: str) -> Tensor:
    """Logits whose best class is the wanted one, `x` standing for the first label."""
    places = [labels.index(one) if one in labels else 0 for one in answers]
    return torch.nn.functional.one_hot(torch.tensor(places), len(labels)).float() * 3


def batch(truth: str, *answers: tuple[tuple[str, ...], str]) -> Answered:
    targets = torch.tensor([CLASSES.index(one) for one in truth])
    logits = tuple(logits_for(labels, text) for labels, text in answers)
    return Answered(torch.arange(len(truth)), targets, logits)


def test_one_version_gives_the_report_that_counts_give() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 3, generator=generator), torch.arange(40) % 3
    counts = Counts(3)
    counts.update(logits, targets)
    trial = Trial([Contender("m:1", CLASSES)], CLASSES, leave_out_seen=False)
    parts = zip(torch.arange(40).split(8), targets.split(8), logits.split(8), strict=True)
    loop = run_trial(trial, [Answered(i, y, (x,)) for i, y, x in parts], 40)
    found = drive(loop)
    report = found.reports[0]
    assert report is not None
    assert report.figures() == pytest.approx(counts.report(CLASSES).figures(), abs=1e-12)
    assert (found.comparison, found.apart) == (None, ())
    wrong = int((logits.argmax(1) != targets).sum())
    assert len(found.mistakes) == min(wrong, 24)
    losses = [one.loss for one in found.mistakes]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, targets, reduction="none").max())
    )


def test_what_a_version_has_seen_is_left_out_and_counted() -> None:
    seen = Seen.of(digests(0, 1), digests(2))
    trial = Trial(
        [Contender("m:2", CLASSES), Contender("m:1", CLASSES, seen)], CLASSES, leave_out_seen=True
    )
    assert trial.needs_digests
    assert trial.admit(digests(0, 2, 5, 9), 4).tolist() == [False, False, True, True]
    trial.count(batch("ab", (CLASSES, "ab"), (CLASSES, "aa")))
    found = trial.findings()
    assert (found.num_offered, found.num_left_out) == (4, 2)
    assert [(one.trained_on, one.selected_on) for one in found.seen] == [(0, 0), (1, 1)]
    assert "2 of 4 samples were left out" in found.notes[0]
    assert found.comparison is not None
    assert (found.comparison.num_gained, found.comparison.num_samples) == (1, 2)


def test_what_is_not_left_out_is_said() -> None:
    seen = Seen.of(digests(0), digests(1))
    trial = Trial([Contender("m:1", CLASSES, seen)], CLASSES, leave_out_seen=False)
    assert trial.admit(digests(0, 1), 2).all()
    trial.count(batch("ab", (CLASSES, "ab")))
    found = trial.findings()
    assert found.num_left_out == 0
    assert "trained on 1 and selected on 1 of these 2" in found.notes[0]


def test_nothing_left_is_no_evidence() -> None:
    trial = Trial(
        [Contender("m:1", CLASSES, Seen.of(digests(7), digests()))], CLASSES, leave_out_seen=True
    )
    assert not trial.admit(digests(7), 1).any()
    with pytest.raises(NoEvidence, match="all 1 samples were left out"):
        trial.findings()


def test_classes_that_one_does_not_know_are_told_apart() -> None:
    fewer = ("b", "a")
    trial = Trial(
        [Contender("m:2", CLASSES), Contender("m:1", fewer)], CLASSES, leave_out_seen=True
    )
    trial.admit(None, 5)
    trial.count(batch("aabcc", (CLASSES, "aabcb"), (fewer, "aabaa")))
    found = trial.findings()
    [apart] = found.apart
    assert (apart.label, apart.unknown_to, apart.num_samples, apart.recall) == (
        *("c", ("m:1",), 2, 0.5),
    )
    assert [report and report.num_samples for report in found.reports] == [5, 3]
    assert found.comparison is not None
    assert (found.comparison.num_samples, found.comparison.num_both_right) == (3, 3)


def test_a_single_version_must_know_every_class() -> None:
    with pytest.raises(ClassesUnknown, match="m:1 has no label c; its labels are b, a"):
        Trial([Contender("m:1", ("b", "a"))], CLASSES, leave_out_seen=False)


def test_equal_losses_keep_the_first_however_they_are_batched() -> None:
    found = []
    for size in (3, 50):
        trial = Trial([Contender("m:1", CLASSES)], CLASSES, leave_out_seen=False)
        whole = batch("a" * 50, (CLASSES, "b" * 50))
        for rows in torch.arange(50).split(size):
            trial.count(Answered(rows, whole.targets[rows], (whole.logits[0][rows],)))
        found.append([one.index for one in trial.findings().mistakes])
    assert found[0] == found[1] == list(range(24))
