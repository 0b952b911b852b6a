"""Shared by all tests: one thread, for quick and repeatable runs; real data; a small real store."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore, Version

# How long one example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Quick and repeatable, also after a test of a command that took all threads there are.

    Threads that wait for each other spin, and take ten times as long where others compute too.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data (`PYTORCHLIB_TEST_DATA`); a test that needs it skips without it."""
    folder = Path(os.environ.get("PYTORCHLIB_TEST_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"PYTORCHLIB_TEST_DATA names no folder: {folder}")
    return folder


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


GREY_8X8 = [
    {"step": "decode"},
    {"step": "orient"},
    {"step": "color", "mode": "L"},
    {"step": "resize", "size": [8, 8], "interpolation": "box"},
    {"step": "scale"},
    {"step": "normalize", "mean": [0.5], "std": [0.25]},
]


def publish_cnn(
    store: ModelStore, name: str, seed: int, num_labels: int = 10, **kwargs: object
) -> Version:
    """Publish a small real network for grey 8x8 pictures and the labels 0, 1, ..."""
    torch.manual_seed(seed)
    options = {"channels": 1, "size": 8, "num_classes": num_labels, "width": 4}
    network = networks.build("cnn", options)
    manifest = Manifest(
        network=NetworkSpec(name="cnn", options=options),
        preprocessing=Preprocessing(steps=GREY_8X8),
        labels=tuple(map(str, range(num_labels))),
    )
    golden = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8)
    return store.publish(
        name, lambda folder: checkpoint.save(folder, network.eval(), manifest, golden), **kwargs
    )


def digits_in(home: Path) -> ModelStore:
    """A store with `digits`, version 1, an untrained network."""
    store = ModelStore(home / "models")
    publish_cnn(store, "digits", seed=1)
    return store


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """How the application differs from the usual one; a module may say it for its tests."""
    return {}


@contextmanager
def served(store: ModelStore, settings: dict[str, Any]) -> Iterator[TestClient]:
    """The whole application over that store."""
    from app.main import create_app
    from app.settings import Settings

    usual = {"device": "cpu", "threads": 1, "watch_interval_s": 0.05}
    app = create_app(Settings(home=store.folder.parent, **usual, **settings))
    address = "http://127.0.0.1:8000"
    with TestClient(app, base_url=address, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def lasting_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelStore]:
    """One for all tests of a module that change no model; that they did not is looked at."""
    store = digits_in(tmp_path_factory.mktemp("lasting"))
    yield store
    assert [(name, store.versions(name)) for name in store.names()] == [("digits", [1])]
    assert store.aliases("digits") == {"production": 1}


@pytest.fixture(scope="module")
def lasting_client(lasting_store: ModelStore, settings: dict[str, Any]) -> Iterator[TestClient]:
    """The application for those."""
    with served(lasting_store, settings) as client:
        yield client


def changes_nothing(request: pytest.FixtureRequest) -> bool:
    return request.node.get_closest_marker("changes_nothing") is not None


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ModelStore:
    """A store with `digits`, of this test alone unless it changes nothing."""
    if changes_nothing(request):
        lasting: ModelStore = request.getfixturevalue("lasting_store")
        return lasting
    return digits_in(tmp_path)


@pytest.fixture
def client(
    request: pytest.FixtureRequest, store: ModelStore, settings: dict[str, Any]
) -> Iterator[TestClient]:
    """The application over it, of this test alone unless it changes nothing."""
    if changes_nothing(request):
        yield request.getfixturevalue("lasting_client")
        return
    with served(store, settings) as client:
        yield client


@pytest.fixture
def usual(app: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of every request that takes the usual way through the module's `app`."""
    paths: list[str] = []
    answer = app.hot_path.answer

    async def watched(way: Any, scope: Any, *rest: Any) -> None:
        paths.append(scope["path"])
        await answer(way, scope, *rest)

    monkeypatch.setattr(app.hot_path, "answer", watched)
    return paths


@pytest.fixture(scope="session")
def digit_png() -> bytes:
    """A 64x64 grey picture as a browser would send it."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8).repeat(8, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(8, 1)).save(file, "PNG")
    return file.getvalue()
