"""Real server processes with keys, and clients that nobody here wrote."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from app.auth.store import KeyStore
from models.store import ModelStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
Address = tuple[str, int]


@contextlib.contextmanager
def serving(home: Path, *options: str, **variables: str) -> Iterator[tuple[Address, list[str]]]:
    """A server process, its address once it answers, and what it said when it has ended."""
    command = [sys.executable, "-m", "app", "serve", "--home", str(home), "--port", "0"]
    own = ["--device", "cpu", "--threads", "1", "--log-requests", "all", "--drain-s", "0"]
    said: list[str] = []
    with subprocess.Popen(
        [*command, *own, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONUNBUFFERED": "1", **variables},
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith("Serving on"):
                    break
            found = re.search(r"http://\S+:(\d+);", said[-1])
            assert found, said
            address = ("127.0.0.1", int(found[1]))
            wait_until_ready(address)
            yield address, said
        finally:
            process.terminate()
            said.append(process.communicate(timeout=30)[0])


def wait_until_ready(address: Address) -> None:
    deadline = time.monotonic() + 60
    while ask(address, "/readyz")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(address: Address, path: str, token: str = "", **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET; the socket listens before the application is there."""
    key = {"Authorization": f"Bearer {token}"} if token else {}
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.request("GET", path, headers={**key, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.fixture
def home(store: ModelStore) -> Path:
    return store.folder.parent


def test_the_official_openai_client_sends_its_key(home: Path) -> None:
    openai = pytest.importorskip("openai")
    _, token = KeyStore(home).create("ci", ("predict",))
    with serving(home) as (address, said):
        url = "http://{}:{}/v1".format(*address)
        with openai.OpenAI(base_url=url, api_key=token) as client:
            assert [model.id for model in client.models.list()] == ["digits"]
        wrong = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError, match="this needs a key"):
            wrong.models.list()
        root = openai.OpenAI(base_url=url.removesuffix("/v1"), api_key=token, max_retries=0)
        with root, pytest.raises(openai.PermissionDeniedError, match="lacks the scope 'metrics'"):
            root.get("/metrics", cast_to=object)
    assert "GET /v1/models 200" in "".join(said)
    assert token.split("_", 2)[2] not in "".join(said)


def test_tritonclient_sends_its_key_as_a_header(home: Path) -> None:
    triton = pytest.importorskip("tritonclient.http")
    errors = pytest.importorskip("tritonclient.utils")
    _, token = KeyStore(home).create("ci", ("predict",))
    headers = {"Authorization": f"Bearer {token}"}
    tensor = triton.InferInput("input", [1, 1, 8, 8], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 1, 8, 8), np.float32))
    with serving(home) as (address, _), triton.InferenceServerClient("{}:{}".format(*address)) as c:
        assert c.is_model_ready("digits", headers=headers)
        answer = c.infer("digits", [tensor], headers=headers)
        assert answer.as_numpy("logits").shape == (1, 10)
        with pytest.raises(errors.InferenceServerException, match="this needs a key") as refused:
            c.infer("digits", [tensor])
        assert refused.value.status() == "401"
        with pytest.raises(errors.InferenceServerException, match="lacks the scope 'models:write'"):
            c.unload_model("digits", headers=headers)


def test_on_any_address_with_a_key_from_the_environment(home: Path) -> None:
    secret = "one-key-of-the-environment-only"
    options = ("--host", "0.0.0.0", "--metrics-port", "0")
    with serving(home, *options, PYTORCHLIB_API_KEY=secret) as (address, said):
        assert ask(address, "/v1/models")[0] == 401
        assert ask(address, "/v1/models", secret)[0] == 200
        assert ask(address, "/metrics", secret)[0] == 200
        assert ask(address, "/livez", Host="10.0.0.9")[0] == 200
    assert secret not in "".join(said)


def test_the_figures_have_a_port_of_their_own(home: Path) -> None:
    KeyStore(home).create("nobody", ("admin",))
    port = free_port()
    with serving(home, "--metrics-port", str(port)) as (address, _):
        figures = ("127.0.0.1", port)
        status, body = ask(figures, "/metrics")
        assert (status, b"pytorchlib_request_seconds" in body) == (200, True)
        for path in ("/v1/models", "/livez", "/docs", "/v2", "/metrics/"):
            assert ask(figures, path)[0] == 404, path
        assert ask(figures, "/metrics", Host="rebound.example")[0] == 400
        assert ask(address, "/metrics")[0] == 401
        # No header says where a request came in.
        assert ask(address, "/metrics", Host=f"127.0.0.1:{port}")[0] == 401


def test_said_aloud_everybody_may_come_in(home: Path) -> None:
    with serving(home, "--host", "0.0.0.0", "--no-auth") as (address, _):
        status, body = ask(address, "/v1/models")
        assert (status, json.loads(body)["data"][0]["id"]) == (200, "digits")


def test_another_process_makes_and_revokes_keys(home: Path) -> None:
    keys = [sys.executable, "-m", "app", "keys"]
    with serving(home, "--watch-interval-s", "0.2") as (address, _):
        assert ask(address, "/v1/models")[0] == 200  # loopback, and nobody has made a key
        options = ["-n", "ci", "-s", "predict", "--home", str(home)]
        done = subprocess.run([*keys, "create", *options], cwd=ROOT, capture_output=True, text=True)
        token = done.stdout.strip()
        time.sleep(0.7)
        assert ask(address, "/v1/models")[0] == 401
        assert ask(address, "/v1/models", token)[0] == 200
        subprocess.run([*keys, "revoke", "ci", "--home", str(home)], cwd=ROOT, check=True)
        time.sleep(0.7)
        assert ask(address, "/v1/models", token)[0] == 401


def free_port() -> int:
    from app.http.listener import listen

    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])
