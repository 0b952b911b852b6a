"""Evaluation through the serving path: the figures of offline, shared with those who predict."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import publish_cnn
from test_train import config

from app.errors import DeadlineExceeded
from app.evaluation.answer import Evaluation
from app.evaluation.evaluator import Evaluator
from app.evaluation.question import Question
from app.main import Engine, build_engine
from app.settings import Settings
from models import checkpoint
from models.store import ModelStore
from training.builtin import read_builtin
from training.measure import as_trained, measure, whole
from training.progress import Progress, drive
from training.publish import publish
from training.samples import InMemory
from training.train import train
from training.trial import ClassesUnknown, NoEvidence

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def trained_store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """`digits`: version 1 untrained, version 2 trained."""
    store = ModelStore(tmp_path_factory.mktemp("home") / "models")
    publish_cnn(store, "digits", seed=1)
    publish(drive(train(config())), store, "digits")
    return store


@pytest.fixture
async def engine(trained_store: ModelStore) -> AsyncIterator[Engine]:
    settings = Settings(home=trained_store.folder.parent, device="cpu", threads=1)
    engine = build_engine(settings)
    engine.batcher.start()
    yield engine
    await engine.batcher.stop(1)
    engine.decoder.close()


async def found(engine: Engine, question: Question, watch=lambda _: None) -> Evaluation:
    return await Evaluator(engine.live, 2).evaluate(question, time.monotonic() + 60, watch)


def digits(model: str = "digits:2", **options) -> Question:
    return Question(model, "digits", "digits", **options)


async def test_the_figures_are_those_of_offline(engine: Engine, trained_store: ModelStore) -> None:
    loaded = checkpoint.load(trained_store.version("digits", 2).folder)
    manifest = loaded.manifest
    offline = drive(
        measure(loaded.network, manifest, as_trained(manifest, "digits"), torch.device("cpu"))
    )
    served = await found(engine, digits())
    assert (served.dataset, served.part) == ("digits", "test")
    assert served.report.confusion == offline.report.confusion
    assert served.report.figures() == pytest.approx(offline.report.figures(), abs=1e-6)
    assert served.findings.num_left_out == 0


async def test_two_versions_are_compared_on_what_neither_has_seen(
    engine: Engine, tmp_path: Path
) -> None:
    source = read_builtin("digits", tmp_path).parts["train"]
    assert isinstance(source.samples, InMemory)
    np.savez(tmp_path / "all.npz", x=source.samples.data.numpy(), y=source.targets.numpy())
    question = Question("digits:2", str(tmp_path / "all.npz"), "all", compare_to="digits:1")
    served = await found(engine, question)
    pair, seen = served.findings.comparison, served.findings.seen[0]
    assert pair is not None
    assert served.findings.num_offered == 1797
    assert served.findings.num_left_out == seen.trained_on + seen.selected_on
    assert 1600 < served.findings.num_left_out == 1797 - pair.num_samples
    assert served.findings.seen[1].trained_on == 0
    assert pair.num_gained > 10 * pair.num_lost
    assert pair.p_value < 1e-6


async def test_all_seen_is_no_evidence(engine: Engine) -> None:
    with pytest.raises(NoEvidence, match="were left out"):
        await found(engine, digits(leave_out_seen=True, part="validation"))


async def test_names_thumbnails_and_speed_are_there(engine: Engine) -> None:
    served = await found(engine, digits("digits:1", compare_to="digits:2"))
    told = served.to_json()
    worst = told["worst_mistakes"][0]
    assert worst["name"].startswith("sample ")
    assert told["thumbnails"][str(worst["index"])].startswith("data:image/png;base64,")
    assert told["comparison"]["num_lost"] > 50
    assert told["comparison"]["lost"][0]["name"]
    assert told["speed"]["samples_per_second"] > 0
    assert told["speed"]["alone_p50_ms"] > 0
    assert told["compared_with"]["version"] == 2


async def test_a_folder_is_streamed_and_what_cannot_be_read_is_named(
    engine: Engine, tmp_path: Path
) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in "01":
        (tmp_path / label).mkdir()
        for number in range(20):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    (tmp_path / "1" / "bad.png").write_bytes(b"no picture")
    served = await found(engine, Question("digits:2", str(tmp_path), "mine"))
    assert served.findings.num_offered == 40
    assert (served.num_unreadable, served.unreadable[0][:9]) == (1, "1/bad.png")
    (tmp_path / "1" / "bad.png").unlink()
    loaded = checkpoint.load(engine.store.version("digits", 2).folder)
    offline = measure(loaded.network, loaded.manifest, whole(str(tmp_path)), torch.device("cpu"))
    expected = drive(offline).report.figures()
    assert served.report.figures() == pytest.approx(expected, abs=1e-6)


async def test_cancelling_ends_it_within_a_batch(engine: Engine) -> None:
    steps: list[Progress] = []
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def watch(progress: Progress) -> None:
        steps.append(progress)
        loop.call_soon_threadsafe(started.set)
        time.sleep(0.01)

    task = asyncio.create_task(found(engine, digits(part="train"), watch))
    await asyncio.wait_for(started.wait(), 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 5)
    assert steps[-1].step < steps[-1].num_steps


async def test_the_deadline_ends_it(engine: Engine) -> None:
    with pytest.raises(DeadlineExceeded):
        await Evaluator(engine.live, 1).evaluate(digits(), time.monotonic() - 1)


async def test_a_dataset_of_other_classes_is_refused(engine: Engine, tmp_path: Path) -> None:
    from test_datasets import picture_folder

    with pytest.raises(ClassesUnknown, match="digits:2 has no label cats, dogs"):
        await found(engine, Question("digits:2", str(picture_folder(tmp_path / "a")), "pets"))


async def test_predicts_go_before_and_make_batches_short(engine: Engine) -> None:
    rows = torch.rand(1, 1, 8, 8)
    predictor = await engine.live.get("digits", "2")
    task = asyncio.create_task(found(engine, digits(part="train")))
    waits = []
    while not task.done():
        answer = await predictor.predict(rows, time.monotonic() + 10)
        waits.append(answer.queue_ms)
        await asyncio.sleep(0.002)
    served = await task
    assert served.findings.num_offered > 1000
    assert sorted(waits)[len(waits) // 2] < 100
