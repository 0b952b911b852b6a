"""`/v1/evaluations` over HTTP: figures, jobs, the page, the gate, and every way to get it wrong."""

import time
from collections.abc import Iterator

import pytest
from conftest import publish_cnn, served
from starlette.testclient import TestClient
from test_evaluation import trained_store

from app.jobs.job import Job
from app.jobs.store import JobStore
from models import checkpoint
from models.store import ModelStore

__all__ = ["trained_store"]
URL = "/v1/evaluations"


@pytest.fixture(scope="module")
def client(trained_store: ModelStore) -> Iterator[TestClient]:
    with served(trained_store, {}) as client:
        yield client


def created(client: TestClient, **body) -> dict:
    answer = client.post(URL, json={"model": "digits:2", "dataset": "digits", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_small_evaluation_answers_at_once(client: TestClient) -> None:
    found = created(client, compare_to="digits:1", top_k=[1, 2])
    result = found["result"]
    assert (found["status"], found["model"], found["object"]) == (
        *("succeeded", "digits:2", "evaluation"),
    )
    assert result["report"]["accuracy"] > 0.9
    assert result["report"]["top_k"].keys() == {"1", "2"}
    assert result["compared_with"]["version"] == 1
    assert result["comparison"]["num_gained"] > 50
    assert "thumbnails" not in result
    assert client.get(f"{URL}/{found['id']}").json() == found
    listed = client.get(URL).json()
    assert listed["data"][0]["id"] == found["id"]
    assert listed["data"][0]["result"]["figures"]["accuracy"] == result["report"]["accuracy"]


def test_who_does_not_wait_asks_where_location_says(client: TestClient) -> None:
    body = {"model": "digits:2", "dataset": "digits", "wait_s": 0}
    answer = client.post(URL, json=body)
    assert answer.status_code == 202
    for _ in range(200):
        found = client.get(answer.headers["location"]).json()
        if found["status"] == "succeeded":
            break
    assert found["result"]["report"]["num_samples"] == 179


def test_the_same_key_is_the_same_evaluation(client: TestClient) -> None:
    headers = {"idempotency-key": "again"}
    body = {"model": "digits:2", "dataset": "digits"}
    first, second = (client.post(URL, json=body, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = client.post(URL, json={**body, "part": "train"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_reused")


def test_the_report_is_one_page_without_scripts(client: TestClient) -> None:
    found = created(client, compare_to="digits:1")
    page = client.get(found["report_url"])
    assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src")
    assert "script" not in page.headers["content-security-policy"]
    text = page.text
    assert "digits:2 on digits" in text
    assert "<script" not in text
    assert text.count('<img class="tiny" src="data:image/png;base64,') > 5
    assert not any(word in text for word in ("http://", "https://", "url("))
    assert "Reliability" in text
    assert "Worst mistakes" in text


def test_what_was_deleted_is_gone(client: TestClient) -> None:
    found = created(client)
    assert client.delete(f"{URL}/{found['id']}").json()["deleted"]
    for path in (f"{URL}/{found['id']}", found["report_url"]):
        assert client.get(path).status_code == 404
    late = client.post(f"{URL}/{created(client)['id']}/cancel")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "job_conflict")


def test_a_fitted_temperature_becomes_a_version_that_serves_with_it(
    client: TestClient, trained_store: ModelStore
) -> None:
    found = created(client)
    published = client.post(f"{URL}/{found['id']}/calibrate").json()
    fitted = found["result"]["report"]["temperature"]
    assert published["temperature"] == fitted["value"]
    version = trained_store.version("digits", published["version"])
    assert version.manifest().temperature == fitted["value"]
    assert version.manifest().lineage.parent == "digits:2"
    checkpoint.load(version.folder)
    again = created(client, model=str(version))["result"]["report"]
    before = found["result"]["report"]
    assert again["accuracy"] == before["accuracy"]
    assert again["negative_log_likelihood"] == pytest.approx(fitted["negative_log_likelihood"])
    assert again["negative_log_likelihood"] <= before["negative_log_likelihood"]
    # Nothing is left to be gained, and the figure is still that of the network's own logits.
    assert again["temperature"]["value"] == pytest.approx(fitted["value"], rel=1e-4)


def promote(client: TestClient, version: int, rule: dict, alias: str = "production"):
    return client.post(
        f"/v1/models/digits/aliases/{alias}/promote",
        json={"version": version, "dataset": "digits", "rule": rule},
    )


def test_a_promotion_that_holds_moves_the_alias(
    client: TestClient, trained_store: ModelStore
) -> None:
    trained_store.move_alias("digits", "production", 1)
    answer = promote(client, 2, {"min_absolute_change": 0.1, "threshold": 0.9})
    assert answer.status_code == 200, answer.text
    assert answer.json()["promotion"]["promoted"]
    move = trained_store.history("digits", "production")[-1]
    assert (move.to, move.previous) == (2, 1)
    assert move.evidence["source"] == answer.json()["id"]
    assert "production: moved to version 2" in " ".join(
        client.get(answer.json()["report_url"]).text.replace("@", " ").split()
    )


def test_a_refused_promotion_says_which_rule_failed_with_both_figures(
    client: TestClient, trained_store: ModelStore
) -> None:
    trained_store.move_alias("digits", "production", 2)
    answer = promote(client, 1, {"min_absolute_change": 0.0, "max_latency_ms": 10_000})
    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (409, "not_promoted")
    assert "min_absolute_change: accuracy 0." in body["error"]["message"]
    failed = [one for one in body["promotion"]["checks"] if not one["holds"]]
    assert failed[0]["candidate"] < failed[0]["holder"]
    assert trained_store.aliases("digits")["production"] == 2
    kept = client.get(f"{URL}/{body['id']}").json()
    assert kept["promotion"] == body["promotion"]
    assert kept["result"]["comparison"]["num_lost"] > 50


def test_what_is_held_already_is_a_409(client: TestClient, trained_store: ModelStore) -> None:
    trained_store.move_alias("digits", "production", 2)
    assert promote(client, 2, {"threshold": 0.5}).status_code == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422),
        ({"model": "digits"}, 422),
        ({"model": "digitz", "dataset": "digits"}, 404),
        ({"model": "digits:99", "dataset": "digits"}, 404),
        ({"model": "digits:x", "dataset": "digits"}, 400),
        ({"model": "digits", "dataset": "nothing"}, 404),
        ({"model": "digits", "dataset": "/etc"}, 404),
        ({"model": "digits", "dataset": "../models"}, 404),
        ({"model": "digits", "dataset": "digits", "part": "all"}, 422),
        ({"model": "digits", "dataset": "digits", "top_k": [0]}, 422),
        ({"model": "digits", "dataset": "digits", "colour": 1}, 422),
        ({"model": "digits:2", "dataset": "digits", "part": "train", "leave_out_seen": True}, 422),
    ],
)
def test_bad_requests(client: TestClient, body: dict, status: int) -> None:
    answer = client.post(URL, json=body)
    assert answer.status_code == status, answer.text
    assert len(answer.json()["error"]["message"]) > 15


def test_bad_rules_and_ids(client: TestClient) -> None:
    assert promote(client, 1, {}).status_code == 422
    assert promote(client, 1, {"accuracy": 1}).status_code == 422
    assert promote(client, 99, {"threshold": 0}).status_code == 404
    for path in ("eval-0", "../../x", "ftjob-1"):
        assert client.get(f"{URL}/{path}").status_code == 404
        assert client.get(f"{URL}/{path}/report").status_code == 404


def publish_broken(store: ModelStore) -> None:
    version = publish_cnn(store, "broken", seed=3)
    weights = version.folder / "weights.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


def test_a_failure_that_was_written_down_before_anybody_waited_is_still_told(
    client: TestClient, trained_store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_broken(trained_store)
    get = JobStore.get

    def ended(jobs: JobStore, job_id: str) -> Job:
        until = time.monotonic() + 10
        while not (job := get(jobs, job_id)).is_final and time.monotonic() < until:
            time.sleep(0.001)
        return job

    monkeypatch.setattr(JobStore, "get", ended)
    answer = client.post(URL, json={"model": "broken", "dataset": "digits"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "load_failed")


def test_a_broken_version_fails_with_its_own_status(
    client: TestClient, trained_store: ModelStore
) -> None:
    publish_broken(trained_store)
    answer = client.post(URL, json={"model": "broken", "dataset": "digits"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "load_failed")
    listed = client.get(URL).json()["data"][0]
    assert (listed["status"], listed["error"]["code"]) == ("failed", "load_failed")
