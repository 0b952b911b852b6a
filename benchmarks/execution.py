"""`python -m benchmarks.execution`: a network as it is chosen, and in int8, beside eager fp32.

ResNet-18 from uint8 tensors to logits, in one process without HTTP: the network as its class
computes it; `auto` as a server serves it, compiled functions included; its int8 version. And
MobileNet-v2 with a head for ants and bees, in int8 and in fp32, on every photograph.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from app.engine.loading import load_version
from benchmarks.in_process import SIZES, compile_for
from benchmarks.machine import this_machine
from benchmarks.networks import RESNET, RESNET_INT8, publish_resnet_forms
from benchmarks.record import Record, Table, tell
from benchmarks.rounds import Cell, Round, Sample, estimate, measure_rounds, ratio, undisturbed
from benchmarks.verdict import Verdict, at_least, cells_table, goals_table
from models import checkpoint
from models.device import thread_count
from models.store import ModelStore
from training.feed import in_batches
from training.measure import opened, whole
from training.progress import drive

GOALS: Final = {"auto": 2.2, "int8": 2.5}
BATCH: Final = 32
LEAST_AGREEMENT: Final = 0.98
CPU: Final = torch.device("cpu")

Rows = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.6, help="of each cell in each round")
    parser.add_argument("--threads", type=int, default=thread_count())
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        cells, form = cells_of(home, arguments.seconds)
        rounds = measure_rounds(cells, arguments.rounds, tell=tell)
        agreement = ants_and_bees(home)
    record = record_of(cells, rounds, form, agreement, arguments)
    record.show(write=arguments.write)


def cells_of(home: Path, seconds: float) -> tuple[list[Cell], str]:
    """Every way to compute with every batch size; and the form that `auto` chose."""
    store = ModelStore(home / "models")
    publish_resnet_forms(store)
    auto = load_version(store.resolve(RESNET), CPU, "auto")
    compile_for(auto, SIZES)
    small = load_version(store.resolve(RESNET_INT8), CPU, "auto")
    finish = auto.manifest.preprocessing.finish
    ways: dict[str, Rows] = {
        "eager fp32": auto.network,
        "auto": auto.execution,
        "int8": small.execution,
    }
    cells = [
        Cell(f"{name}, {size} rows", measuring(lambda x, way=way: way(finish(x)), size, seconds))
        for size in SIZES
        for name, way in ways.items()
    ]
    return cells, auto.execution.form.name


def measuring(way: Rows, size: int, seconds: float) -> Callable[[], Sample]:
    """Repeats `way` on uint8 pictures for that long, at least three times."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (size, 3, 224, 224), generator=generator, dtype=torch.uint8)

    def measure() -> Sample:
        taken_ms: list[float] = []
        with torch.inference_mode():
            way(rows)
            began, cpu_s = time.perf_counter(), time.process_time()
            while len(taken_ms) < 3 or time.perf_counter() < began + seconds:
                before = time.perf_counter()
                way(rows)
                taken_ms.append((time.perf_counter() - before) * 1000)
        count = size * len(taken_ms)
        return {
            "rate_per_s": count / (time.perf_counter() - began),
            "p50_ms": float(np.percentile(taken_ms, 50)),
            "p99_ms": float(np.percentile(taken_ms, 99)),
            "cpu_us": (time.process_time() - cpu_s) * 1e6 / count,
            "faults": 0,
        }

    return measure


def ants_and_bees(home: Path) -> tuple[int, int] | None:
    """Photographs with the same class from int8 and fp32, of how many; None without the data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(os.environ.get("PYTORCHLIB_TEST_DATA", default))
    if not data.is_dir():
        tell(f"PYTORCHLIB_TEST_DATA names no folder: {data}; no photographs are compared")
        return None
    photographs, weights = data / "hymenoptera", data / "weights" / "mobilenet_v2.pth"
    backbone = ["--backbone", "torchvision/mobilenet_v2", "--weights", weights]
    command(home, "finetune", *backbone, "--data", photographs, "--name", "insects")
    command(home, "quantize", "--model", "insects", "--dataset", photographs)
    store = ModelStore(home / "models")
    whole_one, small = (checkpoint.load(store.version("insects", n).folder) for n in (1, 2))
    dataset, _ = drive(opened(whole_one.manifest, whole(str(photographs))))
    num_same = num_all = 0
    for part in dataset.parts.values():
        for inputs, _ in in_batches(part, whole_one.manifest.preprocessing.finish, BATCH):
            with torch.inference_mode():
                same = whole_one.network(inputs).argmax(1) == small.network(inputs).argmax(1)
            num_same, num_all = num_same + int(same.sum()), num_all + len(same)
    return num_same, num_all


def command(home: Path, *arguments: object) -> None:
    """One of ours, in a process of its own."""
    line = [sys.executable, "-m", "training", *map(str, arguments), "--home", str(home)]
    tell(f"{arguments[0]} …")
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, timeout=900)


def record_of(
    cells: Sequence[Cell],
    rounds: Sequence[Round],
    form: str,
    agreement: tuple[int, int] | None,
    arguments: argparse.Namespace,
) -> Record:
    """Tables and figures."""
    kept = undisturbed(rounds)
    verdicts = [verdict(name, size, kept) for name in GOALS for size in SIZES]
    if agreement is not None:
        share = agreement[0] / agreement[1]
        state = "met" if share >= LEAST_AGREEMENT else "missed"
        what = f"MobileNet-v2, ants and bees: int8 agrees with fp32 on {agreement[0]} of"
        verdicts.append(
            Verdict(f"{what} {agreement[1]}", f"{share:.4f}", f"at least {LEAST_AGREEMENT}", state)
        )
    ratios = {
        f"{name}, {size} rows, {figure}": str(estimate(kept, over_eager(name, size, figure)))
        for name in GOALS
        for size in SIZES
        for figure in ("p50_ms", "cpu_us")
    }
    rows = [("eager fp32 takes so many times as long", "median (95 % interval)"), *ratios.items()]
    return Record(
        name="execution",
        command=f"python -m benchmarks.execution --rounds {arguments.rounds} "
        f"--threads {arguments.threads}",
        machine=this_machine(),
        method=[
            f"{len(kept)} of {len(rounds)} rounds kept; {arguments.threads} thread(s); ways in "
            "random order in every round; ratios are of medians within a round.",
            f"`auto` chose {form}, and is compiled for both batch sizes.",
        ],
        tables=[
            goals_table("Goals", verdicts),
            cells_table("ResNet-18, uint8 tensors to logits", cells, kept),
            Table("Wall and processor time", rows),
        ],
        figures={
            "form": form,
            "agreement": agreement,
            "ratios": ratios,
            "rounds": [one.samples for one in kept],
        },
    )


def verdict(name: str, size: int, rounds: Sequence[Round]) -> Verdict:
    """Whether one way is as many times quicker as it should be."""
    what = f"ResNet-18, {size} rows: {name} over eager fp32"
    return at_least(what, rounds, over_eager(name, size, "p50_ms"), GOALS[name])


def over_eager(name: str, size: int, figure: str) -> Callable[..., float]:
    """Times that eager fp32 takes as long."""
    return ratio(f"eager fp32, {size} rows", f"{name}, {size} rows", figure)


if __name__ == "__main__":
    main()
