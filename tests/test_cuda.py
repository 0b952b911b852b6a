"""What only a GPU can show; skipped with a sentence where there is none."""

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from app.engine.batch_policy import LaneOptions
from app.engine.batcher import Batcher
from app.engine.device_error import is_device_lost, is_out_of_memory
from app.engine.execution import Reference, choose_form, interleaved_best
from app.engine.pipeline import Accelerator, Pipeline, accelerator_of
from models.forms import other_forms
from models.preprocessing import Preprocessing

pytestmark = [pytest.mark.gpu, pytest.mark.anyio]

ROOT = Path(__file__).resolve().parent.parent
BYTES = LaneOptions(max_batch_items=16, dtype=torch.uint8)
SHAPE = (3, 32, 32)


@pytest.fixture
def device() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    yield torch.device("cuda", 0)
    gc.collect()
    torch.cuda.empty_cache()


def accelerator(device: torch.device) -> Accelerator:
    found = accelerator_of(device)
    assert found is not None
    return found


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return body.eval().requires_grad_(False).to(device)


def pixels(num_rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_rows, *SHAPE), dtype=torch.uint8, generator=generator)


class Responding:
    """Normalise, forward, softmax: what the server records."""

    def __init__(self, device: torch.device) -> None:
        torch.backends.cudnn.allow_tf32 = False
        steps = [
            {"step": "decode"},
            {"step": "color", "mode": "RGB"},
            {"step": "resize", "size": [32, 32]},
            {"step": "scale"},
            {"step": "normalize", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        ]
        self.finish = Preprocessing(steps=steps).finisher(device)
        self.network = network(device)

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        logits = self.network(self.finish(batch))
        return {"logits": logits, "probabilities": logits.softmax(1)}


async def test_every_size_is_recorded_and_answers_as_eagerly(device: torch.device) -> None:
    respond = Responding(device)
    pipeline = Pipeline(respond, accelerator(device))
    with torch.inference_mode():
        for size in (1, 2, 4, 8, 16):
            told = pipeline.record(pixels(size))
            assert told in ("is recorded", "is not replayed: recorded, it is slower"), told
            expected = respond(pixels(size, seed=size).to(device))["logits"].cpu()
            found = pipeline(pixels(size, seed=size))["logits"]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert 1 in pipeline.recordings, "for one row a recording must be quicker"


async def test_what_waits_for_the_device_is_not_recorded(device: torch.device) -> None:
    def waits(batch: Tensor) -> dict[str, Tensor]:
        return {"logits": batch.float().flatten(1) * float(batch.float().mean())}

    pipeline = Pipeline(waits, accelerator(device))
    assert "is not recorded" in pipeline.record(pixels(2))
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    with torch.inference_mode():
        assert pipeline(pixels(2))["logits"].shape == (2, 3 * 32 * 32)


async def test_callers_get_their_own_rows(device: torch.device) -> None:
    batcher = Batcher(device)
    batcher.start()
    respond = Responding(device)
    assert batcher.accelerators[0] is not None
    run = Pipeline(respond, batcher.accelerators[0])
    lane = batcher.open_lane("gpu", run, BYTES, row_shape=SHAPE)
    for size in lane.sizes:
        await lane.call(lambda size=size: run.record(pixels(size)))
    asked = [pixels(1 + number % 5, seed=number) for number in range(300)]
    answers = await asyncio.gather(*(lane.submit(one) for one in asked))
    with torch.inference_mode():
        for one, answer in zip(asked, answers, strict=True):
            expected = respond(one.to(device))["logits"].cpu()
            torch.testing.assert_close(answer.outputs["logits"], expected, rtol=1e-3, atol=1e-3)
    await batcher.stop(5)


async def test_another_thread_may_load_while_one_records(device: torch.device) -> None:
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            network(device)(torch.rand(4, *SHAPE, device=device)).cpu()

    other = threading.Thread(target=load)
    other.start()
    try:
        for _ in range(10):
            told = Pipeline(Responding(device), accelerator(device)).record(pixels(4))
            assert "is not recorded" not in told, told
    finally:
        stop.set()
        other.join(30)


async def test_too_large_a_batch_is_halved(device: torch.device) -> None:
    def greedy(batch: Tensor) -> dict[str, Tensor]:
        if len(batch) > 4:
            torch.empty(1 << 50, dtype=torch.uint8, device=batch.device)
        return {"y": batch.float().flatten(1).sum(1, keepdim=True)}

    batcher = Batcher(device)
    batcher.start()
    assert batcher.accelerators[0] is not None
    run = Pipeline(greedy, batcher.accelerators[0])
    options = LaneOptions(max_batch_items=8, dtype=torch.uint8)
    lane = batcher.open_lane("greedy", run, options, row_shape=SHAPE)
    rows = pixels(8)
    answer = await lane.submit(rows)
    torch.testing.assert_close(answer.outputs["y"], rows.float().flatten(1).sum(1, keepdim=True))
    assert lane.largest_batch == 4
    await batcher.stop(5)


async def test_memory_that_ran_out_loses_nothing(device: torch.device) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    assert is_out_of_memory(caught.value)
    assert not is_device_lost(caught.value, device)


async def test_a_broken_device_is_lost() -> None:
    """In a process of its own, which is of no use afterwards."""
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    code = """
import torch
from app.engine.device_error import is_device_lost
device = torch.device("cuda", 0)
try:
    table = torch.zeros(4, device=device)
    table[torch.tensor([10**6], device=device)].cpu()
except RuntimeError as error:
    print(is_device_lost(error, device))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "True", done.stderr


async def test_reduced_precision_is_a_candidate_and_is_timed(device: torch.device) -> None:
    torch.backends.cudnn.allow_tf32 = False
    one = network(device)
    names = {form.name for form in other_forms(one, "auto")}
    assert names & {"bf16, channels last", "fp16, channels last"}
    inputs = torch.rand(8, *SHAPE, device=device)
    with torch.inference_mode():
        reference = Reference(inputs, one(inputs).cpu())
        assert interleaved_best([one], inputs, 2)[0] > 0
    execution = choose_form(one, reference, "auto")
    assert [trial.verdict for trial in execution.trials if trial.verdict.startswith("chosen")]
