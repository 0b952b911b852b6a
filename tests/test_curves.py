"""The curves of a run: from events to lines, over HTTP, and under a signed link."""

import io
import re
import zipfile
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app.api.curves import Curves, curves_of, ticks
from app.auth.store import KeyStore
from app.jobs.job import EventType, Job, Kind, NewEvent, NewJob
from app.jobs.store import JobStore
from app.main import create_app
from app.settings import Settings
from models.store import ModelStore


@pytest.fixture
def client(store: ModelStore) -> Iterator[TestClient]:
    settings = Settings(home=store.folder.parent, device="cpu", threads=1, jobs=False)
    with TestClient(create_app(settings), "http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
def jobs(client: TestClient) -> JobStore:
    found: JobStore = client.app.state.jobs  # type: ignore[attr-defined]
    return found


def begun(jobs: JobStore, name: str = "parts") -> Job:
    options = {"method": "from_scratch", "name": name}
    jobs.create(NewJob(Kind.FINE_TUNING, options, dataset="dset-1"))
    job = jobs.claim((Kind.FINE_TUNING,), "somebody")
    assert job is not None
    return job


def train(step: int, loss: float) -> dict[str, Any]:
    return {"phase": "train", "step": step, "loss": loss, "accuracy": 0.5, "learning_rate": 0.01}


def epoch(number: int, step: int, loss: float | None, accuracy: float | None) -> dict[str, Any]:
    numbers = {"loss": loss, "accuracy": accuracy, "metrics": {"train_loss": 1 / number}}
    return {"phase": "epoch", "step": step, "epoch": number, "learning_rate": 0.01, **numbers}


def record(jobs: JobStore, job: Job, *data: dict[str, Any]) -> None:
    jobs.record(job, [NewEvent("step", type=EventType.METRICS, data=one) for one in data])


def test_what_an_interruption_undid_is_drawn_once(jobs: JobStore) -> None:
    job = begun(jobs)
    first = (train(10, 3.0), train(20, 2.0), epoch(1, 20, 1.0, 0.5), train(30, 1.5))
    again = (train(15, 2.4), epoch(1, 20, 0.9, 0.6), {"phase": "features", "step": 3})
    record(jobs, job, *first, *again)
    events, is_whole = jobs.metrics(job.id, most=100)
    curves = curves_of(events)
    assert is_whole
    assert [(one["step"], one["loss"]) for one in curves.reports] == [(10, 3.0), (15, 2.4)]
    assert [(one["step"], one["loss"]) for one in curves.epochs] == [(20, 0.9)]


def test_the_best_epoch_is_the_one_that_a_run_keeps() -> None:
    curves = Curves()
    for one in (epoch(1, 5, 0.9, 0.8), epoch(2, 10, 0.7, 0.9), epoch(3, 15, 0.6, 0.9)):
        curves.add(one)
    curves.add(epoch(4, 20, 0.6, 0.9))
    assert curves.best is not None
    assert curves.best["epoch"] == 3
    silent = Curves()
    silent.add(epoch(1, 5, None, None))
    assert silent.best is None


def test_of_many_events_some_of_each_kind_are_read(jobs: JobStore) -> None:
    job = begun(jobs)
    record(jobs, job, *(one for n in range(1, 101) for one in (train(n, 1.0), epoch(n, n, 1, 1))))
    events, is_whole = jobs.metrics(job.id, most=50)
    assert not is_whole
    assert len(events) <= 50
    assert {one.data["phase"] for one in events} == {"train", "epoch"}


def test_the_picture_says_what_it_shows_and_nothing_else_gets_in(
    client: TestClient, jobs: JobStore
) -> None:
    job = begun(jobs, name="<script>alert(1)</script>")
    url = f"/v1/fine_tuning/jobs/{job.id}/curves"
    assert "Nothing has been measured yet" in client.get(url).text
    record(jobs, job, train(10, 2.0), epoch(1, 10, 1.0, 0.5), epoch(2, 20, float("nan"), 0.75))
    answer = client.get(url)
    assert answer.headers["content-type"] == "image/svg+xml"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    root = ElementTree.fromstring(answer.text)
    texts = [text for one in root.iter() for text in (one.text, one.tail) if text]
    for wanted in ("loss ", "in nats", "accuracy ", "in %", "learning rate ", "steps"):
        assert wanted in texts
    assert any(text.startswith("best: epoch 2, step 20, 75.0 % right") for text in texts)
    assert "<script" not in answer.text
    assert "prefers-color-scheme: dark" in answer.text
    assert not re.search(r"nan|inf\b", " ".join(re.findall(r'points="([^"]*)"', answer.text)))


def test_a_browser_opens_it_by_the_link_in_the_job(
    client: TestClient, jobs: JobStore, store: ModelStore
) -> None:
    job = begun(jobs)
    folder = store.folder.parent / "runs" / job.id / "events"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1").write_bytes(b"curves")
    _, token = KeyStore(store.folder.parent).create("tunes", ("finetune",))
    client.app.state.gate._keys.look()  # type: ignore[attr-defined]
    url = f"/v1/fine_tuning/jobs/{job.id}"
    told = client.get(url, headers={"Authorization": f"Bearer {token}"}).json()
    assert client.get(f"{url}/curves").status_code == 401
    assert client.get(told["curves_url"]).status_code == 200
    assert client.get(told["curves_url"].replace("/curves", "/tensorboard")).status_code == 401
    with zipfile.ZipFile(io.BytesIO(client.get(told["tensorboard_url"]).content)) as archive:
        assert archive.read(f"{job.id}/events.out.tfevents.1") == b"curves"


def test_what_has_no_curves_is_not_found(client: TestClient, jobs: JobStore) -> None:
    url = "/v1/fine_tuning/jobs"
    assert client.get(f"{url}/{begun(jobs).id}/tensorboard").status_code == 404
    other = jobs.create(NewJob(Kind.EVALUATION, {}))
    for job_id in ("ftjob-0", other.id):
        assert client.get(f"{url}/{job_id}/curves").status_code == 404


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_the_marks_of_an_axis_hold_all_of_it(one: float, other: float) -> None:
    low, high = sorted((one, other))
    marks = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-300) + 1e-9 * (high - low)
    assert marks[0][0] <= low + slack
    assert marks[-1][0] >= high - slack
    assert 2 <= len(marks) <= 8
