"""Live models: loaded once, swapped by reference, let go of when nobody holds them."""

import asyncio
import gc
import sys
import time
import weakref
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import publish_cnn

from app.engine.live import LiveModels
from app.engine.loading import LoadedVersion
from app.engine.short_slices import SLICE_S
from app.errors import LoadFailed, Unavailable
from app.main import build_engine
from app.settings import Settings
from models.store import ModelStore, UnknownModel, UnknownVersion, Version

pytestmark = pytest.mark.anyio


@pytest.fixture
async def live(store: ModelStore) -> AsyncIterator[LiveModels]:
    settings = Settings(home=store.folder.parent, device="cpu", threads=1, watch_interval_s=60)
    engine = build_engine(settings)
    engine.batcher.start()
    yield engine.live
    await engine.live.stop()
    await engine.batcher.stop(1.0)
    engine.decoder.close()


async def test_many_callers_share_one_load(live: LiveModels) -> None:
    loads = []
    load = live.loads.load
    live.loads.load = lambda version: loads.append(version) or load(version)  # type: ignore[func-returns-value]
    predictors = await asyncio.gather(*(live.get("digits") for _ in range(20)))
    assert (len(set(map(id, predictors))), len(loads)) == (1, 1)


async def test_a_caller_who_leaves_does_not_stop_the_load(live: LiveModels) -> None:
    leaving = asyncio.create_task(live.get("digits"))
    staying = asyncio.create_task(live.get("digits"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).version == 1


async def test_a_swap_changes_what_a_name_means(live: LiveModels, store: ModelStore) -> None:
    before = await live.get("digits")
    publish_cnn(store, "digits", seed=2)
    store.move_alias("digits", "production", 2)
    await live.refresh()
    after = await live.get("digits")
    assert (before.version, after.version) == (1, 2)
    answer = await before.predict(torch.zeros(1, 1, 8, 8), time.monotonic() + 5)
    assert answer.logits.shape == (1, 10)  # who still holds the old one is still answered


@pytest.mark.parametrize("num_labels", [10, 120])
async def test_the_best_labels_are_the_best_wherever_they_are_picked(
    live: LiveModels, store: ModelStore, num_labels: int
) -> None:
    publish_cnn(store, "many", seed=3, num_labels=num_labels)
    answer = await (await live.get("many")).predict(torch.randn(3, 1, 8, 8), time.monotonic() + 5)
    assert (answer.best_values is not None) is (num_labels == 120)
    for wanted in (1, 5, 7):
        values, labels = answer.best(wanted)
        expected = answer.probabilities.topk(wanted, dim=1)
        assert torch.equal(values, expected.values)
        assert torch.equal(labels, expected.indices)


async def test_the_old_version_goes_when_its_last_user_does(
    live: LiveModels, store: ModelStore
) -> None:
    held = await live.get("digits")
    network = weakref.ref(held.lane.runs[0].__closure__[0].cell_contents)  # type: ignore[attr-defined]
    publish_cnn(store, "digits", seed=2)
    store.move_alias("digits", "production", 2)
    gc.disable()  # references alone must do it
    try:
        await live.refresh()
        await asyncio.sleep(0)
        assert network() is not None
        del held
        assert network() is None
    finally:
        gc.enable()


async def test_a_version_that_cannot_load_changes_nothing(
    live: LiveModels, store: ModelStore
) -> None:
    await live.get("digits")
    broken = publish_cnn(store, "digits", seed=2)
    weights = broken.folder / "weights.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    store.move_alias("digits", "production", 2)
    await live.refresh()
    assert (await live.get("digits")).version == 1
    with pytest.raises(LoadFailed, match="digits:2"):
        await live.get("digits", "2")
    reasons = {one.version: one.reason for one in live.index()}
    assert "bytes" in reasons[2]


async def test_golden_outputs_that_differ_are_refused(live: LiveModels, store: ModelStore) -> None:
    version = publish_cnn(store, "other", seed=4)
    _replace_golden_outputs(version.folder)
    with pytest.raises(LoadFailed, match="golden"):
        await live.get("other")


async def test_only_what_is_proven_is_told_to_who_compiles(
    live: LiveModels, store: ModelStore
) -> None:
    publish_cnn(store, "digits", seed=2)
    told, load = [], live.loads.load
    live.loads._tell_proven = told.append

    def other_answers(version: Version) -> LoadedVersion:
        loaded = load(version)
        assert loaded.reference.outputs is not None
        wrong = replace(loaded.reference, outputs=loaded.reference.outputs + 1)
        return replace(loaded, reference=wrong) if version.number == 2 else loaded

    live.loads.load = other_answers
    with pytest.raises(LoadFailed, match="served, it changes golden outputs"):
        await live.get("digits", "2")
    assert told == []
    predictor = await live.get("digits")
    assert told == [predictor]


async def test_a_load_gives_the_interpreter_away_soon(live: LiveModels, store: ModelStore) -> None:
    publish_cnn(store, "other", seed=4)
    before, seen, load = sys.getswitchinterval(), [], live.loads.load
    live.loads.load = lambda version: seen.append(sys.getswitchinterval()) or load(version)  # type: ignore[func-returns-value]
    await asyncio.gather(live.get("digits"), live.get("other"))
    assert seen == pytest.approx([SLICE_S, SLICE_S])
    assert sys.getswitchinterval() == before


async def test_unload_and_load(live: LiveModels) -> None:
    await live.get("digits")
    await live.unload("digits")
    with pytest.raises(Unavailable, match="unloaded"):
        await live.get("digits")
    assert (await live.load("digits")).version == 1
    with pytest.raises(UnknownModel):
        await live.unload("nobody")


async def test_names_that_lead_nowhere(live: LiveModels) -> None:
    with pytest.raises(UnknownModel, match="digits"):
        await live.get("digit")
    with pytest.raises(UnknownVersion, match="no version 7"):
        await live.get("digits", "7")
    with pytest.raises(UnknownVersion, match="no alias 'champion'"):
        await live.get("digits", "champion")


def _replace_golden_outputs(folder: Path) -> None:
    """As a publisher with another library would have: the files agree with the manifest."""
    from safetensors.torch import load_file, save_file

    from models.checkpoint import GOLDEN, MANIFEST, read_manifest, seal

    manifest = read_manifest(folder)
    golden = load_file(folder / GOLDEN)
    (folder / GOLDEN).chmod(0o644)
    save_file({**golden, "outputs": golden["outputs"] * 1.1}, folder / GOLDEN)
    (folder / MANIFEST).unlink()
    seal(folder, manifest)
