"""`/v1/fine_tuning` and `/v1/files` without a worker: what is taken, refused and shown."""

from typing import Any

import pytest
from starlette.testclient import TestClient
from test_dataset_api import ZIP, picture, two_classes, zipped

from app.auth.store import KeyStore
from app.jobs.job import EventType, Job, Kind, NewEvent, StaleWorker
from app.jobs.runner import follower_of
from app.jobs.store import JobStore
from app.main import create_app
from app.settings import Settings
from models.store import ModelStore

URL = "/v1/fine_tuning/jobs"


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {"jobs": False}


@pytest.fixture
def dataset(client: TestClient) -> str:
    answer = client.post("/v1/datasets", content=zipped(two_classes()), headers=ZIP)
    return str(answer.json()["id"])


@pytest.fixture
def jobs(client: TestClient) -> JobStore:
    found: JobStore = client.app.state.jobs  # type: ignore[attr-defined]
    return found


def submit(client: TestClient, dataset: str, **changes: Any) -> Any:
    return client.post(URL, json={"model": "digits", "training_file": dataset, **changes})


def probe(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "linear_probe", "linear_probe": {"hyperparameters": hyperparameters}}


def claimed(jobs: JobStore) -> Job:
    job = jobs.claim((Kind.FINE_TUNING,), "somebody")
    assert job is not None
    return job


def test_a_job_is_created_pinned_and_shown(client: TestClient, dataset: str) -> None:
    body = {"suffix": "parts", "metadata": {"team": "vision"}, "method": probe(epochs=3)}
    answer = submit(client, dataset, **body)
    assert answer.status_code == 200, answer.text
    job = answer.json()
    assert (job["object"], job["status"], job["model"]) == (
        *("fine_tuning.job", "queued", "digits:1"),
    )
    assert (job["name"], job["place"], job["metadata"]) == ("parts", 1, {"team": "vision"})
    assert job["hyperparameters"] == {"epochs": 3}
    assert client.get(f"{URL}/{job['id']}").json() == job
    second = submit(client, dataset).json()
    assert (second["name"], second["reason"]) == ("digits", "1 job wait before it")
    listed = client.get(URL, params={"limit": 1}).json()
    assert ([one["id"] for one in listed["data"]], listed["has_more"]) == ([second["id"]], True)
    older = client.get(URL, params={"after": second["id"]}).json()
    assert [one["id"] for one in older["data"]] == [job["id"]]


@pytest.mark.changes_nothing
@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"method": probe(epochs=0)}, 422, "epochs"),
        ({"method": probe(epoch=3)}, 422, "epoch"),
        ({"method": probe(learning_rate="fast")}, 422, "learning_rate"),
        ({"method": {"type": "fine_tune", "linear_probe": {}}}, 422, "linear_probe"),
        ({"method": {"type": "supervised"}}, 422, "method.type"),
        ({"weights": "/etc/passwd"}, 422, "weights"),
        ({"seed": -1}, 422, "seed"),
        ({"suffix": "../up"}, 422, "suffix"),
        ({"model": "cnn"}, 422, "model"),
        ({"model": "nobody"}, 404, "model"),
        ({"model": "os:system"}, 404, "model"),
        ({"model": "torchvision/resnet18"}, 404, "model"),
        ({"model": "torchvision/nothing", "method": {"type": "from_scratch"}}, 404, "model"),
        ({"training_file": "/etc"}, 404, "training_file"),
        ({"training_file": "digits"}, 404, "training_file"),
        ({"validation_file": "dset-0"}, 404, "validation_file"),
        ({"promote": {"rule": {}}}, 422, "promote.rule"),
        ({"promote": {"alias": "Production\n"}}, 422, "promote.alias"),
    ],
)
def test_what_is_wrong_is_named(
    client: TestClient, dataset: str, changes: dict[str, Any], status: int, param: str
) -> None:
    answer = submit(client, dataset, **changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert client.get(URL).json()["data"] == []


def test_a_dataset_that_teaches_nothing_is_refused(client: TestClient) -> None:
    body = zipped({f"ant/{index}.png": picture(index) for index in range(3)} | {"bee/x.png": b"?"})
    sent = client.post("/v1/files", files={"file": ("few.zip", body, "application/zip")})
    assert sent.status_code == 422
    file = sent.json()["file"]
    assert (file["status"], sent.json()["error"]["param"]) == ("error", "file")
    answer = submit(client, file["id"])
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "training_file")
    assert "bee has no sample" in answer.json()["error"]["message"]


def test_a_key_gives_the_same_job_whatever_has_changed_since(
    client: TestClient, dataset: str
) -> None:
    body = {"model": "digits", "training_file": dataset}
    headers = {"Idempotency-Key": "once"}
    first = client.post(URL, json=body, headers=headers).json()
    client.delete(f"/v1/datasets/{dataset}")
    again = client.post(URL, json=body, headers=headers)
    assert again.json()["id"] == first["id"]
    other = client.post(URL, json={**body, "seed": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_waiting_jobs_are_paused_resumed_and_cancelled(client: TestClient, dataset: str) -> None:
    url = f"{URL}/{submit(client, dataset).json()['id']}"
    paused = client.post(f"{url}/pause").json()
    assert (paused["status"], paused["reason"]) == ("paused", "paused by local")
    assert client.post(f"{url}/resume").json()["status"] == "queued"
    early = client.post(f"{url}/stop")
    assert early.status_code == 409
    assert "cancel it instead" in early.json()["error"]["message"]
    assert client.post(f"{url}/cancel").json()["status"] == "cancelled"
    assert client.post(f"{url}/resume").status_code == 409


def test_what_auto_became_is_shown_while_it_runs(
    client: TestClient, dataset: str, jobs: JobStore
) -> None:
    submit(client, dataset, method=probe(batch_size=8))
    job = claimed(jobs)
    found = {"resolved": {"epochs": {"value": 100, "reason": "they cost next to nothing"}}}
    jobs.amend(job, found, "settings resolved")
    jobs.amend(job, found, "settings resolved")
    shown = client.get(f"{URL}/{job.id}").json()
    assert shown["hyperparameters"] == {"batch_size": 8, "epochs": 100}
    assert shown["resolved"] == found["resolved"]
    messages = [one["message"] for one in client.get(f"{URL}/{job.id}/events").json()["data"]]
    assert messages == ["settings resolved", "running", "created"]


def test_events_come_as_pages_and_as_a_stream(
    client: TestClient, dataset: str, jobs: JobStore
) -> None:
    submit(client, dataset)
    job = claimed(jobs)
    jobs.record(job, [NewEvent("epoch 1", type=EventType.METRICS, data={"loss": 0.5})])
    url = f"{URL}/{job.id}/events"
    page = client.get(url, params={"limit": 2}).json()
    assert [one["message"] for one in page["data"]] == ["epoch 1", "running"]
    assert page["has_more"]
    older = client.get(url, params={"after": page["data"][-1]["id"]}).json()
    assert [one["message"] for one in older["data"]] == ["created"]
    jobs.cancel(job.id)
    whole = client.get(url, params={"stream": True})
    assert whole.headers["content-type"].startswith("text/event-stream")
    assert [line for line in whole.text.splitlines() if line.startswith("id: ")] == [
        f"id: {number}" for number in (1, 2, 3, 4)
    ]
    headers = {"accept": "text/event-stream", "last-event-id": "2"}
    rest = client.get(url, headers=headers).text
    assert rest.startswith('id: 3\nevent: metrics\ndata: {"id":"ftevent-')
    assert client.get(url, headers={**headers, "last-event-id": "4"}).status_code == 204
    assert client.get(url, headers={**headers, "last-event-id": "x"}).status_code == 422


def test_a_dry_run_says_what_would_happen_and_creates_nothing(
    client: TestClient, dataset: str
) -> None:
    answer = submit(client, dataset, dry_run=True)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert (told["object"], told["num_samples"], told["classes"]) == (
        *("fine_tuning.dry_run", 24, ["ant", "bee"]),
    )
    assert told["resolved"]["epochs"] == {
        "value": 100,
        "reason": "passes over features cost next to nothing",
    }
    assert told["memory_bytes"] > 0
    assert any("ant has 12 samples" in one for one in told["warnings"])
    assert client.get(URL).json()["data"] == []


def test_methods_and_bases_are_listed(client: TestClient) -> None:
    methods = {one["id"]: one for one in client.get("/v1/fine_tuning/methods").json()["data"]}
    assert methods.keys() == {"linear_probe", "fine_tune", "from_scratch"}
    assert methods["fine_tune"]["schema"]["properties"]["layer_factor"]["default"] == 100.0
    bases = client.get("/v1/fine_tuning/bases").json()["data"]
    assert [one["base"] for one in bases] == ["digits:1"]
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    told = schema["ProbeOptions"]["properties"]["hyperparameters"]["properties"]
    assert told["epochs"]["default"] == "auto"


def test_files_are_datasets(client: TestClient) -> None:
    body = zipped(two_classes())
    sent = client.post(
        "/v1/files",
        files={"file": ("insects.zip", body, "application/zip")},
        data={"purpose": "fine-tune"},
    )
    assert sent.status_code == 200, sent.text
    file = sent.json()
    assert (file["object"], file["filename"], file["purpose"], file["status"]) == (
        *("file", "insects.zip", "fine-tune", "processed"),
    )
    assert client.get(f"/v1/files/{file['id']}").json() == file
    listed = client.get("/v1/files").json()
    assert (listed["data"], listed["last_id"]) == ([file], file["id"])
    assert client.get("/v1/files", params={"purpose": "batch"}).json()["data"] == []
    assert client.get(f"/v1/datasets/{file['id']}").status_code == 200
    assert client.delete(f"/v1/files/{file['id']}").json()["deleted"]
    assert client.get(f"/v1/files/{file['id']}").status_code == 404


def test_an_alias_is_not_moved_by_a_key_that_only_tunes(
    client: TestClient, dataset: str, store: ModelStore
) -> None:
    keys = KeyStore(store.folder.parent)
    tokens = [keys.create("tunes", ("finetune",))[1]]
    tokens.append(keys.create("moves", ("finetune", "models:activate"))[1])
    client.app.state.gate._keys.look()  # type: ignore[attr-defined]
    body = {"model": "digits", "training_file": dataset}
    wanted = {**body, "promote": {"rule": {"threshold": 0.5}}}
    headers = [{"Authorization": f"Bearer {token}"} for token in tokens]
    assert client.post(URL, json=body, headers=headers[0]).json()["by"] == "tunes"
    refused = client.post(URL, json=wanted, headers=headers[0])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")
    job = client.post(URL, json=wanted, headers=headers[1]).json()
    assert job["promotion"] == {
        "alias": "production",
        "rule": {"threshold": 0.5},
        "status": "pending",
    }


def test_the_end_of_a_job_creates_the_promotion_in_one(
    client: TestClient, dataset: str, jobs: JobStore
) -> None:
    submit(client, dataset, promote={"alias": "live", "rule": {"threshold": 0.5}})
    job, result = claimed(jobs), {"model": "digits", "version": 2}
    jobs.succeed(job, result, then=follower_of(job, result))
    with pytest.raises(StaleWorker):
        jobs.succeed(job, result, then=follower_of(job, result))
    (follower,), _ = jobs.list(Kind.PROMOTION)
    assert (follower.model, follower.dataset) == ("digits:2", dataset)
    assert follower.options["proposal"]["version"] == 2
    assert client.get(f"{URL}/{job.id}").json()["promotion"]["id"] == follower.id


def test_a_job_tells_its_own_address_and_that_of_all_jobs(store: ModelStore) -> None:
    home = {"home": store.folder.parent, "device": "cpu", "threads": 1, "jobs": False}
    secret, hosts = f"whsec_{'A' * 40}", "a.example.com,b.example.com"
    settings = Settings(
        **home, webhook_hosts=hosts, webhook_url="https://a.example.com/", webhook_secret=secret
    )
    with TestClient(create_app(settings), "http://127.0.0.1:8000") as client:
        sent = client.post("/v1/datasets", content=zipped(two_classes()), headers=ZIP)
        dataset, own = sent.json()["id"], "https://b.example.com/tuned"
        job = submit(client, dataset, webhook=own).json()
        assert job["webhook"] == own
        kept = client.app.state.jobs.get(job["id"])  # type: ignore[attr-defined]
        assert kept.options["webhooks"] == ["https://a.example.com/", own]
        assert submit(client, dataset).json()["webhook"] is None
        refused = submit(client, dataset, webhook="https://169.254.169.254/")
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "webhook")


def test_where_webhooks_are_off_none_is_taken(client: TestClient, dataset: str) -> None:
    refused = submit(client, dataset, webhook="https://a.example.com/")
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "webhook")
    assert "sends no webhooks" in refused.json()["error"]["message"]


def test_jobs_are_chosen_by_metadata(client: TestClient, dataset: str) -> None:
    vision = submit(client, dataset, metadata={"team": "vision", 'a".b': "$[0]"}).json()["id"]
    submit(client, dataset, metadata={"team": "sound"})
    submit(client, dataset)

    def listed(**params: str) -> list[str]:
        answer = client.get(URL, params=params)
        assert answer.status_code == 200, answer.text
        return [one["id"] for one in answer.json()["data"]]

    assert listed(**{"metadata[team]": "vision"}) == [vision]
    assert listed(**{"metadata[team]": "vision", 'metadata[a".b]': "$[0]"}) == [vision]
    assert listed(**{"metadata[team]": "sound", 'metadata[a".b]': "$[0]"}) == []
    assert listed(**{"metadata[']": "x", "metadata[]]": "y"}) == []
    assert len(listed()) == 3
    refused = client.get(URL, params={"metadata": "null"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "metadata")


def test_places_of_a_page_are_those_of_each_job(client: TestClient, dataset: str) -> None:
    ids = [submit(client, dataset).json()["id"] for _ in range(5)]
    client.post(f"{URL}/{ids[2]}/pause")
    page = client.get(URL, params={"limit": 4}).json()["data"]
    assert [one["place"] for one in page] == [4, 3, None, 2]
    assert page == [client.get(f"{URL}/{one['id']}").json() for one in page]


def test_processes_are_bounded_and_refused_where_they_do_not_help(
    client: TestClient, dataset: str
) -> None:
    scratch = {"model": "mlp", "suffix": "parts", "method": {"type": "from_scratch"}}
    many = submit(client, dataset, num_processes=64, **scratch)
    assert (many.status_code, many.json()["error"]["param"]) == (422, "num_processes")
    assert "at most here" in many.json()["error"]["message"]
    idle = submit(client, dataset, num_processes=2)
    assert (idle.status_code, idle.json()["error"]["param"]) == (422, "num_processes")
    assert "one layer" in idle.json()["error"]["message"]


def test_a_job_takes_its_number_of_processes(
    store: ModelStore, dataset: str, jobs: JobStore
) -> None:
    settings = Settings(home=store.folder.parent, device="cpu", jobs=False, job_processes=2)
    scratch = {"model": "mlp", "suffix": "parts", "method": {"type": "from_scratch"}}
    with TestClient(create_app(settings), "http://127.0.0.1:8000") as client:
        assert submit(client, dataset, num_processes=2, **scratch).status_code == 200
    assert claimed(jobs).options["request"]["compute"]["num_processes"] == 2
