"""Canaries, shadows, eviction: what an alias sends where, and what goes when memory is needed."""

import asyncio
import gc
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import torch
from conftest import publish_cnn

from app.engine import live as live_module
from app.engine.live import LiveModels
from app.engine.route import point_of
from app.engine.shadow import compare
from app.errors import LoadFailed
from app.main import build_engine
from app.settings import Settings
from models.aliases import Split
from models.store import PRODUCTION, ModelStore

pytestmark = pytest.mark.anyio
ROWS = torch.zeros(2, 1, 8, 8)


@pytest.fixture
async def live(store: ModelStore) -> AsyncIterator[LiveModels]:
    """Versions 1, 2 and 3 of `digits`."""
    for seed in (2, 3):
        publish_cnn(store, "digits", seed=seed)
    settings = Settings(home=store.folder.parent, device="cpu", threads=1, watch_interval_s=60)
    engine = build_engine(settings)
    engine.batcher.start()
    yield engine.live
    await engine.live.stop()
    await engine.batcher.stop(1.0)
    engine.decoder.close()


def deadline() -> float:
    return time.monotonic() + 5


async def test_a_canary_gets_its_share(live: LiveModels, store: ModelStore) -> None:
    store.move_alias("digits", PRODUCTION, 1, split=Split(canary=2, share=0.2))
    drawn = Counter([(await live.get("digits")).version for _ in range(2000)])
    assert drawn.keys() == {1, 2}
    assert 300 < drawn[2] < 500
    keyed = {(await live.get("digits", canary_key="anna")).version for _ in range(50)}
    assert len(keyed) == 1
    store.move_alias("digits", PRODUCTION, 2)
    await live.refresh()
    assert {(await live.get("digits")).version for _ in range(50)} == {2}


def test_a_growing_share_only_adds_keys() -> None:
    points = {key: point_of("digits:2", str(key)) for key in range(2000)}
    assert 0.18 < sum(point < 0.2 for point in points.values()) / 2000 < 0.22
    assert {key for key, point in points.items() if point < 0.1} < {
        key for key, point in points.items() if point < 0.2
    }
    assert point_of("digits:3", "1") != points[1]


async def test_a_canary_that_cannot_load_is_left_out_and_told(
    live: LiveModels, store: ModelStore
) -> None:
    (store.folder / "digits" / "2" / "weights.safetensors").chmod(0o644)
    (store.folder / "digits" / "2" / "weights.safetensors").write_bytes(b"")
    store.move_alias("digits", PRODUCTION, 1, split=Split(canary=2, share=0.9))
    assert {(await live.get("digits")).version for _ in range(30)} == {1}
    route = live.route("digits", PRODUCTION)
    assert route is not None
    assert "digits:2 cannot be loaded" in route.faults[0]


async def test_a_shadow_is_compared_and_counted_and_never_returned(
    live: LiveModels, store: ModelStore
) -> None:
    store.move_alias("digits", PRODUCTION, 1, split=Split(shadow=2))
    predictor = await live.get("digits")
    alone = await (await live.get("digits", "1")).predict(ROWS, deadline())
    answer = await predictor.predict(ROWS, deadline())
    assert predictor.version == 1
    assert torch.equal(answer.logits, alone.logits)
    (mirror,) = live.mirrors().values()
    async with asyncio.timeout(5):
        while mirror.counts.num_agreed + mirror.counts.num_differed < 2:
            await asyncio.sleep(0.01)
    assert 0 < mirror.counts.largest_difference <= 1
    store.move_alias("digits", PRODUCTION, 1)
    await live.refresh()
    assert live.mirrors() == {}


async def test_a_shadow_is_passed_over_while_others_wait(
    live: LiveModels, store: ModelStore
) -> None:
    store.move_alias("digits", PRODUCTION, 1, split=Split(shadow=2))
    predictor = await live.get("digits")
    await asyncio.gather(*(predictor.predict(ROWS, deadline()) for _ in range(200)))
    (mirror,) = live.mirrors().values()
    assert mirror.counts.num_dropped > 0


def test_labels_are_compared_by_name() -> None:
    theirs = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    others = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.3, 0.2]])
    agreed, difference = compare(("a", "b"), theirs, ("b", "a", "c"), others)
    assert agreed == 2
    assert difference == pytest.approx(0.3)


async def test_the_least_recently_used_version_goes_first(
    live: LiveModels, store: ModelStore
) -> None:
    await live.get("digits")
    live_bytes = (await live.get("digits", "2")).memory_bytes
    new_bytes = (store.folder / "digits" / "2" / "weights.safetensors").stat().st_size
    live.memory.budget_bytes = 2 * live_bytes + new_bytes
    publish_cnn(store, "digits", seed=4)
    await live.get("digits", "3")
    await (await live.get("digits", "2")).predict(ROWS, deadline())
    await live.get("digits", "4")
    assert {one.version for one in live.loaded()} == {1, 2, 4}  # 1 is production's


async def test_aliases_in_use_are_never_evicted(
    live: LiveModels, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "DRAIN_S", 0.05)
    first = await live.get("digits")
    file = store.folder / "digits" / "2" / "weights.safetensors"
    live.memory.budget_bytes = file.stat().st_size
    with pytest.raises(LoadFailed, match="PYTORCHLIB_MEMORY_BUDGET_MB"):
        await live.get("digits", "2")
    assert (await live.get("digits")) is first
    monkeypatch.setattr(live_module, "ALIAS_KEPT_S", -1.0)
    del first
    live.loads.forgive("digits")
    assert (await live.get("digits", "2")).version == 2


async def test_an_evicted_version_is_freed_and_whoever_holds_it_is_answered(
    live: LiveModels,
) -> None:
    held = await live.get("digits", "2")
    gone = weakref.ref(held)
    gc.disable()
    try:
        live._evict(held)
        assert (await held.predict(ROWS, deadline())).logits.shape == (2, 10)
        assert gone() is not None
        del held
        assert gone() is None
        assert live.memory.used_bytes == 0
    finally:
        gc.enable()


async def test_a_new_version_has_run_before_it_answers_and_has_counted_nothing(
    live: LiveModels,
) -> None:
    predictor = await live.get("digits")
    assert predictor.lane.expected_ms(32) > 0
    assert predictor.statistics.inference_count == 0


async def test_a_quiet_store_is_looked_at_by_stamps_alone(
    live: LiveModels, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await live.get("digits")
    await live.refresh()
    looks: list[str] = []
    monkeypatch.setattr(store, "traffic", looks.append)
    live.store = store
    await live.refresh()
    assert looks == []


async def test_what_is_prepared_is_not_loaded_again(live: LiveModels, store: ModelStore) -> None:
    await live.get("digits")
    held = await live.prepare([store.version("digits", 2)])
    store.move_alias("digits", PRODUCTION, 2)
    await live.refresh("digits")
    assert await live.get("digits") is held[0]


@pytest.mark.slow
async def test_replaced_and_damaged_versions_leave_no_network_behind(
    live: LiveModels, store: ModelStore
) -> None:
    await live.get("digits")
    others = {id(one) for one in gc.get_objects() if type(one).__name__ == "CNN"}
    for seed in range(10, 16):
        version = publish_cnn(store, "digits", seed=seed)
        if seed % 2:
            weights = version.folder / "weights.safetensors"
            weights.chmod(0o644)
            weights.write_bytes(weights.read_bytes()[:-1])
        store.move_alias("digits", PRODUCTION, version.number)
        await live.refresh()
    gc.collect()
    networks = [one for one in gc.get_objects() if type(one).__name__ == "CNN"]
    networks = [one for one in networks if id(one) not in others]
    assert len(live.loaded()) == 1
    assert live.memory.used_bytes == live.loaded()[0].memory_bytes
    assert len(networks) == 1  # the one that serves
