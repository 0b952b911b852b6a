"""One figure of all curves: small logarithmic plots side by side, points of rounds and medians."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import headless_pyplot, keep
from benchmarks.growth.row import Curve, Found

NUM_COLUMNS = 5
COLOURS = {"met": "#2a7f3f", "open": "#b07d00", "missed": "#b3261e"}


def draw(founds: Sequence[Found], path: Path) -> Path:
    """Write the figure; its form follows from the name's ending.

    Each plot shows the cost of every round, the line of their medians, and, dashed through the
    largest size, how steep the target would be.
    """
    pyplot = headless_pyplot("growth")
    panels = [(found, curve) for found in founds for curve in found.row.curves]
    num_rows = math.ceil(len(panels) / NUM_COLUMNS)
    figure, axes = pyplot.subplots(
        num_rows, NUM_COLUMNS, figsize=(3.1 * NUM_COLUMNS, 2.7 * num_rows), squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (found, curve) in zip(axes.flat, panels, strict=False):
        _panel(axis, found, curve)
    keep(pyplot, figure, path)
    return path


def _panel(axis: Any, found: Found, curve: Curve) -> None:
    verdict = found.verdicts()[list(found.row.curves).index(curve)]
    colour = COLOURS[verdict.state]
    sizes, costs = np.array(found.sizes, float), np.array(found.costs(curve))
    medians = found.medians(curve)
    for one in costs:
        axis.plot(sizes, one, ".", color="#888888", markersize=3)
    axis.plot(sizes, medians, "-o", color=colour, markersize=3.5, linewidth=1.2)
    axis.plot(
        sizes,
        medians[-1] * (sizes / sizes[-1]) ** curve.target,
        "--",
        color="#555555",
        linewidth=0.8,
    )
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = float(costs.min()), float(costs.max())
    room = max(10**0.5 / math.sqrt(high / low), 1.3)  # a flat curve looks flat
    axis.set_ylim(low / room, high * room)
    axis.set_title(f"{found.row.name}: {curve.what}\n{verdict.measured}", fontsize=7, color=colour)
    axis.set_xlabel(found.row.size, fontsize=7)
    axis.tick_params(labelsize=6)
    axis.tick_params(which="minor", labelleft=high / low * room**2 < 30, labelsize=5)
    axis.grid(True, which="major", linewidth=0.3)
