"""OpenAI's own client against a real server: send pictures, tune, watch, ask what came of it."""

import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import ROOT
from test_dataset_api import zipped

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow
BASE = {"type": "from_scratch", "from_scratch": {"hyperparameters": {"epochs": 4, "batch_size": 8}}}
ENDED = {"succeeded", "failed", "cancelled"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server over an empty home, with its worker."""
    with serving(tmp_path_factory.mktemp("home")) as (url, _):
        yield url


@contextmanager
def serving(home: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """The address of a real server over `home`, and its process."""
    from benchmarks.system import free_port, is_ready

    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--home", str(home), "--port", str(port)]
    command += ["--device", "cpu", "--threads", "1", "--job-threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    log = (home / "log").open("wb")
    with log, subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log) as process:
        try:
            until = time.monotonic() + 180
            while not is_ready(port, "/readyz"):
                assert time.monotonic() < until, (home / "log").read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1", process.pid
        finally:
            process.kill()


class Asker(threading.Thread):
    """Asks a model again and again, and notes every answer that is none, and who gave the rest."""

    def __init__(self, server: str, model: str) -> None:
        super().__init__(daemon=True)
        self.url = f"{server}/models/{model}/predict"
        self.faults: list[str] = []
        self.versions: list[int] = []
        self._enough = threading.Event()

    def run(self) -> None:
        picture = {"file": ("p.png", shaded(7777, 170), "image/png")}
        with httpx.Client(timeout=30) as client:
            while not self._enough.wait(0.05):
                answer = client.post(self.url, files=picture)
                if answer.status_code == 200:
                    self.versions.append(answer.json()["version"])
                else:
                    self.faults.append(answer.text)

    def __enter__(self) -> "Asker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self.join(60)


@pytest.fixture
def client(server: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=server, api_key="none", max_retries=0) as client:
        yield client


def dark_and_light(num: int = 14) -> bytes:
    """Two classes that a tiny network learns at once, in three parts."""
    files = {}
    for part, count in (("train", num), ("val", 4), ("test", 4)):
        for index in range(count):
            seed = index + {"train": 0, "val": 100, "test": 200}[part]
            files[f"{part}/dark/{index}.png"] = shaded(seed, 0)
            files[f"{part}/light/{index}.png"] = shaded(1000 + seed, 170)
    return zipped(files)


def shaded(seed: int, least: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(least, least + 80, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def file_id(client: Any) -> str:
    sent = client.files.create(
        file=("shades.zip", dark_and_light(), "application/zip"), purpose="fine-tune"
    )
    assert sent.status == "processed"
    return str(sent.id)


def until(client: Any, job: Any, holds: Callable[[Any], bool], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not holds(found := client.fine_tuning.jobs.retrieve(job.id)):
        assert time.monotonic() < deadline, found
        assert found.status not in ENDED, found.error
        time.sleep(0.2)
    return found


def ended(client: Any, job: Any) -> Any:
    return until(client, job, lambda found: found.status in ENDED)


def test_from_pictures_to_answers(client: Any, server: str, file_id: str) -> None:
    assert [one.id for one in client.files.list()] == [file_id]
    assert client.files.retrieve(file_id).filename == "shades.zip"
    jobs = client.fine_tuning.jobs
    first = ended(
        client,
        jobs.create(model="cnn", training_file=file_id, suffix="shades", seed=3, method=BASE),
    )
    assert (first.status, first.fine_tuned_model) == ("succeeded", "shades:1"), first.error
    assert first.metrics["accuracy"] == 1.0
    assert first.resolved["learning_rate"]["reason"]
    assert first.hyperparameters.batch_size == 8
    probe = ended(client, jobs.create(model="shades", training_file=file_id))
    assert (probe.model, probe.fine_tuned_model) == ("shades:1", "shades:2"), probe.error
    assert probe.resolved["head"]["value"] == "keep"
    assert [one.id for one in jobs.list()] == [probe.id, first.id]
    assert next(iter(client.models.list())).versions == [1, 2]
    events = list(jobs.list_events(first.id, limit=5))
    assert (events[0].message.split(":1: ")[0], events[-1].message) == (
        "published shades",
        "created",
    )
    assert {one.type for one in events} == {"message", "metrics"}
    (version,) = jobs.checkpoints.list(first.id)
    assert version.fine_tuned_model_checkpoint == "shades:1"
    picture = {"file": ("p.png", shaded(7777, 170), "image/png")}
    answer = httpx.post(f"{server}/models/shades:2/predict", files=picture).json()
    assert answer["predictions"][0]["label"] == "light"


def test_pause_resume_cancel_and_watch(client: Any, server: str, file_id: str) -> None:
    jobs = client.fine_tuning.jobs
    endless = {"epochs": 100_000, "batch_size": 8}
    method = {"type": "from_scratch", "from_scratch": {"hyperparameters": endless}}
    job = jobs.create(model="cnn", training_file=file_id, suffix="endless", method=method)
    until(client, job, lambda found: found.progress.get("phase") in ("epoch", "train", "validate"))
    jobs.pause(job.id)
    paused = until(client, job, lambda found: found.status == "paused")
    assert paused.reason == "paused"
    checkpoints = list(jobs.checkpoints.list(job.id))
    assert max(one.step_number for one in checkpoints) > 0
    jobs.resume(job.id)
    until(client, job, lambda found: found.status == "running")
    assert jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="was cancelled already"):
        jobs.resume(job.id)
    url = f"{server}/fine_tuning/jobs/{job.id}/events"
    with httpx.stream("GET", url, headers={"accept": "text/event-stream"}, timeout=20) as stream:
        ids = [line for line in stream.iter_lines() if line.startswith("id: ")]
    assert ids == [f"id: {number}" for number in range(1, len(ids) + 1)]
    assert "endless" not in [one.id for one in client.models.list()]


def test_stop_keeps_what_there_is(client: Any, server: str, file_id: str) -> None:
    jobs = client.fine_tuning.jobs
    options = {"hyperparameters": {"epochs": 100_000, "validation": "none"}}
    method = {"type": "from_scratch", "from_scratch": options}
    job = jobs.create(model="cnn", training_file=file_id, suffix="stopped", method=method)
    until(client, job, lambda found: found.progress.get("phase") in ("epoch", "train", "validate"))
    answer = httpx.post(f"{server}/fine_tuning/jobs/{job.id}/stop").json()
    assert answer["asked"] == "stop"
    assert ended(client, job).fine_tuned_model == "stopped:1"


def test_a_gate_moves_the_alias_or_says_why_not(client: Any, file_id: str) -> None:
    jobs = client.fine_tuning.jobs
    extra = {"promote": {"alias": "live", "rule": {"threshold": 0.9}}}
    better = jobs.create(
        model="cnn", training_file=file_id, suffix="gated", method=BASE, extra_body=extra
    )
    ended(client, better)
    pending = ("none", "pending")
    found = until_promoted(client, better, pending)
    assert (found["status"], found["alias"]) == ("promoted", "live"), found
    again = jobs.create(
        model="gated",
        training_file=file_id,
        extra_body={"promote": {"alias": "live", "rule": {"min_absolute_change": 0.5}}},
    )
    ended(client, again)
    found = until_promoted(client, again, pending)
    assert found["status"] == "refused", found
    assert "min_absolute_change" in found["sentence"]


def methods_of(resource: Any) -> set[str]:
    """What the client offers of a resource, but for the same in other forms."""
    names = {name for name in dir(type(resource)) if not name.startswith(("_", "with_"))}
    return {name for name in names if callable(getattr(resource, name))}


def test_every_method_of_files(client: Any) -> None:
    """What the client offers is all here: a method that it gains fails this test."""
    files = client.files
    assert methods_of(files) == {
        *("create", "retrieve", "list", "delete", "content", "retrieve_content"),
        "wait_for_processing",
    }
    sent = [
        files.create(
            file=(f"{num}.zip", dark_and_light(num), "application/zip"), purpose="fine-tune"
        )
        for num in (15, 16, 17)
    ]
    ids = [one.id for one in sent]
    assert [one.id for one in files.list(limit=1)][:3] == ids[::-1]
    assert [one.id for one in files.list(after=ids[2], limit=2).data] == [ids[1], ids[0]]
    assert files.list(order="asc").data[-1].id == ids[-1]
    assert files.retrieve(ids[0]) == sent[0]
    assert files.wait_for_processing(ids[0]).status == "processed"
    with zipfile.ZipFile(io.BytesIO(files.content(ids[0]).read())) as archive:
        names = archive.namelist()
        assert len(names) == 2 * (15 + 4 + 4)
        assert {name.split("/")[1] for name in names} == {"dark", "light"}
    # What came down goes up again, and is the same dataset.
    whole = files.content(ids[0]).content
    again = files.create(file=("again.zip", whole, "application/zip"), purpose="fine-tune")
    fingerprints = [
        httpx.get(f"{client.base_url}datasets/{one}").json()["fingerprint"]
        for one in (ids[0], again.id)
    ]
    assert fingerprints[0] == fingerprints[1]
    with pytest.warns(DeprecationWarning, match="content"):
        assert files.retrieve_content(ids[0]).startswith("PK")
    assert files.delete(ids[1]).deleted
    for ask in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(ids[1])


def test_every_method_of_jobs(client: Any, file_id: str) -> None:
    jobs = client.fine_tuning.jobs
    assert methods_of(jobs) == {
        *("create", "retrieve", "list", "list_events", "cancel", "pause", "resume"),
    }
    assert methods_of(jobs.checkpoints) == {"list"}
    tiny = {"hyperparameters": {"epochs": 2, "batch_size": 8}}
    method = {"type": "from_scratch", "from_scratch": tiny}
    made = [
        jobs.create(
            model="cnn",
            training_file=file_id,
            validation_file=file_id,
            suffix=f"walked-{number}",
            seed=number,
            metadata={"walk": str(number)},
            method=method,
        )
        for number in range(3)
    ]
    assert jobs.cancel(made[2].id).status == "cancelled"
    first = ended(client, made[0])
    assert (first.status, first.seed, first.metadata) == ("succeeded", 0, {"walk": "0"}), first
    assert (first.object, first.training_file) == ("fine_tuning.job", file_id)
    assert first.finished_at >= first.created_at
    ids = [one.id for one in made]
    assert [one.id for one in jobs.list(limit=2).data] == [ids[2], ids[1]]
    assert [one.id for one in jobs.list(limit=1)][:3] == ids[::-1]
    assert [one.id for one in jobs.list(after=ids[1], limit=1).data] == [ids[0]]
    assert [one.id for one in jobs.list(metadata={"walk": "1"})] == [ids[1]]
    every = [one.id for one in jobs.list_events(ids[0])]
    assert every == [one.id for one in jobs.list_events(ids[0], limit=1)]
    assert [one.id for one in jobs.list_events(ids[0], after=every[1], limit=2).data] == every[2:4]
    (version,) = jobs.checkpoints.list(ids[0], limit=1)
    assert jobs.checkpoints.list(ids[0], after=version.id).data == []
    with pytest.raises(openai.NotFoundError):
        jobs.retrieve("ftjob-0")
    with pytest.raises(openai.UnprocessableEntityError, match="hyperparameters"):
        jobs.create(model="cnn", training_file=file_id, hyperparameters={"n_epochs": 1})


def until_promoted(client: Any, job: Any, pending: tuple[str, ...]) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    while True:
        found: dict[str, Any] = client.fine_tuning.jobs.retrieve(job.id).promotion
        if found["status"] not in pending:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def sent(client: Any, first_seed: int, num: int = 14) -> str:
    """The id of a file of pictures without parts, the same for the same seed only."""
    shades = (("dark", 0), ("light", 170))
    files = {
        f"{name}/{seed}.png": shaded(seed + 10 * least, least)
        for name, least in shades
        for seed in range(first_seed, first_seed + num)
    }
    archive = ("shades.zip", zipped(files), "application/zip")
    return str(client.files.create(file=archive, purpose="fine-tune").id)


def test_folds_are_the_proof_and_the_server_swaps_while_it_answers(
    client: Any, server: str
) -> None:
    jobs = client.fine_tuning.jobs
    first = ended(
        client,
        jobs.create(
            model="cnn",
            training_file=sent(client, 5000),
            suffix="proven",
            method=BASE,
            extra_body={"promote": {"rule": {"threshold": 0.8}}},
        ),
    )
    assert first.result["measured_on"] == "out-of-fold"
    found = until_promoted(client, first, ("none", "pending"))
    assert found["status"] == "promoted", found
    told = jobs.retrieve(first.id)
    assert "28 samples right, between" in told.evaluation["sentence"]
    page = httpx.get(server.removesuffix("/v1") + told.evaluation["report_url"])
    assert "28 samples were answered out of fold" in page.text
    events = [one.message for one in jobs.list_events(first.id, limit=5)]
    assert any("cross-validated in 5 stratified folds" in one for one in events)
    with Asker(server, "proven") as asker:
        again = {"promote": {"rule": {"min_absolute_change": -0.2}}}
        second = jobs.create(model="proven", training_file=sent(client, 6000), extra_body=again)
        ended(client, second)
        found = until_promoted(client, second, ("none", "pending"))
        assert found["status"] == "promoted", found
        deadline = time.monotonic() + 180
        while asker.versions[-1] != 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert asker.faults == []
    assert asker.versions == sorted(asker.versions)
    told = jobs.retrieve(second.id)
    assert "Against proven:1" in told.evaluation["sentence"]
    seen_again = jobs.create(model="proven", training_file=sent(client, 6000), extra_body=again)
    ended(client, seen_again)
    found = until_promoted(client, seen_again, ("none", "pending"))
    assert (found["status"], "there is no evidence" in found["sentence"]) == ("refused", True)


def test_every_job_is_followed_by_an_evaluation(client: Any, file_id: str) -> None:
    jobs = client.fine_tuning.jobs
    made = ended(
        client, jobs.create(model="cnn", training_file=file_id, suffix="looked-at", method=BASE)
    )
    deadline = time.monotonic() + 180
    while (told := jobs.retrieve(made.id).evaluation)["status"] in ("pending", "queued", "running"):
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    assert told["status"] == "succeeded", told
    assert "samples would be enough to know it within one point" in told["sentence"]
