"""Only what a crop keeps, in bands on several threads: the same bits as whole and alone."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.engine.crew import Crew
from models import resizing
from models.preprocessing import Interpolation
from models.resizing import cropped, resized

SIDES = st.integers(1, 90)
FILTERS = [Image.Resampling[name.upper()] for name in get_args(Interpolation)]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


class Told:
    """Threads that say what they were given; they do it one after the other."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pieces: list[Any] = []

    def share(self, function: Any, pieces: Sequence[Any]) -> list[Any]:
        self.pieces += pieces
        return [function(piece) for piece in pieces]


@pytest.fixture(autouse=True)
def bands_of_few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "BAND_PIXELS", 16)


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    crew = Crew(3)
    yield crew
    crew.close()


@given(
    before=st.tuples(SIDES, SIDES),
    after=st.tuples(st.one_of(SIDES, st.sampled_from([8, 16, 32, 64])), SIDES),
    crop=st.tuples(SIDES, SIDES),
    resampling=st.sampled_from(FILTERS),
    mode=st.sampled_from(["L", "RGB"]),
)
@settings(max_examples=300, deadline=None)
def test_parts_and_bands_have_the_bits_of_the_whole(
    crew: Crew,
    before: tuple[int, int],
    after: tuple[int, int],
    crop: tuple[int, int],
    resampling: Image.Resampling,
    mode: str,
) -> None:
    image = noise(*before, mode)
    for size in (after, after[::-1]):
        whole = image.resize(size, resampling)
        for threads in (None, crew):
            assert np.array_equal(resized(image, size, resampling, threads=threads), whole)
            part = resized(image, size, resampling, kept=crop, threads=threads)
            assert np.array_equal(cropped(part, crop), cropped(whole, crop))


@pytest.mark.parametrize("resampling", FILTERS)
def test_a_photograph_s_size_has_the_same_bits(crew: Crew, resampling: Image.Resampling) -> None:
    for before, after in [((500, 375), (341, 256)), ((375, 500), (256, 341))]:
        image = noise(*before)
        wanted = cropped(image.resize(after, resampling), (224, 224))
        part = resized(image, after, resampling, kept=(224, 224), threads=crew)
        assert np.array_equal(cropped(part, (224, 224)), wanted)


def test_what_the_crop_leaves_out_is_not_made() -> None:
    bilinear = Image.Resampling.BILINEAR
    assert resized(noise(500, 375), (341, 256), bilinear, kept=(224, 224)).size == (341, 224)
    assert resized(noise(375, 500), (256, 341), bilinear, kept=(224, 224)).size == (224, 341)
    assert resized(noise(500, 375), (309, 232), bilinear, kept=(224, 224)).size == (309, 232)


def test_a_side_is_cut_only_where_fp32_holds_its_edges() -> None:
    """232 of 375 pixels: a third of one pixel in a thousand would be another level."""
    threads = Told(4)
    resized(noise(500, 375), (309, 232), Image.Resampling.BILINEAR, threads=threads)
    assert threads.pieces == []
    resized(noise(500, 375), (341, 256), Image.Resampling.BILINEAR, threads=threads)
    assert [(band.left, band.top, band.right, band.bottom) for band in threads.pieces] == [
        (0, 0, 341, 64),
        (0, 64, 341, 128),
        (0, 128, 341, 192),
        (0, 192, 341, 256),
    ]


def test_as_many_bands_as_keep_pillow_s_order_of_passes() -> None:
    """It brings the height to size first where that loses twice as much: other bits."""
    threads = Told(16)
    resized(noise(500, 375), (341, 256), Image.Resampling.BILINEAR, threads=threads)
    assert [band.size for band in threads.pieces] == [(341, 64)] * 4
    threads.pieces.clear()
    resized(noise(341, 375), (341, 256), Image.Resampling.BILINEAR, threads=threads)
    assert threads.pieces == []


def test_nobody_is_called_for_a_small_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resizing, "BAND_PIXELS", 1 << 16)
    threads = Told(8)
    resized(noise(300, 300), (256, 256), Image.Resampling.BILINEAR, threads=threads)
    assert threads.pieces == []
    resized(noise(500, 400), (256, 256), Image.Resampling.BILINEAR, threads=threads)
    assert len(threads.pieces) == 3


def test_who_asks_takes_the_first_piece(crew: Crew) -> None:
    names = crew.share(lambda _: threading.current_thread().name, range(3))
    assert names[0] == threading.current_thread().name
    assert all(name.startswith("crew") for name in names[1:])
    assert crew.share(str, [7]) == ["7"]
