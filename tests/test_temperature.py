"""The fitted temperature: scipy's optimizer is the oracle, and memory has a bound."""

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from training.report import Counts
from training.temperature import MAX_LOGITS, MAX_SAMPLES, KeptLogits, fit_temperature


def overconfident(num: int = 800, scale: float = 3.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num, 5, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return logits * scale, targets


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0, 15.0])
def test_scipy_finds_the_same_temperature(scale: float) -> None:
    logits, targets = overconfident(scale=scale)

    def loss(temperature: float) -> float:
        return F.cross_entropy(logits.double() / temperature, targets).item()

    oracle = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-9})
    fitted = fit_temperature(logits, targets)
    assert fitted is not None
    assert fitted.value == pytest.approx(oracle.x, rel=1e-5)
    assert fitted.negative_log_likelihood == pytest.approx(oracle.fun, abs=1e-9)
    assert fitted.value == pytest.approx(scale, rel=0.15)


def test_the_report_has_it_however_it_was_batched() -> None:
    logits, targets = overconfident()
    found = []
    for size in (7, 800):
        counts = Counts(5)
        for x, y in zip(logits.split(size), targets.split(size), strict=True):
            counts.update(x, y)
        found.append(counts.report(list("abcde")).temperature)
    assert found[0] == found[1] == fit_temperature(logits, targets)


@pytest.mark.parametrize("targets", [[0, 1, 2], [1, 2, 0]])
def test_where_no_temperature_is_best_there_is_none(targets: list[int]) -> None:
    assert fit_temperature(torch.eye(3), torch.tensor(targets)) is None


def test_nothing_was_offered() -> None:
    assert KeptLogits(3).fit() is None


def test_a_bounded_share_of_many_samples_finds_nearly_the_same() -> None:
    kept = KeptLogits(5)
    for seed in range(40):
        kept.add(*overconfident(num=1000, seed=seed))
    fitted = kept.fit()
    assert fitted is not None
    assert fitted.num_samples == MAX_SAMPLES
    assert fitted.value == pytest.approx(3.0, rel=0.05)


def test_every_sample_is_kept_with_the_same_probability() -> None:
    kept = KeptLogits(MAX_LOGITS // 50)
    assert kept.max_samples == 50
    kept = KeptLogits(1)
    kept.max_samples, rows = 500, torch.arange(2000.0).unsqueeze(1)
    for some in rows.split(64):
        kept.add(some, torch.zeros(len(some), dtype=torch.int64))
    held = kept._logits[:500, 0]
    assert len(held.unique()) == 500
    assert held.mean() == pytest.approx(1000, abs=100)
