"""Series of figures: as many as there are live versions, and a few of those that are gone."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from conftest import publish_cnn
from test_key_servers import serving

from app.main import create_app
from app.metrics import KEPT_VERSIONS, Metrics, ModelFigures
from app.settings import Settings
from models.store import ModelStore

NUM_VERSIONS = 200
VERSION = re.compile(rb'pytorchlib_request_seconds_count{.*version="(\d+)"} (\S+)')


def versions_in(text: bytes) -> list[int]:
    return [int(version) for version, _ in VERSION.findall(text)]


def test_the_last_of_what_is_gone_keep_their_series_and_what_is_live_does() -> None:
    metrics = Metrics(lambda: [ModelFigures("digits", 1)])
    for number in range(1, 301):
        for _ in range(2):
            metrics.count_request("/predict", "digits", str(number), 200, 0.01)
        metrics.count_request("/models", "", "", 200, 0.01)
    text = metrics.scrape().text()
    assert versions_in(text) == [1, *range(301 - KEPT_VERSIONS, 301)]
    assert VERSION.findall(text)[0][1] == b"2.0"
    assert b'route="/models",status="200",version=""} 300.0' in text


@pytest.mark.anyio
async def test_requests_are_answered_while_figures_are_written_down(tmp_path: Path) -> None:
    """Six hundred series of requests take a tenth of a second."""
    app = create_app(Settings(home=tmp_path, device="cpu", jobs=False, _env_file=None))
    for number in range(600):
        app.state.metrics.count_request(f"/{number}", "", "", 200, 0.01)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        scrape = asyncio.create_task(client.get("/metrics"))
        num_answered = 0
        async with asyncio.timeout(30):
            while not scrape.done():
                assert (await client.get("/livez")).status_code == 200
                await asyncio.sleep(0)
                num_answered += 1
    assert num_answered > 5
    assert (await scrape).text.count("pytorchlib_request_seconds_count") >= 600


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_two_hundred_versions_leave_as_many_series_as_twenty(
    store: ModelStore, tmp_path: Path
) -> None:
    inputs = {"inputs": [[[[0.0] * 8] * 8]]}
    quiet = ("--log-requests", "none", "--log-level", "error")
    with serving(tmp_path, *quiet) as (address, _), httpx.Client(timeout=60) as client:
        url = f"http://{address[0]}:{address[1]}"
        for number in range(1, NUM_VERSIONS + 1):
            if number > 1:
                publish_cnn(store, "digits", seed=number)
                move = {"version": number}
                moved = client.put(f"{url}/v1/models/digits/aliases/production", json=move)
                assert moved.status_code == 200, moved.text
            answer = client.post(f"{url}/v1/models/digits/predict", json=inputs)
            assert answer.json()["version"] == number
            if number > 3:
                store.delete("digits", number - 3)
        text = client.get(f"{url}/metrics").content
    seen = versions_in(text)
    assert seen == list(range(NUM_VERSIONS - KEPT_VERSIONS, NUM_VERSIONS + 1))
    assert len(text.splitlines()) < 900
