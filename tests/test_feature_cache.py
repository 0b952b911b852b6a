"""Features on disk: whole or absent, bounded, and the ones used longest ago go first."""

import os
from pathlib import Path

import torch
from torch import Tensor

from training.feature_cache import FeatureCache


def names(*numbers: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in numbers]


def features(*numbers: int) -> Tensor:
    return torch.tensor([[float(number)] * 1000 for number in numbers])


def test_what_is_added_is_found_by_its_digest(tmp_path: Path) -> None:
    FeatureCache(tmp_path, "k", 1 << 20).add(names(1, 2), features(1, 2))
    found = FeatureCache(tmp_path, "k", 1 << 20).read(frozenset(names(2, 3)))
    assert list(found) == names(2)
    assert torch.equal(found[names(2)[0]], features(2)[0])
    assert FeatureCache(tmp_path, "other", 1 << 20).read(frozenset(names(2))) == {}


def test_a_damaged_file_is_dropped(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "k", 1 << 20)
    cache.add(names(1), features(1))
    (path,) = (tmp_path / "k").iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cache.read(frozenset(names(1))) == {}
    assert not path.exists()


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, "k", 10_000)
    for number in (1, 2):
        cache.add(names(number), features(number))
        for path in (tmp_path / "k").iterdir():
            os.utime(path, (path.stat().st_mtime - 100,) * 2)
    assert cache.read(frozenset(names(1))) != {}  # which makes it the one used last
    FeatureCache(tmp_path, "other", 10_000).add(names(3), features(3))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 10_000
    assert list(cache.read(frozenset(names(1, 2)))) == names(1)
