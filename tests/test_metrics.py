"""Series of figures: as many as there are live versions, and a few of those that are gone."""

import re
from pathlib import Path

import httpx
import pytest
from conftest import publish_cnn
from test_key_servers import serving

from app.metrics import KEPT_VERSIONS, Metrics, ModelFigures
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
    assert versions_in(metrics.expose()) == [1, *range(301 - KEPT_VERSIONS, 301)]
    assert VERSION.findall(metrics.expose())[0][1] == b"2.0"
    assert b'route="/models",status="200",version=""} 300.0' in metrics.expose()


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
