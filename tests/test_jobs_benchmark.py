"""The benchmark of questions about jobs in a short form: thousands of them cost no multiple."""

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.jobs import OPERATIONS, measured

MOST = 3.0
"""Far more than the benchmark's own goal: tests share their machine with others."""


@pytest.mark.slow
def test_thousands_of_jobs_cost_what_ten_do(tmp_path: Path) -> None:
    ratios, medians = measured(tmp_path, Namespace(many=5000, rounds=5, repeats=4))
    assert ratios.keys() == set(OPERATIONS)
    assert all(value > 0 for figures in medians.values() for value in figures.values())
    assert all(one.median < MOST for one in ratios.values()), ratios
