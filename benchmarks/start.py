"""`python -m benchmarks.start`: how soon the service answers after its process was started.

Each round starts `python -c "import torch"` and the service on a store that holds `digits`, which
is loaded at the start, and asks it for `/livez`, for `/readyz` and for a prediction until each is
answered with 200. The difference to importing torch is what the service adds.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import httpx

from benchmarks.machine import this_machine
from benchmarks.record import Record, Table, command_of, tell
from benchmarks.rounds import Cell, Round, Sample, difference, estimate, measure_rounds, undisturbed
from benchmarks.system import HOST, free_port
from benchmarks.verdict import Verdict, at_most, goals_table
from training.quickstart import prepare

IMPORT, SERVICE = "import torch", "the service"
LIVE_S, READY_S, ANSWER_S = 0.5, 1.5, 2.0
DEADLINE_S: Final = 120.0
POLL_S: Final = 0.002


def import_torch() -> Sample:
    """A process that imports torch and ends."""
    began, cpu_s = time.perf_counter(), _cpu_s()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=DEADLINE_S)
    took_s = time.perf_counter() - began
    # Nothing of torch is there sooner: its time stands for each moment of the service's.
    moments = dict.fromkeys(("live_s", "ready_s", "answer_s"), took_s)
    return {**moments, "cpu_s": _cpu_s() - cpu_s}


def service(home: Path, picture: bytes) -> Sample:
    """From the start of the process to its first answers."""
    port = free_port()
    command = [sys.executable, "-m", "app", "serve", "--port", str(port), "--home", str(home)]
    command += ["--preload", "digits"]
    url, cpu_s, began = f"http://{HOST}:{port}", _cpu_s(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
                moments = {}
                for moment, ask in (
                    ("live_s", lambda: client.get("/livez")),
                    ("ready_s", lambda: client.get("/readyz")),
                    (
                        "answer_s",
                        lambda: client.post("/v1/models/digits/predict", files={"file": picture}),
                    ),
                ):
                    _until_200(ask)
                    moments[moment] = time.perf_counter() - began
        finally:
            process.kill()
    return {**moments, "cpu_s": _cpu_s() - cpu_s}


def _until_200(ask: Callable[[], httpx.Response]) -> None:
    until = time.monotonic() + DEADLINE_S
    while True:
        try:
            if ask().status_code == 200:
                return
        except httpx.TransportError:
            pass  # nobody listens yet
        if time.monotonic() > until:
            raise TimeoutError(f"the service was not there within {DEADLINE_S:g} s")
        time.sleep(POLL_S)


def _cpu_s() -> float:
    """Of processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str]) -> None:
    """Measure, print the tables and one line of JSON, and keep them where that is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    options = parser.parse_args(arguments)
    began = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        picture = prepare(home).read_bytes()
        cells = [Cell(IMPORT, import_torch), Cell(SERVICE, lambda: service(home, picture))]
        for cell in cells:
            cell.measure()  # files into the page cache
        rounds = measure_rounds(cells, options.rounds, tell=tell)
    kept = undisturbed(rounds)
    verdicts = _verdicts(kept)
    record = Record(
        "start",
        command_of("start", arguments),
        this_machine(),
        [f"{len(kept)} of {len(rounds)} rounds counted; `digits` is loaded at the start"],
        [goals_table("Goals", verdicts), _table(kept)],
        {
            "verdicts": [asdict(verdict) for verdict in verdicts],
            "rounds": [asdict(one) for one in rounds],
        },
        began,
    )
    record.show(write=options.write)


def _verdicts(rounds: Sequence[Round]) -> list[Verdict]:
    return [
        at_most("/livez, seconds", rounds, lambda samples: samples[SERVICE]["live_s"], LIVE_S),
        at_most(
            "/readyz, seconds more than importing torch",
            rounds,
            difference(SERVICE, IMPORT, "ready_s"),
            READY_S,
        ),
        at_most(
            "the first prediction, seconds more than importing torch",
            rounds,
            difference(SERVICE, IMPORT, "answer_s"),
            ANSWER_S,
        ),
    ]


def _table(rounds: Sequence[Round]) -> Table:
    rows = [("what", "/livez", "/readyz", "first prediction", "CPU")]
    for name in (IMPORT, SERVICE):
        figures = [
            str(estimate(rounds, lambda samples, n=name, f=figure: samples[n][f]))
            for figure in ("live_s", "ready_s", "answer_s", "cpu_s")
        ]
        rows.append((name, *figures))
    return Table("Seconds", rows)


if __name__ == "__main__":
    main(sys.argv[1:])
