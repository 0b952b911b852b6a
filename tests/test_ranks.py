"""Several processes that share the steps of one run, on this machine's processors."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from test_fit import config, digest, fresh, opened, pairs, small_cnn, stop_at
from torch import nn

from models import checkpoint
from models.manifest import NetworkSpec
from models.store import ModelStore
from training.datasets import open_dataset
from training.fine_tune import work
from training.fit import FitResult, Team, fit
from training.progress import Progress, drive
from training.ranks import RankFailed, RankLost, Ranks, started
from training.task import Unshareable

MLP = NetworkSpec(name="mlp", options={"inputs": 64, "hidden": [16], "num_classes": 2})
DROPPING = NetworkSpec(name="mlp", options={**MLP.options, "dropout": 0.3})
CNN = NetworkSpec(name="cnn", options={"channels": 1, "size": 8, "num_classes": 2, "width": 4})
NUM = 43
"""Samples; the last batch of 8 has seven."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One other process for all tests here, because it takes seconds to start."""
    with started(2) as ranks:
        yield ranks


def trained(ranks: Ranks | None = None, spec: NetworkSpec = MLP, **changes: Any) -> FitResult:
    settings = config(report_every=1, **changes)
    network = small_cnn() if spec is CNN else fresh(spec.options.get("dropout", 0.0))
    team = Team(ranks, spec) if ranks else None
    return drive(fit(network, opened(settings, NUM), settings, team=team))


def farthest(first: nn.Module, second: nn.Module) -> float:
    both = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return max(float((one.double() - other.double()).abs().max()) for one, other in both)


EVERYTHING = {
    "augment": "digits",
    "mixup": 0.3,
    "label_smoothing": 0.1,
    "gradient_clip": 1.0,
    "weight_decay": 0.05,
    "class_weights": "balanced",
    "ema_decay": 0.9,
    "schedule": "one-cycle",
}


@pytest.mark.slow  # each starts a process that imports torch
@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd"}, EVERYTHING])
def test_two_processes_learn_what_one_learns(changes: dict[str, Any], ranks: Ranks) -> None:
    alone, together = trained(**changes), trained(ranks, **changes)
    assert farthest(alone.network, together.network) < 1e-5
    for one, other in zip(alone.history, together.history, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert other.validation_loss == pytest.approx(one.validation_loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, EVERYTHING])
def test_what_dropout_draws_for_a_sample_does_not_depend_on_its_process(
    changes: dict[str, Any], ranks: Ranks
) -> None:
    alone, together = (trained(who, DROPPING, **changes).network for who in (None, ranks))
    assert farthest(alone, together) < 1e-5
    assert farthest(alone, trained(None, MLP, **changes).network) > 1e-3


@pytest.mark.slow
def test_twice_gives_the_same_bits(ranks: Ranks) -> None:
    first, second = trained(ranks, CNN, augment="shift"), trained(ranks, CNN, augment="shift")
    assert digest(first.network) == digest(second.network)
    assert first.history == second.history
    assert first.environment["processes"] == "2"


@pytest.mark.slow
def test_statistics_of_batch_norms_come_from_all_samples(ranks: Ranks) -> None:
    """A mean over both halves is the mean over all; one rank's own would be far from it."""
    once = {"epochs": 1, "batch_size": 64, "validation_fraction": 0.0}
    alone, together = (trained(who, CNN, **once).network for who in (None, ranks))
    names = [name for name in alone.state_dict() if name.endswith("running_mean")]
    assert names
    for name in names[:1]:  # what lies below the first norm does not depend on how it normalises
        found, expected = together.state_dict()[name], alone.state_dict()[name]
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 7])
def test_stopping_and_resuming_gives_the_bits_of_never_stopping(
    step: int, ranks: Ranks, tmp_path: Path
) -> None:
    settings = config(report_every=1, **EVERYTHING)
    team, dataset = Team(ranks, MLP), opened(settings, NUM)
    stop_at(fit(fresh(), dataset, settings, snapshots=tmp_path, team=team), step)
    resumed = drive(fit(fresh(), dataset, settings, snapshots=tmp_path, team=team))
    assert digest(resumed.network) == digest(trained(ranks, **EVERYTHING).network)
    assert resumed.notes == ()


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_says_so(ranks: Ranks, tmp_path: Path) -> None:
    settings = config(report_every=1)
    dataset = opened(settings, NUM)
    stop_at(fit(fresh(), dataset, settings, snapshots=tmp_path, team=Team(ranks, MLP)), 7)
    alone = drive(fit(fresh(), dataset, settings, snapshots=tmp_path))
    assert "resumed with processes 1 where it was 2" in alone.notes[0]
    assert alone.history[-1].step == 15


@pytest.mark.slow
def test_stop_ends_at_the_same_step_and_the_ranks_go_on_with_another_run(ranks: Ranks) -> None:
    settings = config(report_every=1, epochs=5)
    steps: list[int] = []
    loop = fit(
        fresh(), opened(settings, NUM), settings, stop=lambda: len(steps) > 6, team=Team(ranks, MLP)
    )
    steps.extend(progress.step for progress in loop if progress.phase == "train")
    assert len(trained(ranks).history) == 3


@pytest.mark.slow
def test_samples_that_cannot_be_given_away_are_refused_in_words(ranks: Ranks) -> None:
    settings = config(memory_budget_mb=0)
    with pytest.raises(Unshareable, match="raise --memory-budget-mb"):
        drive(fit(fresh(), opened(settings, NUM), settings, team=Team(ranks, MLP)))


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_reason() -> None:
    settings = config()
    other = NetworkSpec(name="mlp", options={"inputs": 64, "hidden": [3], "num_classes": 2})
    with started(2) as ranks, pytest.raises(RankFailed, match="(?s)rank 1 failed: .*size mismatch"):
        drive(fit(fresh(), opened(settings, NUM), settings, team=Team(ranks, other)))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_killed_rank_ends_the_run_at_once_and_resuming_gives_the_same_bits(
    num_ranks: int, tmp_path: Path
) -> None:
    settings = config(report_every=1, snapshot_seconds=0, **EVERYTHING)
    dataset, others = opened(settings, NUM), set(psutil.Process().children())
    with started(num_ranks) as ranks:
        team = Team(ranks, MLP)
        whole = drive(fit(fresh(), dataset, settings, team=team))
        loop = fit(fresh(), dataset, settings, snapshots=tmp_path, team=team)
        next(one for one in loop if one.phase == "train" and one.step == 6)
        children = [one for one in psutil.Process().children() if one not in others]
        children[-1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(RankLost, match=f"rank {num_ranks - 1} was killed by SIGKILL"):
            drive(loop)
        assert time.monotonic() - began < 10
    assert not any(child.is_running() for child in children)
    with started(num_ranks) as ranks:
        resumed = drive(fit(fresh(), dataset, settings, snapshots=tmp_path, team=Team(ranks, MLP)))
    assert digest(resumed.network) == digest(whole.network)


@pytest.mark.slow
def test_a_rank_that_dies_before_it_begins_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.ranks.FOLLOW", "raise SystemExit(7)")
    settings = config()
    with started(2) as ranks, pytest.raises(RankLost, match="rank 1 ended with status 7 before"):
        drive(fit(fresh(), opened(settings, NUM), settings, team=Team(ranks, MLP)))


LONG = """
import sys
sys.path[:0] = ["tests", "."]
from test_fit import config, fresh, opened
from test_ranks import MLP
from training.fit import Team, fit
from training.ranks import started

settings = config(report_every=1, epochs=100000)
with started(2) as ranks:
    for progress in fit(fresh(), opened(settings), settings, team=Team(ranks, MLP)):
        print(progress.step, flush=True)
"""


@pytest.mark.slow
def test_no_rank_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        (follower,) = psutil.Process(process.pid).children()
        process.kill()
    gone, alive = psutil.wait_procs([follower], timeout=5)
    assert (len(gone), len(alive)) == (1, 0)
    assert not list(tmp_path.glob("pytorchlib-*"))


@pytest.mark.slow
def test_pictures_that_are_streamed_are_shared_too(ranks: Ranks, tmp_path: Path) -> None:
    for index, (pixels, label) in enumerate(pairs(NUM)):
        (tmp_path / label).mkdir(exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(tmp_path / label / f"{index}.png")
    found = []
    for budget_mb in (0, 64):
        settings = config(
            dataset=str(tmp_path), picture_size=8, memory_budget_mb=budget_mb, num_workers=1
        )
        dataset = drive(open_dataset(settings))
        found.append(drive(fit(fresh(), dataset, settings, team=Team(ranks, MLP))).network)
    assert digest(found[0]) == digest(found[1])


@pytest.mark.slow
def test_fine_tuning_shares_the_steps_of_all_layers(store: ModelStore, tmp_path: Path) -> None:
    options = {
        "base": "digits:1",
        "dataset": "digits",
        "method": "fine_tune",
        "hyperparameters": {"head_epochs": 1, "epochs": 1, "validation": "split"},
    }
    home, results = store.folder.parent, []
    for num in (1, 2):
        asked = {**options, "name": f"by-{num}", "compute": {"num_processes": num, "threads": 1}}
        results.append(drive(work(asked, home=home, folder=tmp_path / str(num), run=f"run-{num}")))
    assert [one["environment"]["processes"] for one in results] == ["1", "2"]
    first, second = (checkpoint.load(store.resolve(one["version"]).folder) for one in results)
    assert farthest(first.network, second.network) < 1e-4


def running(
    ranks: Ranks, others: set[psutil.Process]
) -> tuple[Generator[Progress, None, FitResult], list[psutil.Process]]:
    """A run after its first step, and the processes of the other ranks."""
    settings = config(report_every=1, epochs=100)
    loop = fit(fresh(), opened(settings, NUM), settings, team=Team(ranks, MLP))
    next(loop)
    return loop, [one for one in psutil.Process().children() if one not in others]


@pytest.mark.slow
def test_a_rank_that_stands_still_is_waited_for() -> None:
    others = set(psutil.Process().children())
    with started(2) as ranks:
        loop, (still,) = running(ranks, others)
        still.suspend()
        threading.Timer(2.5, still.resume).start()  # a look at the others comes each second
        assert next(loop).step == 2
        loop.close()


@pytest.mark.slow
def test_a_rank_that_stands_still_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on too late, ends because the sum is lost, and is not blamed for that end."""
    monkeypatch.setattr("training.ranks.SUM_S", 8.0)
    monkeypatch.setattr("training.ranks.REASON_S", 6.0)  # it has ended by then
    others = set(psutil.Process().children())
    with started(2) as ranks:
        loop, (still,) = running(ranks, others)
        look = ranks._why

        def late(cause: Exception) -> Exception:
            still.resume()
            return look(cause)

        monkeypatch.setattr(ranks, "_why", late)
        still.suspend()
        with pytest.raises(RankLost, match="a rank does not answer"):
            drive(loop)
