"""`python -m benchmarks.evaluate`: evaluation through the serving path against a bare loop.

The bare loop decodes, computes and counts in one process, one batch after another. The evaluation
does the same through the predictor's queue, reading ahead, with the same form of the network: fp32,
or with `--precision auto` what a server chooses by itself. Both alternate, round by round, and a
ratio is the median of the rounds' own. The last parts look at memory on two sizes of one dataset,
and at the waiting time of predicts while an evaluation runs.
"""

import argparse
import asyncio
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch

from app.engine.predictor import Predictor
from app.evaluation.evaluator import Evaluator
from app.evaluation.question import Question
from app.main import Engine, build_engine
from app.settings import Settings
from models import checkpoint, networks
from models.manifest import Manifest, NetworkSpec
from models.preprocessing import Preprocessing
from models.store import ModelStore, Version
from training.config import DataConfig
from training.datasets import measured_on, split_source
from training.evaluate import evaluate
from training.feed import in_batches
from training.measure import as_trained, whole
from training.progress import drive
from training.report import Report
from training.source import Part
from training.trial import positions

GOAL: Final = 0.9
P99_GOAL: Final = 1.5
BATCH: Final = 32  # the largest that the server gives its device
PATIENCE_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Waits:
    """What single predicts took, and the share of the device that was taken beside them."""

    p50_ms: float
    p99_ms: float
    taken: float

    def __str__(self) -> str:
        return f"p50 {self.p50_ms:.2f}, p99 {self.p99_ms:.2f} ms, {self.taken:.1%} of the device"


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["memory", "mnist", "photographs", "waiting"])
    parser.add_argument("--precision", choices=["auto", "fp32"], default="fp32", help="of serving")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of predicts, each way")
    arguments = parser.parse_args()
    data = Path(os.environ.get("PYTORCHLIB_TEST_DATA", "../shared/data")).resolve()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_all(ModelStore(Path(folder) / "models"), data, arguments))


async def _all(store: ModelStore, data: Path, arguments: argparse.Namespace) -> None:
    digits = Question(str(publish_cnn(store)), "mnist", "mnist", part="test", data_root=str(data))
    async with started(store, arguments.precision) as engine:
        only = arguments.only
        if only in (None, "memory"):
            few, many = await memory(engine)
            print(f"peak memory after 500 pictures {few:.0f} MiB, after 5,000 {many:.0f} MiB")
        for name, ask in (("mnist", lambda: digits), ("photographs", lambda: insects(store, data))):
            if only in (None, name):
                ratios = await throughput(engine, ask(), arguments.rounds)
                print(f"{name}: {_told(ratios)} of the bare loop, goal {GOAL}")
        if only in (None, "waiting"):
            pairs = await waiting(engine, digits, arguments.rounds, arguments.seconds)
            ratios = [busy.p99_ms / alone.p99_ms for alone, busy in pairs]
            print(f"predict's p99 while evaluating: {_told(ratios)} times, goal {P99_GOAL}")


def insects(store: ModelStore, data: Path) -> Question:
    """All 397 photographs, copied into class folders without parts, to a network for them."""
    photographs = store.folder.parent / "photographs"
    for part in ("train", "val"):
        shutil.copytree(data / "hymenoptera" / part, photographs, dirs_exist_ok=True)
    version = publish_mobilenet(store, data / "weights")
    return Question(str(version), str(photographs), photographs.name, part="train", top_k=(1,))


@asynccontextmanager
async def started(
    store: ModelStore, precision: Literal["auto", "fp32"] = "fp32"
) -> AsyncIterator[Engine]:
    """The engine of a server over `store`, which compiles nothing."""
    settings = Settings(home=store.folder.parent, device="cpu", precision=precision, compile="off")
    engine = build_engine(settings)
    engine.batcher.start()
    try:
        yield engine
    finally:
        await engine.batcher.stop(1)
        engine.decoder.close()


async def throughput(engine: Engine, question: Question, rounds: int) -> list[float]:
    """Ratio of samples a second, evaluation to bare loop, one a round."""
    predictor = await engine.live.get(*question.model.split(":"))
    ratios = []
    for _ in range(rounds):
        seconds: dict[str, float] = {}
        contestants: dict[str, Callable[[], Any]] = {
            "bare": lambda: asyncio.to_thread(bare_loop, predictor, question),
            "served": lambda: Evaluator(engine.live, _threads()).evaluate(
                question, time.monotonic() + PATIENCE_S
            ),
        }
        reports: dict[str, Report] = {}
        for name in random.sample(sorted(contestants), 2):
            began = time.perf_counter()
            found = await contestants[name]()
            seconds[name] = time.perf_counter() - began if name == "bare" else found.seconds
            reports[name] = found if name == "bare" else found.report
        assert reports["bare"].confusion == reports["served"].confusion
        ratios.append(seconds["bare"] / seconds["served"])
        print(
            f"  {question.shown_as}: bare {seconds['bare']:.2f} s, served {seconds['served']:.2f}"
        )
    return ratios


def bare_loop(predictor: Predictor, question: Question) -> Report:
    """The least code that gives the same report: read, compute as served, count, in turn."""
    torch.set_num_threads(_threads())
    manifest, execution = predictor.manifest, predictor.loaded.execution
    part, classes = opened(question, manifest)
    part = Part(part.samples, positions(classes, manifest.labels)[part.targets])
    batches = in_batches(part, manifest.preprocessing.finish, BATCH)
    with torch.inference_mode():
        report = drive(evaluate(execution, batches, manifest.labels))
    torch.set_num_threads(1)
    return report


def opened(question: Question, manifest: Manifest) -> tuple[Part, tuple[str, ...]]:
    """The part that is evaluated, ready to be read, and the dataset's classes."""
    config: DataConfig = (
        as_trained(manifest, question.dataset, data_root=question.data_root)
        if question.dataset == "mnist"
        else whole(question.dataset)
    )
    source = split_source(config)
    part = source.parts[question.part or measured_on(source.parts)]
    return Part(part.samples.prepared(manifest.preprocessing), part.targets), source.classes


async def memory(engine: Engine) -> list[float]:
    """Peak of this process after a folder of 500 pictures, and after one of 5,000."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for num in (500, 5000):
            question = Question("mnist:1", str(pictures(Path(folder) / str(num), num)), "noise")
            await Evaluator(engine.live, 2).evaluate(question, time.monotonic() + PATIENCE_S)
            found.append(_peak_mib())
    return found


async def waiting(
    engine: Engine, question: Question, rounds: int, seconds: float
) -> list[tuple[Waits, Waits]]:
    """Single predicts, alone and beside evaluations, in turn; one pair a round."""
    predictor = await engine.live.get(*question.model.split(":"))
    row = torch.rand(1, *predictor.input_shape)
    lane = predictor.lane

    async def predicts() -> Waits:
        times, own_s, before_s = [], 0.0, lane.statistics.compute_s.total
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            asked = time.perf_counter()
            own_s += (await predictor.predict(row, time.monotonic() + 30)).compute_ms / 1000
            times.append(1000 * (time.perf_counter() - asked))
            await asyncio.sleep(random.expovariate(1 / 0.005))
        taken_s = lane.statistics.compute_s.total - before_s - own_s
        quantiles = statistics.quantiles(times, n=100)
        return Waits(quantiles[49], quantiles[98], taken_s / (time.monotonic() - began))

    async def go_on() -> None:
        while True:
            await Evaluator(engine.live, 2).evaluate(question, time.monotonic() + PATIENCE_S)

    found = []
    await predicts()
    for _ in range(rounds):
        alone = await predicts()
        beside = asyncio.create_task(go_on())
        await asyncio.sleep(1)
        await predictor.predict(row, time.monotonic() + 30)
        busy = await predicts()
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
        found.append((alone, busy))
        print(f"  alone {alone}; beside {busy}")
    return found


def publish_cnn(store: ModelStore) -> Version:
    """A small network for MNIST, with random weights: its speed is that of a trained one."""
    options = {"channels": 1, "size": 28, "num_classes": 10}
    steps = [
        {"step": "decode"},
        {"step": "orient"},
        {"step": "color", "mode": "L"},
        {"step": "resize", "size": [28, 28]},
        {"step": "scale"},
        {"step": "normalize", "mean": [0.13], "std": [0.31]},
    ]
    return _published(store, "mnist", "cnn", options, steps, tuple("0123456789"), {})


def publish_mobilenet(store: ModelStore, weights: Path) -> Version:
    """mobilenet_v2 with a new head for two classes."""
    name = "torchvision/mobilenet_v2"
    state = torch.load(weights / "mobilenet_v2.pth", weights_only=True)
    kept = {key: value for key, value in state.items() if not key.startswith("classifier")}
    steps = [
        {"step": "decode"},
        {"step": "orient"},
        {"step": "color", "mode": "RGB"},
        {"step": "resize", "size": 256},
        {"step": "crop", "size": [224, 224]},
        {"step": "scale"},
        {"step": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    ]
    return _published(store, "insects", name, {"num_classes": 2}, steps, ("ants", "bees"), kept)


def _published(
    store: ModelStore,
    name: str,
    network: str,
    options: dict[str, Any],
    steps: list[dict[str, Any]],
    labels: tuple[str, ...],
    state: dict[str, Any],
) -> Version:
    torch.manual_seed(0)
    built = networks.build(network, options).eval()
    built.load_state_dict(state, strict=False)
    manifest = Manifest(
        network=NetworkSpec(name=network, options=options),
        preprocessing=Preprocessing.model_validate({"steps": steps}),
        labels=labels,
    )
    return store.publish(name, lambda folder: checkpoint.save(folder, built, manifest))


def pictures(folder: Path, num: int) -> Path:
    """A folder of small pictures of noise, a sub-folder a class."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for index in range(num):
        pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(index % 10) / f"{index}.png")
    return folder


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _told(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
