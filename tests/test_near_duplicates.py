"""Pictures that look alike: what the hash forgives and tells apart, and that the search ends."""

import io
import time

import imagehash
import numpy as np
import pytest
from PIL import Image

from training.near_duplicates import MAX_DISTANCE, find_alike, perceptual_hash


def photograph(seed: int) -> Image.Image:
    """Smooth noise with detail: no flat areas, as in most photographs."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (9, 9), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((240, 180), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + generator.integers(-12, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def distance(first: Image.Image, second: Image.Image) -> int:
    one, other = perceptual_hash(first), perceptual_hash(second)
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file, formats=["JPEG"]).convert("L")


@pytest.mark.parametrize("seed", range(5))
def test_another_size_or_quality_is_the_same_picture(seed: int) -> None:
    image = photograph(seed)
    assert distance(image, image.resize((120, 90))) <= MAX_DISTANCE
    assert distance(image, as_jpeg(image, 30)) <= MAX_DISTANCE
    assert distance(image, photograph(seed + 100)) > 2 * MAX_DISTANCE


def test_the_hash_is_that_of_imagehash_but_for_the_way_of_shrinking() -> None:
    for seed in range(20):
        small = photograph(seed).resize((32, 32), Image.Resampling.BOX)
        ours = perceptual_hash(small)
        theirs = int(str(imagehash.phash(small)), 16)
        assert ours is not None
        # They also ask whether the mean brightness is above the median: it always is.
        assert (ours ^ theirs).bit_count() <= 2


def test_what_is_flat_or_tiny_has_no_hash() -> None:
    assert perceptual_hash(Image.new("L", (200, 200), 90)) is None
    assert perceptual_hash(photograph(1).resize((31, 200))) is None


def test_every_pair_within_the_distance_is_found() -> None:
    """Against all pairs compared one by one, with planted neighbours at every distance."""
    generator = np.random.default_rng(0)
    hashes = [int(one) for one in generator.integers(0, 2**63, 300)]
    for position in range(40):
        changed = generator.choice(64, size=1 + position % 9, replace=False)
        hashes.append(hashes[position] ^ sum(1 << int(bit) for bit in changed))
    linked = {
        frozenset((one, other))
        for one in range(len(hashes))
        for other in range(one)
        if (hashes[one] ^ hashes[other]).bit_count() <= MAX_DISTANCE
    }
    assert {frozenset(group) for group in find_alike(hashes).groups} == linked


def test_equal_hashes_are_one_group_and_none_is_none() -> None:
    assert find_alike([7, None, 7, None, 7]).groups == [[0, 2, 4]]
    assert find_alike([]) == ([], True)


@pytest.mark.slow
def test_a_hundred_thousand_are_searched_in_seconds() -> None:
    hashes = [int(one) for one in np.random.default_rng(0).integers(0, 2**63, 100_000)]
    started = time.process_time()
    assert find_alike(hashes).is_whole
    assert time.process_time() - started < 10


@pytest.mark.slow
def test_a_search_made_to_be_slow_is_cut() -> None:
    """All agree in six of the seven pieces, so that each bucket holds everything."""
    started = time.process_time()
    found = find_alike([number << 40 for number in range(50_000)])
    assert not found.is_whole
    assert time.process_time() - started < 20
