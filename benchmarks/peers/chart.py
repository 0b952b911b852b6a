"""Draw `docs/peers.svg`: requests a second of several servers, from a result of the benchmark.

python -m benchmarks.peers.chart benchmarks/results/2026-11-28-0609-peers.md
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import headless_pyplot, keep
from benchmarks.record import document_in

CONNECTIONS = 32
TARGET = Path(__file__).resolve().parents[2] / "docs" / "peers.svg"
OURS, OTHERS = "#2a7f3f", "#8a8f98"


def rates(result: str) -> dict[str, list[float]]:
    """System -> its requests a second in each round, with `CONNECTIONS` connections.

    Args:
        result: the text of a file that `python -m benchmarks.peers --scenario P --write` wrote.

    Raises:
        ValueError: it is no such text.
    """
    ending = f" {CONNECTIONS}"
    by_system: dict[str, list[float]] = {}
    for one in document_in(result)["P"]["rounds"]:
        for cell, sample in one["samples"].items():
            if cell.endswith(ending):
                by_system.setdefault(cell.removesuffix(ending), []).append(sample["rate_per_s"])
    return by_system


def draw(by_system: dict[str, list[float]], path: Path) -> None:
    """Bars of the medians, the quickest on top, each with the rounds it comes from."""
    pyplot = headless_pyplot("peers")
    names = sorted(by_system, key=lambda name: float(np.median(by_system[name])))
    figure, axis = pyplot.subplots(figsize=(7.2, 0.45 * len(names) + 0.9))
    for place, name in enumerate(names):
        _bar(axis, place, name, by_system[name])
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(f"requests a second, perceptron, {CONNECTIONS} connections, one core")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    keep(pyplot, figure, path)


def _bar(axis: Any, place: int, name: str, per_s: list[float]) -> None:
    median = float(np.median(per_s))
    axis.barh(place, median, color=OURS if name.startswith("PyTorchLib") else OTHERS)
    axis.plot(per_s, [place] * len(per_s), ".", color="#222222", markersize=3)
    axis.annotate(
        f"{median:,.0f}",
        (max(per_s), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
    )


if __name__ == "__main__":
    draw(rates(Path(sys.argv[1]).read_text()), TARGET)
