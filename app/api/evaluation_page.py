"""The report of an evaluation as one page: no script, nothing from elsewhere, dark and light.

Here the figures become shapes and words; `app/pages/evaluation.html` puts them on the page.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from app.api.page_template import share, template

MATRIX_PIXELS: Final = 520
MAX_NAMED: Final = 24
"""So many classes have their names and counts in the matrix."""
MAX_CELLS: Final = 100
"""Up to so many classes the matrix is drawn cell by cell, beyond them as a picture."""
MAX_BARS: Final = 30
MAX_CHANGED: Final = 14
"""So many samples that were gained, and that were lost, are shown."""
DIAGRAM_PIXELS: Final = 320


def evaluation_page(found: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The page as HTML.

    Args:
        found: what `Evaluation.to_json` gave.
        facts: `id`, `created` (Unix seconds), `by`, and `promotion` where a gate was asked.
    """
    report = found["report"]
    pictures = found.get("thumbnails", {})
    pair = found["comparison"]
    return template("evaluation.html").render(
        found=found,
        facts=facts,
        when=datetime.fromtimestamp(facts["created"], UTC).strftime("%d %B %Y, %H:%M UTC"),
        report=report,
        other=found["compared_with"],
        pair=pair,
        tiles=list(_tiles(report, found["speed"])),
        diagram=reliability(report["bins"]),
        matrix=matrix(report),
        bars=bars(report["classes"]),
        num_classes=sum(1 for one in report["classes"] if one["support"]),
        mistakes=[_shown(one, pictures) for one in found["worst_mistakes"]],
        changed=[
            (title, total, [_shown(one, pictures) for one in listed[:MAX_CHANGED]])
            for title, total, listed in _changed(pair)
        ],
    )


def _tiles(report: Mapping[str, Any], speed: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The single figures: value, name, and what it means."""
    for k, value in report["top_k"].items():
        if int(k) > 1:
            yield share(value), f"top {k}", "the right class is among so many"
    yield f"{report['macro_f1']:.3f}", "macro F1", "mean over the classes"
    yield f"{report['negative_log_likelihood']:.3f}", "log loss", "nats, lower is better"
    yield f"{report['brier_score']:.3f}", "Brier score", "0 to 2, lower is better"
    yield share(report["calibration_error"]), "calibration error", "0 is honest"
    fitted = report["temperature"]
    if fitted:
        yield f"{fitted['value']:.3f}", "fitted temperature", "applied: " + _applied(report)
    yield f"{speed['samples_per_second']:,.0f}/s", "throughput", "reading included"
    yield f"{speed['alone_p50_ms']:.2f} ms", "one input", "median on the device"


def _applied(report: Mapping[str, Any]) -> str:
    return f"{report['applied_temperature']:.3f}"


def reliability(bins: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bars of the reliability diagram in a square of `DIAGRAM_PIXELS`, y downwards."""
    largest = max((one["count"] for one in bins), default=0) or 1
    shapes = []
    for one in bins:
        if not one["count"]:
            continue
        x, width = one["lower"] * DIAGRAM_PIXELS, (one["upper"] - one["lower"]) * DIAGRAM_PIXELS
        right, confident = (
            DIAGRAM_PIXELS * (1 - one["accuracy"]),
            DIAGRAM_PIXELS * (1 - one["confidence"]),
        )
        shapes.append(
            {
                "x": round(x + 1, 2),
                "width": round(width - 2, 2),
                "y": round(right, 2),
                "height": round(DIAGRAM_PIXELS - right, 2),
                "gap_y": round(min(right, confident), 2),
                "gap_height": round(abs(right - confident), 2),
                "count_height": round(44 * one["count"] / largest, 2),
                "title": f"{one['count']} samples, confidence {share(one['confidence'])}, "
                f"right {share(one['accuracy'])}",
            }
        )
    return shapes


def matrix(report: Mapping[str, Any]) -> dict[str, Any]:
    """The confusion matrix as cells with a strength, or as a picture where there are many."""
    labels = [one["label"] for one in report["classes"]]
    supports = [one["support"] for one in report["classes"]]
    cells = list(_cells(report))
    side = MATRIX_PIXELS / len(labels)
    shape: dict[str, Any] = {"side": round(side, 3), "labels": labels, "num": len(labels)}
    if len(labels) > MAX_CELLS:
        return {**shape, "picture": _matrix_picture(cells, supports), "cells": []}
    return {
        **shape,
        "picture": None,
        "named": len(labels) <= MAX_NAMED,
        "cells": [
            {
                "x": round(column * side, 2),
                "y": round(row * side, 2),
                "strength": round(_strength(count, supports[row]), 3),
                "right": row == column,
                "count": count,
                "title": f"{labels[row]} taken for {labels[column]}: {count}"
                if row != column
                else f"{labels[row]}: {count} of {supports[row]} right",
            }
            for row, column, count in cells
        ],
    }


def bars(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The classes that occur; where they are many, the weakest of them."""
    occurring = [one for one in classes if one["support"]]
    if len(occurring) <= MAX_BARS:
        return occurring
    return sorted(occurring, key=lambda one: (one["f1"], -one["support"]))[:MAX_BARS]


def _cells(report: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Row, column and count of everything that is not empty."""
    if report["confusion"] is None:
        yield from (tuple(cell) for cell in report["confusion_cells"])
        return
    for row, counts in enumerate(report["confusion"]):
        yield from ((row, column, count) for column, count in enumerate(counts) if count)


def _strength(count: int, support: int) -> float:
    """How dark a cell is: rare mistakes must still be seen, so by the root of the share."""
    return 0.12 + 0.88 * float((count / max(support, 1)) ** 0.5)


def _matrix_picture(cells: Sequence[tuple[int, int, int]], supports: Sequence[int]) -> str:
    """At most a pixel a cell; transparent where nothing is, for dark and light pages alike."""
    from PIL import Image

    scale = max(1, -(-len(supports) // MATRIX_PIXELS))  # so many classes share a dot
    side = -(-len(supports) // scale)
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    for row, column, count in sorted(cells, key=lambda cell: cell[0] == cell[1]):
        colour = (46, 160, 110) if row == column else (226, 92, 62)
        alpha = int(255 * max(0.45, _strength(count, supports[row])))
        picture.putpixel((column // scale, row // scale), (*colour, alpha))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _changed(pair: Mapping[str, Any] | None) -> Iterator[tuple[str, int, Sequence[Any]]]:
    if pair is not None:
        yield "Gained", pair["num_gained"], pair["gained"]
        yield "Lost", pair["num_lost"], pair["lost"]


def _shown(one: Mapping[str, Any], pictures: Mapping[str, str]) -> dict[str, Any]:
    return {**one, "picture": pictures.get(str(one["index"]))}
