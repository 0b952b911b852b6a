"""The report's figures: scikit-learn and torchmetrics are the oracles."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from training.report import Counts, Report, ReportError, wilson_interval

NUM_CLASSES = 7
LABELS = [f"class {i}" for i in range(NUM_CLASSES)]


def random_predictions(seed: int = 0, n: int = 1500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(NUM_CLASSES, (n,), generator=generator)
    logits = torch.randn(n, NUM_CLASSES, generator=generator)
    logits[torch.arange(n), targets] += 1.0
    return logits, targets


def skewed_predictions() -> tuple[Tensor, Tensor]:
    """Class 0 is most of it, class 5 never occurs, class 6 is neither there nor predicted."""
    logits, targets = random_predictions(seed=1)
    targets = torch.where(torch.arange(len(targets)) % 10 > 0, 0, targets.clamp(max=4))
    logits[:, 6] -= 50
    return logits * 2, targets


def few_predictions() -> tuple[Tensor, Tensor]:
    logits, targets = random_predictions(seed=2, n=5)
    return logits, targets


DATA = [random_predictions, skewed_predictions, few_predictions]


def counted(logits: Tensor, targets: Tensor, batch_size: int = 64) -> Report:
    counts = Counts(logits.shape[1])
    for x, y in zip(logits.split(batch_size), targets.split(batch_size), strict=True):
        counts.update(x, y)
    return counts.report(LABELS)


@pytest.mark.parametrize("data", DATA)
def test_scikit_learn_agrees(data):
    logits, targets = data()
    report = counted(logits, targets)
    probabilities = logits.double().softmax(1).numpy()
    y, predicted, every = targets.numpy(), logits.argmax(1).numpy(), list(range(NUM_CLASSES))

    assert report.accuracy == pytest.approx(sk.accuracy_score(y, predicted), abs=1e-6)
    assert np.array_equal(report.confusion, sk.confusion_matrix(y, predicted, labels=every))
    assert report.negative_log_likelihood == pytest.approx(
        sk.log_loss(y, probabilities, labels=every), abs=1e-6
    )
    assert report.brier_score == pytest.approx(
        sk.brier_score_loss(y, probabilities, labels=every, scale_by_half=False), abs=1e-6
    )
    for k in (3, 5):
        expected = sk.top_k_accuracy_score(y, probabilities, k=k, labels=every)
        assert report.top_k[k] == pytest.approx(expected, abs=1e-6)
    figures = sk.precision_recall_fscore_support(y, predicted, labels=every, zero_division=0)
    ours = [[c.precision, c.recall, c.f1, c.support] for c in report.classes]
    assert np.allclose(np.array(ours).T, np.array(figures), atol=1e-6)


@pytest.mark.parametrize("data", DATA)
def test_scikit_learn_agrees_on_macro_averages(data):
    logits, targets = data()
    report = counted(logits, targets)
    expected = sk.precision_recall_fscore_support(
        targets.numpy(), logits.argmax(1).numpy(), average="macro", zero_division=0
    )
    ours = (report.macro_precision, report.macro_recall, report.macro_f1)
    assert ours == pytest.approx(expected[:3], abs=1e-6)


@pytest.mark.slow  # importing torchmetrics takes ten seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("data", DATA)
def test_torchmetrics_agrees(data):
    from torchmetrics.functional import classification as tm

    logits, targets = data()
    report = counted(logits, targets)

    def oracle(function, **options):
        return function(logits, targets, num_classes=NUM_CLASSES, **options).double().tolist()

    assert report.accuracy == pytest.approx(
        oracle(tm.multiclass_accuracy, average="micro"), abs=1e-6
    )
    assert report.top_k[3] == pytest.approx(
        oracle(tm.multiclass_accuracy, average="micro", top_k=3), abs=1e-6
    )
    assert np.array_equal(report.confusion, oracle(tm.multiclass_confusion_matrix))
    assert report.calibration_error == pytest.approx(
        oracle(tm.multiclass_calibration_error, n_bins=15), abs=1e-6
    )
    for figure in ("precision", "recall", "f1_score"):
        function, ours = getattr(tm, f"multiclass_{figure}"), figure.removesuffix("_score")
        each = [getattr(one, ours) for one in report.classes]
        assert each == pytest.approx(oracle(function, average="none"), abs=1e-6)
        macro = getattr(report, f"macro_{ours}")
        assert macro == pytest.approx(oracle(function, average="macro"), abs=1e-6)


@pytest.mark.parametrize("data", DATA)
def test_calibration_error_is_its_definition(data):
    logits, targets = data()
    logits[0] = torch.eye(NUM_CLASSES)[0] * 1000  # a confidence of exactly 1
    report = counted(logits, targets)
    confidence, predicted = logits.double().softmax(1).max(1)
    expected = 0.0
    for lower in range(15):
        inside = (confidence * 15 >= lower) & ((confidence * 15 < lower + 1) | (lower == 14))
        if inside.any():
            right = (predicted == targets)[inside].double().mean()
            expected += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert report.calibration_error == pytest.approx(expected, abs=1e-9)
    assert sum(one.count for one in report.bins) == len(targets)


@given(right=st.integers(0, 50), wrong=st.integers(0, 50))
def test_wilson_interval_holds_the_share(right, wrong):
    if right + wrong:
        low, high = wilson_interval(right, right + wrong)
        assert 0 <= low <= right / (right + wrong) + 1e-12
        assert right / (right + wrong) <= high + 1e-12 <= 1 + 1e-11


def test_wilson_interval_of_a_published_example():
    # Newcombe 1998, table I, method 3: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_how_it_was_batched_changes_nothing():
    logits, targets = random_predictions()
    assert counted(logits, targets, 1).confusion == counted(logits, targets, 999).confusion
    one, other = counted(logits, targets, 7).figures(), counted(logits, targets, 500).figures()
    assert one == pytest.approx(other, abs=1e-12)


def test_most_confused_pairs_come_first():
    counts = Counts(3)
    predictions = torch.tensor([0, 1, 1, 1, 2, 0, 2])
    counts.update(torch.eye(3)[predictions] * 9, torch.tensor([0, 0, 0, 0, 1, 1, 2]))
    pairs = counts.report(["a", "b", "c"]).confused_pairs
    assert [(one.target, one.predicted, one.count) for one in pairs] == [
        ("a", "b", 3),
        ("b", "a", 1),
        ("b", "c", 1),
    ]
    assert pairs[0].share_of_target == pytest.approx(3 / 4)


def test_ties_are_answered_as_argmax_answers_them():
    counts = Counts(3)
    counts.update(torch.zeros(4, 3), torch.tensor([0, 0, 0, 2]))
    report = counts.report(["a", "b", "c"], top_k=(1, 2, 3))
    assert report.accuracy == report.top_k[1] == 0.75
    assert report.top_k == {1: 0.75, 2: 0.75, 3: 1.0}


def test_logits_that_differ_by_a_last_bit_are_no_tie():
    counts = Counts(3)
    counts.update(torch.tensor([[1e-30, 2e-30, 0.5e-30]]), torch.tensor([1]))
    assert counts.accuracy == 1.0


def test_report_is_json_with_finite_numbers():
    report = counted(torch.randn(20, NUM_CLASSES) * 1e30, torch.zeros(20, dtype=torch.int64))
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert read["accuracy"] == report.accuracy
    assert len(read["confusion"]) == NUM_CLASSES
    assert all(math.isfinite(value) for value in report.figures().values())


@pytest.mark.parametrize(
    ("logits", "targets", "sentence"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), "do not fit 7 classes"),
        (torch.zeros(2, 7), torch.tensor([0]), "do not fit"),
        (torch.zeros(1, 7), torch.tensor([7]), "target 7 is no class"),
        (torch.zeros(1, 7), torch.tensor([-1]), "target -1 is no class"),
        (torch.full((1, 7), torch.nan), torch.tensor([0]), "not finite"),
        (torch.full((1, 7), torch.inf), torch.tensor([0]), "not finite"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_changes_nothing(logits, targets, sentence):
    counts = Counts(NUM_CLASSES)
    with pytest.raises(ReportError, match=sentence):
        counts.update(logits, targets)
    assert counts.num_samples == 0


def test_nothing_counted_is_no_report():
    with pytest.raises(ReportError, match="nothing to report"):
        Counts(2).report(["a", "b"])
    with pytest.raises(ReportError, match="1 labels for 2 classes"):
        Counts(2).report(["a"])


def test_memory_does_not_grow_with_the_data():
    logits, targets = random_predictions(n=256)
    counts = Counts(NUM_CLASSES)
    held = [value for value in vars(counts).values() if isinstance(value, Tensor)]
    counts.update(logits, targets)
    tracemalloc.start()
    for _ in range(20):
        counts.update(logits, targets)
    early, _ = tracemalloc.get_traced_memory()
    for _ in range(200):
        counts.update(logits, targets)
    late, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    now = [value for value in vars(counts).values() if isinstance(value, Tensor)]
    assert counts.num_samples == 221 * 256
    assert all(one is other for one, other in zip(held, now, strict=True))
    assert late - early < 10_000
