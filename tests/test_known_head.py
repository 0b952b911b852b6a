"""Which heads are as good as one that was good: those that differ in length and boundary alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.http.known_head import MAX_HEAD_BYTES, OTHER, KnownHead, with_boundary, with_length

START = b"POST /v1/models/m/predict HTTP/1.1\r\nHost: localhost\r\n"
FORM = b"Content-Type: multipart/form-data; boundary="
LENGTH = b"Content-Length: "
BOUNDARIES = st.from_regex(rb"\A[0-9A-Za-z_-]{1,70}\Z")
LENGTHS = st.integers(0, 10**10 - 1)


def head(length: int, boundary: bytes, *, length_first: bool = False) -> bytes:
    lines = [FORM + boundary, LENGTH + b"%d" % length]
    return START + b"\r\n".join(reversed(lines) if length_first else lines) + b"\r\n\r\n"


@given(LENGTHS, BOUNDARIES, LENGTHS, BOUNDARIES, st.booleans(), st.binary(max_size=200))
def test_another_length_and_boundary_are_read(
    length: int, boundary: bytes, other: int, new: bytes, length_first: bool, body: bytes
) -> None:
    known = KnownHead(head(length, boundary, length_first=length_first))
    assert known
    repeated = head(other, new, length_first=length_first)
    found = known.matches(repeated + body)
    assert found == (len(repeated), len(repeated) + other, new)


@given(st.data(), st.booleans())
def test_any_other_byte_makes_it_another(data: st.DataObject, length_first: bool) -> None:
    good = head(123, b"abc", length_first=length_first)
    at = data.draw(st.integers(0, len(good) - 1))
    changed = good[:at] + data.draw(st.binary(max_size=2)) + good[at + 1 :]
    found = KnownHead(good).matches(changed)
    if found != OTHER:
        length = found.request_bytes - found.head_bytes
        assert int(changed.split(LENGTH)[1].split(b"\r\n")[0]) == length
        assert changed.split(FORM)[1].split(b"\r\n")[0] == found.boundary
        digits = changed.split(LENGTH)[1].split(b"\r\n")[0]
        same = changed.replace(LENGTH + digits, LENGTH + b"123")
        assert same.replace(FORM + found.boundary, FORM + b"abc") == good


@pytest.mark.parametrize(
    "unusual",
    [b"", b"a b", b'"a"', b"a=b", b"a\r", b"a\r\nX: y", b"7" * 71, b"a; charset=utf-8", b"\xe4"],
)
def test_a_boundary_of_other_letters_is_another_head(unusual: bytes) -> None:
    assert KnownHead(head(3, b"abc")).matches(head(3, unusual)) == OTHER


@pytest.mark.parametrize("unusual", [b"", b"-3", b"+3", b" 3", b"3 ", b"0x3", b"7" * 11, b"\xb2"])
def test_a_length_of_other_letters_is_another_head(unusual: bytes) -> None:
    changed = head(3, b"abc").replace(LENGTH + b"3", LENGTH + unusual)
    assert KnownHead(head(3, b"abc")).matches(changed) == OTHER


def test_of_two_content_types_none_may_differ() -> None:
    twice = START + FORM + b"abc\r\ncontent-type: text/plain\r\n\r\n"
    assert KnownHead(twice).matches(twice) == (len(twice), len(twice), None)
    assert KnownHead(twice).matches(twice.replace(b"abc", b"abd")) == OTHER


def test_a_head_without_either_is_known_as_it_is() -> None:
    plain = START + b"\r\n"
    assert KnownHead(plain).matches(plain + b"rest") == (len(plain), len(plain), None)


def test_long_heads_and_none_are_not_known() -> None:
    long = START + b"X: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n"
    for known in (KnownHead(), KnownHead(long)):
        assert not known
        assert known.matches(long) == OTHER


def test_fields_are_told_anew() -> None:
    fields = [(b"content-type", b"multipart/form-data; boundary=abc"), (b"content-length", b"3")]
    told = with_boundary(with_length(fields, 17), b"x-y")
    assert told == [
        (b"content-type", b"multipart/form-data; boundary=x-y"),
        (b"content-length", b"17"),
    ]
