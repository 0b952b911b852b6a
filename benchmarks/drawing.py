"""Figures without a screen, the same bytes from the same points."""

from pathlib import Path
from typing import Any


def headless_pyplot(salt: str) -> Any:
    """`matplotlib.pyplot`; `salt` goes into the names within an SVG, which are random otherwise."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = salt
    from matplotlib import pyplot

    return pyplot


def keep(pyplot: Any, figure: Any, path: Path) -> None:
    """Write a figure and let go of it; its form follows from the name's ending."""
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
