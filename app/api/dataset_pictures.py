"""Datasets to look at: thumbnails, and a sheet with some pictures of every class."""

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw

from models.picture import PictureLimits, open_picture, oriented, to_mode
from training.dataset_manifest import SampleRecord
from training.dataset_store import StoredDataset

THUMBNAIL: Final = 192
ON_SHEET: Final = 96
A_CLASS: Final = 8
MAX_CLASSES: Final = 24
_CAPTION: Final = 18
_GAP: Final = 4


def thumbnail(path: Path, side: int = THUMBNAIL) -> bytes:
    """A JPEG of the picture at `path`, upright, at most `side` pixels a side."""
    return _jpeg(_small(path, side))


def contact_sheet(dataset: StoredDataset) -> bytes:
    """A JPEG with up to eight pictures of each class, for the first 24 classes."""
    by_class: dict[str, list[SampleRecord]] = defaultdict(list)
    for sample in dataset.samples():
        if sample.file is not None:
            by_class[sample.label].append(sample)
    rows = sorted(by_class.items())[:MAX_CLASSES]
    width = A_CLASS * (ON_SHEET + _GAP) + _GAP
    height = len(rows) * (ON_SHEET + _CAPTION + _GAP) + _GAP
    sheet = Image.new("RGB", (width, max(height, 1)), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (label, samples) in enumerate(rows):
        top = _GAP + index * (ON_SHEET + _CAPTION + _GAP)
        draw.text((_GAP, top + 2), f"{label[:60]}  ({len(samples)})", fill=(60, 60, 60))
        for place, sample in enumerate(_spread(samples, A_CLASS)):
            small = _small(dataset.file(sample), ON_SHEET)
            left = _GAP + place * (ON_SHEET + _GAP) + (ON_SHEET - small.width) // 2
            sheet.paste(small, (left, top + _CAPTION + (ON_SHEET - small.height) // 2))
    return _jpeg(sheet)


def _spread(samples: Sequence[SampleRecord], count: int) -> Sequence[SampleRecord]:
    stride = max(1, len(samples) // count)
    return samples[::stride][:count]


def _small(path: Path, side: int) -> Image.Image:
    image = to_mode(oriented(open_picture(path.read_bytes(), PictureLimits())), "RGB")
    factor = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BOX)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return file.getvalue()
