"""Evaluation as a generator: a tiny real network, progress on the way, a report at the end."""

import gc
import resource

import pytest
import torch
from torch import nn

from training.evaluate import evaluate
from training.progress import drive
from training.report import ReportError

LABELS = ["a", "b", "c"]


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).requires_grad_(False)


def batches(num: int, size: int = 10):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        yield torch.randn(size, 4, generator=generator), torch.randint(3, (size,))


def test_report_equals_what_the_network_says():
    network, data = tiny_network(), list(batches(5))
    report = drive(evaluate(network, data, LABELS))
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in data)
    assert report.num_samples == 50
    assert report.accuracy == pytest.approx(right / 50)


def test_progress_after_each_batch():
    steps = list(evaluate(tiny_network(), batches(4), LABELS, num_samples=40))
    assert [one.step for one in steps] == [10, 20, 30, 40]
    assert {one.num_steps for one in steps} == {40}
    assert steps[-1].seconds_left == 0
    assert steps[0].phase == "evaluate"
    assert all(one.images_per_second > 0 for one in steps)


def test_unknown_length_has_no_estimate():
    steps = list(evaluate(tiny_network(), batches(2), LABELS))
    assert [(one.num_steps, one.seconds_left) for one in steps] == [(0, None), (0, None)]


def test_closing_stops_it():
    asked = []

    def predict(x):
        asked.append(len(x))
        return torch.zeros(len(x), 3)

    loop = evaluate(predict, batches(100), LABELS)
    next(loop)
    loop.close()
    assert asked == [10]


def test_no_batch_is_no_report():
    with pytest.raises(ReportError, match="no sample"):
        drive(evaluate(tiny_network(), [], LABELS))


@pytest.mark.slow
def test_memory_is_flat():
    def run(num: int) -> int:
        drive(evaluate(tiny_network(), batches(num, 1000), LABELS))
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(20)
    after = run(500)  # 500,000 samples; their logits alone would be 6 MB
    assert after - before < 4 * 1024
