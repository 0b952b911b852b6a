"""What goes wrong under jobs of a real server: a reason in words, and predictions go on."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import publish_cnn
from test_fine_tuning_client import Asker, ended, sent, serving, until

from models.store import ModelStore

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.slow
ENDLESS = {"epochs": 100_000, "batch_size": 8, "validation": "none"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose store holds `digits`, to be asked all the time."""
    home = tmp_path_factory.mktemp("home")
    publish_cnn(ModelStore(home / "models"), "digits", seed=1)
    return home


@pytest.fixture(scope="module")
def served(home: Path) -> Iterator[tuple[str, int]]:
    with serving(home) as found:
        yield found


@pytest.fixture
def client(served: tuple[str, int]) -> Iterator[Any]:
    """A client; meanwhile every prediction must be answered."""
    with (
        openai.OpenAI(base_url=served[0], api_key="none", max_retries=0) as client,
        Asker(served[0], "digits") as asker,
    ):
        yield client
    assert asker.faults == []
    assert asker.versions


def submitted(client: Any, name: str, file: str, **hyperparameters: Any) -> Any:
    method = {
        "type": "from_scratch",
        "from_scratch": {"hyperparameters": {**ENDLESS, **hyperparameters}},
    }
    return client.fine_tuning.jobs.create(
        model="cnn", training_file=file, suffix=name, method=method
    )


def under_way(client: Any, job: Any) -> Any:
    return until(client, job, lambda found: found.progress.get("phase") in ("train", "epoch"))


def test_a_dataset_that_is_deleted_under_a_queued_job_is_named(client: Any) -> None:
    first = submitted(client, "first", sent(client, 100))
    file = sent(client, 200)
    second = submitted(client, "second", file)
    client.files.delete(file)
    client.fine_tuning.jobs.cancel(first.id)
    failed = ended(client, second)
    assert failed.status == "failed"
    assert file in failed.error.message


def test_a_loss_that_diverges_ends_its_job(client: Any) -> None:
    job = submitted(client, "wild", sent(client, 300), optimizer="sgd", learning_rate=1e30)
    failed = ended(client, job)
    assert (failed.status, failed.error.code) == ("failed", "loss_not_finite")
    assert "the loss of step" in failed.error.message


def test_a_disk_that_is_full_pauses_a_job_until_there_is_room(
    client: Any, served: tuple[str, int]
) -> None:
    job = submitted(client, "full", sent(client, 400))
    under_way(client, job)
    children = psutil.Process(served[1]).children(recursive=True)
    work = next(one for one in children if "app.jobs.work" in " ".join(one.cmdline()))
    work.rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))
    client.fine_tuning.jobs.pause(job.id)
    paused = until(client, job, lambda found: found.status == "paused")
    assert "the disk is full" in paused.reason
    client.fine_tuning.jobs.resume(job.id)
    under_way(client, job)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_locked_database_is_told_and_the_job_goes_on(client: Any, home: Path) -> None:
    job = submitted(client, "locked", sent(client, 500))
    under_way(client, job)
    with closing(sqlite3.connect(home / "jobs.db", isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(openai.InternalServerError) as caught:
            client.fine_tuning.jobs.retrieve(job.id)
        assert caught.value.status_code == 503
        assert "database" in caught.value.message
        time.sleep(2)
        database.execute("ROLLBACK")
    assert until(client, job, lambda found: found.status == "running").attempt == 1
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_job_that_needs_more_memory_than_it_may_have_says_so(tmp_path: Path) -> None:
    publish_cnn(ModelStore(tmp_path / "models"), "digits", seed=1)
    with (
        serving(tmp_path, PYTORCHLIB_JOB_MEMORY_MB="100") as (url, _),
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        Asker(url, "digits") as asker,
    ):
        failed = ended(client, submitted(client, "large", sent(client, 600)))
    assert (failed.status, failed.error.code) == ("failed", "out_of_memory")
    assert "100 MiB is its limit" in failed.error.message
    assert asker.faults == []
