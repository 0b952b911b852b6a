"""Evaluations and promotions on real servers: jobs that are followed, ended, and looked at."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_docs_page import page
from test_evaluation import trained_store
from test_key_servers import serving

from app.auth.store import KeyStore
from benchmarks.evaluate import publish_cnn
from models.store import ModelStore

playwright = pytest.importorskip("playwright.sync_api")

__all__ = ["page", "trained_store"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
URL = "/v1/evaluations"
QUIET = ("--log-requests", "none")


@contextlib.contextmanager
def client_of(
    home: Path, *options: str, token: str = "", **variables: str
) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with (
        serving(home, *QUIET, *options, **variables) as ((host, port), _),
        httpx.Client(base_url=f"http://{host}:{port}", headers=headers, timeout=60) as client,
    ):
        yield client


def until(look: Callable[[], dict[str, Any]], holds: Callable[[dict[str, Any]], bool]) -> Any:
    """What `look` gives, once that `holds`."""
    deadline = time.monotonic() + 120
    while not holds(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found


def test_a_large_promotion_is_a_job_that_moves_the_alias_or_says_why_not(
    trained_store: ModelStore,
) -> None:
    gate = "/v1/models/digits/aliases/production/promote"
    body = {"version": 2, "dataset": "digits", "wait_s": 0, "rule": {"threshold": 0.9}}
    with client_of(trained_store.folder.parent) as client:
        asked = client.post(gate, json=body)
        assert (asked.status_code, asked.json()["object"]) == (202, "promotion")
        where = asked.headers["location"]
        ended = until(lambda: client.get(where).json(), lambda one: one["finished_at"] is not None)
        assert (ended["status"], ended["promotion"]["promoted"]) == ("succeeded", True)
        assert ended["progress"]["done"] == ended["progress"]["total"] == 179
        assert client.get("/v1/models/digits/aliases/production").json()["version"] == 2
        (move, _) = client.get("/v1/models/digits/history").json()["data"]
        assert move["evidence"]["source"] == ended["id"]
        refused = client.post(gate, json={**body, "version": 1})
        where = refused.headers["location"]
        ended = until(lambda: client.get(where).json(), lambda one: one["finished_at"] is not None)
        assert (ended["status"], ended["promotion"]["promoted"]) == ("succeeded", False)
        assert "threshold: accuracy" in ended["promotion"]["sentence"]
        assert client.get("/v1/models/digits/aliases/production").json()["version"] == 2


def test_a_running_evaluation_is_cancelled_and_the_next_one_runs(
    tmp_path: Path, real_data: Path
) -> None:
    publish_cnn(ModelStore(tmp_path / "models"))
    over = threading.Event()
    with client_of(tmp_path, "--data-root", str(real_data)) as client:

        def ask_all_the_time() -> None:
            row = {"inputs": [[[[0.0] * 28] * 28]]}
            while not over.is_set():
                client.post("/v1/models/mnist/predict", json=row).raise_for_status()
                over.wait(0.02)

        others = threading.Thread(target=ask_all_the_time)
        others.start()
        try:
            body = {"model": "mnist", "dataset": "mnist", "wait_s": 0}
            where = client.post(URL, json=body).headers["location"]
            running = until(lambda: client.get(where).json(), lambda one: one["progress"] != {})
            assert running["status"] == "running"
            assert 0 < running["progress"]["done"] < running["progress"]["total"] == 10_000
            assert client.post(f"{where}/cancel").json()["status"] == "cancelled"
        finally:
            over.set()
            others.join()
        assert client.get(where).json()["status"] == "cancelled"
        assert client.get(f"{where}/report").status_code == 404
        assert client.post(f"{where}/cancel").json()["status"] == "cancelled"
        # The only place is free again, at once.
        again = client.post(URL, json={**body, "wait_s": 60}).json()
        assert again["status"] == "succeeded"


def test_a_browser_opens_a_report_by_its_link_until_that_expires(
    trained_store: ModelStore, page: Any
) -> None:
    home = trained_store.folder.parent
    _, token = KeyStore(home).create("reader", ("evaluate",))
    try:
        with client_of(home, "--signed-link-s", "20", token=token) as client:
            body = {"model": "digits:2", "dataset": "digits"}
            other, found = (client.post(URL, json=body).json() for _ in range(2))
            link = f"{client.base_url}{found['report_url']}"
            opened = page.goto(link)
            assert opened.status == 200
            playwright.expect(page.locator("h1")).to_contain_text("digits:2 on digits")
            assert page.locator("img").count() > 5
            assert page.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
            query = link.partition("?")[2]
            for changed in (
                f"{client.base_url}/v1/evaluations/{other['id']}/report?{query}",
                f"{client.base_url}/v1/evaluations/{found['id']}?{query}",
                link.replace("expires=", "expires=9"),
                link.partition("?")[0],
            ):
                assert page.goto(changed).status == 401, changed
            assert page.goto(link).status == 200
            time.sleep(max(0.0, int(re.findall(r"expires=(\d+)", link)[0]) + 1 - time.time()))
            assert page.goto(link).status == 401
            fresh = client.get(f"{URL}/{found['id']}").json()["report_url"]
            assert page.goto(f"{client.base_url}{fresh}").status == 200
    finally:
        (home / "keys.json").unlink()
