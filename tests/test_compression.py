"""Compressed bodies: there and back, damaged, and larger than they look."""

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.api.compression import accepted_encoding, deflate, inflate
from app.api.v2_errors import EncodingCorrupt, EncodingRefused, TooManyBytes, V2Error

LIMIT = 100_000


@settings(deadline=None)
@given(body=st.binary(max_size=2000), encoding=st.sampled_from(["gzip", "deflate"]))
def test_what_is_deflated_inflates_to_the_same(body: bytes, encoding: str) -> None:
    assert inflate(deflate(body, encoding), encoding, LIMIT) == body


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_the_bound_is_exact(encoding: str) -> None:
    assert len(inflate(deflate(bytes(LIMIT), encoding), encoding, LIMIT)) == LIMIT
    with pytest.raises(TooManyBytes, match="more than 100000 bytes"):
        inflate(deflate(bytes(LIMIT + 1), encoding), encoding, LIMIT)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_takes_no_memory(encoding: str) -> None:
    bomb = deflate(bytes(200_000_000), encoding)
    tracemalloc.start()
    with pytest.raises(TooManyBytes):
        inflate(bomb, encoding, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [100, 60_000])
def test_what_is_cut_damaged_or_followed_is_refused(encoding: str, size: int) -> None:
    whole = deflate(bytes(range(100)) * (size // 100), encoding)
    bodies = [whole[:-1], whole[: len(whole) // 2], b"", whole + b"x", whole + whole]
    damaged = bytearray(whole)
    damaged[-5] ^= 1
    bodies += [whole + bytes(40_000), bytes(damaged), b"x" + whole]
    for body in bodies:
        with pytest.raises(EncodingCorrupt):
            inflate(body, encoding, LIMIT)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 500])
def test_another_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(EncodingRefused, match="neither gzip nor deflate"):
        inflate(b"", encoding, LIMIT)


@settings(deadline=None)
@given(body=st.binary(max_size=300), encoding=st.sampled_from(["gzip", "deflate"]))
def test_any_bytes_inflate_or_are_refused(body: bytes, encoding: str) -> None:
    try:
        inflate(body, encoding, LIMIT)
    except V2Error:
        return


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("br;q=1.0, deflate;q=0.5", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("GZIP", "gzip"),
        ("gzip;q=0.000", None),
        ("identity", None),
        ("br", None),
        ("", None),
        (";;q=,", None),
    ],
)
def test_the_answer_is_encoded_as_the_client_allows(header: str, encoding: str | None) -> None:
    assert accepted_encoding(header) == encoding


def test_other_programs_read_what_is_deflated() -> None:
    assert gzip.decompress(deflate(b"abc", "gzip")) == b"abc"
    assert zlib.decompress(deflate(b"abc", "deflate")) == b"abc"
