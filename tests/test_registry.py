"""Versions and aliases over HTTP: uploaded, described, moved, rolled back, downloaded, deleted."""

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import publish_cnn
from safetensors.torch import save_file
from starlette.testclient import TestClient

from models import checkpoint
from models.checkpoint import GOLDEN, MANIFEST
from models.manifest import WEIGHTS
from models.seen import Seen, read_seen, short_digests
from models.store import ModelStore

ROOT = Path(__file__).resolve().parent.parent
URL = "/v1/models/digits"
NUMBERS = {"inputs": np.zeros((2, 1, 8, 8)).tolist()}


@pytest.fixture
def two(store: ModelStore) -> ModelStore:
    publish_cnn(store, "digits", seed=2)
    return store


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The folder of a checkpoint that the server's store does not hold."""
    other = ModelStore(tmp_path / "elsewhere")
    return publish_cnn(other, "digits", seed=7).folder


def form_of(folder: Path, **fields: Any) -> dict[str, Any]:
    """A checkpoint as the parts of a form."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in ("files", "digest", "checksum"):
        del manifest[name]
    return {
        "manifest": (None, json.dumps(manifest)),
        "weights": ("w.safetensors", (folder / WEIGHTS).read_bytes()),
        **fields,
    }


def zip_of(folder: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    return file.getvalue()


def predicted(client: TestClient, model: str = "digits", **headers: str) -> dict[str, Any]:
    answer = client.post(f"/v1/models/{model}/predict", json=NUMBERS, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-model-version"] == str(answer.json()["version"])
    return answer.json()


def test_a_form_of_manifest_and_weights_becomes_a_version(
    client: TestClient, store: ModelStore, elsewhere: Path
) -> None:
    sha256 = hashlib.sha256((elsewhere / WEIGHTS).read_bytes()).hexdigest()
    answer = client.post(f"{URL}/versions", files=form_of(elsewhere, sha256=(None, sha256)))
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["version"], body["existed"], body["state"]) == (2, False, "available")
    assert body["lineage"]["environment"]["uploaded_by"] == "local"
    assert predicted(client, "digits:2")["version"] == 2
    assert (store.version("digits", 2).folder / GOLDEN).is_file()  # made here, to remember it by
    again = client.post(f"{URL}/versions", files=form_of(elsewhere)).json()
    assert (again["version"], again["existed"]) == (2, True)
    assert store.versions("digits") == [1, 2]


def test_what_is_downloaded_can_be_uploaded_again(
    client: TestClient, store: ModelStore, elsewhere: Path
) -> None:
    zipped = {"content-type": "application/zip"}
    answer = client.post("/v1/models/new/versions", content=zip_of(elsewhere), headers=zipped)
    assert answer.status_code == 200, answer.text
    assert store.aliases("new") == {"production": 1}
    answer = client.get("/v1/models/new/versions/1/download", headers={"Range": "bytes=0-9"})
    assert (answer.status_code, answer.headers["accept-ranges"]) == (200, "none")
    assert answer.headers["content-disposition"] == 'attachment; filename="new-1.zip"'
    assert zipfile.ZipFile(io.BytesIO(answer.content)).testzip() is None
    again = client.post("/v1/models/copy/versions", content=answer.content, headers=zipped)
    assert again.status_code == 200, again.text
    digests = [store.version(name, 1).manifest().digest for name in ("new", "copy")]
    assert digests[0] == digests[1]
    as_file = client.post("/v1/models/copy/versions", files={"file": ("x.zip", answer.content)})
    assert as_file.json()["existed"] is True


def test_what_a_version_has_seen_travels_with_it(client: TestClient, store: ModelStore) -> None:
    digests = short_digests([bytes([number]) * 32 for number in range(5)])
    seen = Seen.of(digests[:3], digests[3:])
    old = checkpoint.load(store.version("digits", 1).folder)

    def write(folder: Path) -> None:
        bare = {"files": {}, "digest": None, "checksum": None}
        manifest = old.manifest.model_copy(update=bare)
        assert old.golden is not None
        checkpoint.save(folder, old.network, manifest, old.golden.inputs, seen)

    store.publish("informed", write)
    answer = client.get("/v1/models/informed/versions/1/download")
    zipped = {"content-type": "application/zip"}
    again = client.post("/v1/models/copy/versions", content=answer.content, headers=zipped)
    assert again.status_code == 200, again.text
    copy = store.version("copy", 1)
    found = read_seen(copy.folder, copy.manifest().files)
    assert torch.equal(found.train, seen.train)
    assert torch.equal(found.validation, seen.validation)


def test_a_damaged_list_of_what_was_seen_is_refused(client: TestClient, elsewhere: Path) -> None:
    save_file({"train": torch.zeros(2, 3)}, elsewhere / "seen.safetensors")
    zipped = {"content-type": "application/zip"}
    answer = client.post("/v1/models/new/versions", content=zip_of(elsewhere), headers=zipped)
    assert answer.status_code == 422
    assert "must hold exactly train and validation" in answer.json()["error"]["message"]


@pytest.mark.usefixtures("two")
def test_an_alias_moves_by_compare_and_set_and_rolls_back(client: TestClient) -> None:
    assert predicted(client)["version"] == 1
    wish = {"version": 2, "expected": 1, "why": "better", "evidence": {"accuracy": 0.98}}
    moved = client.put(f"{URL}/aliases/production", json=wish).json()
    assert (moved["version"], moved["previous"], moved["by"], moved["id"]) == (2, 1, "local", 2)
    assert predicted(client)["version"] == 2  # at once: nobody waits for the watcher
    refused = client.put(f"{URL}/aliases/production", json=wish)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "alias_moved")
    back = client.post(f"{URL}/aliases/production/rollback", json={"expected": 2, "why": "slow"})
    assert (back.json()["version"], back.json()["rollback"]) == (1, True)
    assert predicted(client)["version"] == 1
    nothing = client.post(f"{URL}/aliases/production/rollback")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "nothing_to_roll_back")
    pages = [client.get(f"{URL}/history", params={"limit": 2}).json()]
    pages.append(client.get(f"{URL}/history", params={"after": pages[0]["data"][-1]["id"]}).json())
    assert [page["has_more"] for page in pages] == [True, False]
    assert [move["why"] for page in pages for move in page["data"]] == [
        *("slow", "better", "first version")
    ]
    assert pages[0]["data"][1]["evidence"] == {"accuracy": 0.98}


def test_a_version_that_cannot_load_moves_nothing_and_says_why(
    client: TestClient, two: ModelStore
) -> None:
    weights = two.version("digits", 2).folder / WEIGHTS
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    answer = client.put(f"{URL}/aliases/production", json={"version": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_unusable")
    assert "bytes" in answer.json()["error"]["message"]
    assert two.aliases("digits") == {"production": 1}
    assert "bytes" in client.get(URL).json()["failed"]["2"]
    assert client.get(f"{URL}/versions/1").json()["state"] == "available"
    states = {one["version"]: one for one in client.get(f"{URL}/versions").json()["data"]}
    assert states[2]["state"] == "failed"
    assert predicted(client)["version"] == 1


@pytest.mark.usefixtures("two")
def test_rolling_back_to_what_cannot_load_changes_nothing_and_says_why(
    client: TestClient, store: ModelStore
) -> None:
    client.put(f"{URL}/aliases/production", json={"version": 2})
    before = store.history("digits")
    weights = store.version("digits", 1).folder / WEIGHTS
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    answer = client.post(f"{URL}/aliases/production/rollback")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "version_unusable")
    assert "digits:1 cannot be loaded" in answer.json()["error"]["message"]
    assert "digits@production stays where it is" in answer.json()["error"]["message"]
    assert store.history("digits") == before
    assert predicted(client)["version"] == 2


def test_what_another_process_moves_is_noticed_and_a_failure_shows(
    client: TestClient, two: ModelStore
) -> None:
    predicted(client)
    weights = two.version("digits", 2).folder / WEIGHTS
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    two.move_alias("digits", "production", 2)
    publish_cnn(two, "digits", seed=3)
    until = time.monotonic() + 10
    while not (state := client.get(f"{URL}/aliases/production").json())["faults"]:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert (state["version"], state["serving"]) == (2, 1)
    two.move_alias("digits", "production", 3)
    while predicted(client)["version"] != 3:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.usefixtures("two")
def test_a_canary_and_a_client_that_pins_itself(client: TestClient) -> None:
    wish = {"version": 1, "canary": 2, "canary_share": 0.5, "why": "try"}
    assert client.put(f"{URL}/aliases/production", json=wish).status_code == 200
    assert {predicted(client)["version"] for _ in range(40)} == {1, 2}
    keyed = {"X-Canary-Key": "anna"}
    assert len({predicted(client, **keyed)["version"] for _ in range(20)}) == 1
    for number in ("1", "2"):
        assert predicted(client, **{"X-Model-Version": number})["version"] == int(number)
    v2 = {
        "inputs": [{"name": "input", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0] * 64}]
    }
    answer = client.post("/v2/models/digits/infer", json=v2, headers={"X-Model-Version": "2"})
    assert (answer.json()["model_version"], answer.headers["x-model-version"]) == ("2", "2")
    for path, pin in [("digits", "x"), ("digits", "-1"), ("digits:1", "2"), ("digits", "9" * 30)]:
        pinned = {"X-Model-Version": pin}
        bad = client.post(f"/v1/models/{path}/predict", json=NUMBERS, headers=pinned)
        assert bad.status_code == 400, (path, pin)
    assert client.delete(f"{URL}/versions/2").status_code == 409


@pytest.mark.usefixtures("two")
def test_a_shadow_is_described_and_counted(client: TestClient) -> None:
    client.put(f"{URL}/aliases/production", json={"version": 1, "shadow": 2})
    until = time.monotonic() + 10
    shadow: dict[str, Any] = {}
    while not shadow.get("agreement") and not shadow.get("differed"):
        assert predicted(client)["version"] == 1
        shadow = client.get(f"{URL}/aliases/production").json()["shadow"]
        assert time.monotonic() < until
    assert shadow["version"] == 2
    assert shadow["largest_difference"] > 0
    exposed = client.get("/metrics").text
    assert 'pytorchlib_shadow_inputs_total{alias="production",model="digits"' in exposed


@pytest.mark.usefixtures("two")
def test_deleting(client: TestClient) -> None:
    predicted(client, "digits:2")
    held = client.delete(f"{URL}/versions/1")
    assert (held.status_code, held.json()["error"]["code"]) == (409, "version_in_use")
    assert client.delete(f"{URL}/versions/2").json()["deleted"] is True
    assert client.post("/v1/models/digits:2/predict", json=NUMBERS).status_code == 404
    client.put(f"{URL}/aliases/old", json={"version": 1, "expected": None})
    gone = client.delete(f"{URL}/aliases/old", params={"expected": 1}).json()
    assert (gone["version"], gone["previous"]) == (None, 1)
    assert client.delete(f"{URL}/aliases/old").status_code == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"version": 1, "canary": 2, "canary_share": 1.5}, 422),
        ({"version": 1, "canary": 2}, 422),
        ({"version": 1, "canary_share": 0.5}, 422),
        ({"version": 1, "shadow": 1}, 422),
        ({"version": "1"}, 422),
        ({"version": 1, "unknown": 1}, 422),
        ({}, 422),
        ({"version": 9}, 404),
        ({"version": 1, "why": "x" * 2000}, 422),
        ({"version": 1, "evidence": {"x": "y" * 70_000}}, 413),
    ],
)
@pytest.mark.usefixtures("two")
def test_wishes_that_make_no_sense(client: TestClient, body: dict[str, Any], status: int) -> None:
    before = client.get(f"{URL}/history").json()
    answer = client.put(f"{URL}/aliases/production", json=body)
    assert answer.status_code == status, answer.text
    assert client.get(f"{URL}/history").json() == before


@pytest.fixture
def server(store: ModelStore) -> Iterator[str]:
    """A real one, as users start it."""
    from benchmarks.system import free_port, is_ready

    port = free_port()
    environ = {**os.environ, "PYTORCHLIB_HOME": str(store.folder.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while not is_ready(port, "/readyz"):
                assert time.monotonic() < until
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


@pytest.mark.slow
def test_the_official_openai_client_lists_models(server: str) -> None:
    import openai

    with openai.OpenAI(base_url=server, api_key="none") as client:
        (model,) = client.models.list()
        assert (model.id, model.object, model.owned_by) == ("digits", "model", "local")
        assert client.models.retrieve("digits").id == "digits"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")
