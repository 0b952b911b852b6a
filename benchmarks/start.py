"""`python -m benchmarks.start`: from process start to the first answered predict of `digits`.

Each round starts `python -c "import torch"` and then the service on a store that holds `digits`,
and times both: the difference is what the service adds to torch.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx

from benchmarks.machine import this_machine
from benchmarks.record import Record, Table
from training.quickstart import prepare

GOAL_S: Final = 2.0
DEADLINE_S: Final = 120.0


def import_torch_s() -> float:
    """Seconds of a process that imports torch and ends."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=DEADLINE_S)
    return time.perf_counter() - began


def first_answer_s(home: Path, picture: bytes) -> float:
    """Seconds from the start of the service to its first answer to a predict request."""
    command = [sys.executable, "-m", "app", "serve", "--port", "0", "--home", str(home)]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(";")[0].removeprefix("Serving on ")
            url = f"{address}/v1/models/digits/predict"
            answer = httpx.post(url, files={"file": picture}, timeout=DEADLINE_S)
            answer.raise_for_status()
            return time.perf_counter() - began
        finally:
            process.kill()


def with_cpu_s(measured: Callable[[], float]) -> tuple[float, float]:
    """What it measures, and the seconds of CPU of the process that it started and ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = measured()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        picture = prepare(home).read_bytes()
        import_torch_s(), first_answer_s(home, picture)  # files into the page cache
        rounds, cpu_rounds = [], []
        for number in range(arguments.rounds):
            torch, torch_cpu = with_cpu_s(import_torch_s)
            service, service_cpu = with_cpu_s(lambda: first_answer_s(home, picture))
            rounds.append((torch, service))
            cpu_rounds.append((torch_cpu, service_cpu))
            print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
    added = statistics.median(service - torch for torch, service in rounds)
    rows = [("what", "median s", "least", "most")]
    for name, values in (
        ('python -c "import torch"', [torch for torch, _ in rounds]),
        ("process start to first answer", [service for _, service in rounds]),
        ("added by the service, round by round", [service - torch for torch, service in rounds]),
        ("the same in seconds of CPU", [service - torch for torch, service in cpu_rounds]),
    ):
        rows.append((name, *(f"{f(values):.2f}" for f in (statistics.median, min, max))))
    record = Record(
        name="start",
        command=f"python -m benchmarks.start --rounds {arguments.rounds}",
        machine=this_machine(),
        method=[f"Goal: at most {GOAL_S:g} s more than importing torch; seen: {added:.2f} s."],
        tables=[Table("From process start to the first answered predict of digits", rows)],
        figures={
            "rounds": rounds,
            "cpu_rounds": cpu_rounds,
            "added_s": added,
            "reached": added <= GOAL_S,
        },
    )
    record.show(write=arguments.write)


if __name__ == "__main__":
    main()
