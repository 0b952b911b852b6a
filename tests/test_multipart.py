"""Forms: what is read by looking for the delimiter is what the parser of any piece reads."""

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.api import multipart
from app.api.multipart import MAX_FIELD_BYTES, Form, FormReader, parse_form
from app.errors import BadRequest

TYPE = "multipart/form-data; boundary=b"
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'


def by_parser(content_type: str, body: bytes, max_parts: int = 4) -> Form | str:
    try:
        reader = FormReader(content_type, "file", max_parts)
        reader.feed(body)
        reader.check_end()
        return reader.form
    except BadRequest as error:
        return str(error)


def by_either(content_type: str, body: bytes, max_parts: int = 4) -> Form | str:
    try:
        return parse_form(content_type, body, file_field="file", max_parts=max_parts)
    except BadRequest as error:
        return str(error)


PIECES = st.sampled_from(
    [
        *(b"--b", b"--b--", b"\r\n--b", b"\r\n--b--\r\n", b"\r\n", b"\r\n\r\n", b"\n", b"--", b"b"),
        *(b'Content-Disposition: form-data; name="file"', b'; filename="x y.jpg"', b" "),
        *(b'\r\nContent-Disposition: form-data; name="top_k"', b"content-type: image/jpeg", b"3"),
        *(b"\r\nContent-Type: image/jpeg", b"\xff\xd8\x00", b'"', b"\\", b"%22", b":", b"X: y"),
    ]
)


@given(st.lists(PIECES, max_size=14).map(b"".join))
@example(FILE + b"\r\n\xff\xd8\r\n--b--\r\n")
@example(FILE + b"\r\n\r\n--b--\r\n")
@example(FILE + b"\r\n--b--\r\n")
@example(FILE + b"\r\nx\r\n--b--\r\nmore")
@example(FILE + b"\r\nx\r\n--b \r\nContent-Disposition: form-data; name=y\r\n\r\nz\r\n--b--")
@example(FILE + b"\r\nx\r\n--bc\r\n--b--\r\n")
@example(b"preamble\r\n" + FILE + b"\r\nx\r\n--b--\r\n")
def test_whatever_comes_is_read_alike(body: bytes) -> None:
    assert by_either(TYPE, body) == by_parser(TYPE, body)


@given(st.lists(st.tuples(st.sampled_from(["file", "top_k", "x.y"]), st.binary(max_size=40))))
def test_forms_of_a_real_client_are_read_without_the_parser(
    fields: list[tuple[str, bytes]],
) -> None:
    files = [(name, ("a picture.jpg", content, "image/jpeg")) for name, content in fields]
    sent = httpx.Request("POST", "http://x", files=files or [("file", b"")])
    found = multipart._usual_form(sent.headers["content-type"], sent.read(), "file", 1000)
    assert found is not None
    assert found == by_parser(sent.headers["content-type"], sent.read(), 1000)


@pytest.mark.parametrize(
    "content_type",
    [
        'multipart/form-data; boundary="b"',
        "multipart/form-data;boundary=b",
        "multipart/form-data; charset=utf-8; boundary=b",
        "Multipart/Form-Data; boundary=b",
    ],
)
def test_other_spellings_of_the_type_are_the_parsers(content_type: str) -> None:
    body = FILE + b"\r\nx\r\n--b--\r\n"
    assert multipart._usual_form(content_type, body, "file", 4) is None
    assert by_either(content_type, body) == Form(files=[b"x"])


def test_the_same_bounds_hold() -> None:
    field = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n%b\r\n'
    large = field % (b"x" * (MAX_FIELD_BYTES + 1)) + b"--b--\r\n"
    assert by_either(TYPE, large) == by_parser(TYPE, large)
    assert "has more than" in str(by_either(TYPE, large))
    many = field % b"1" * 5 + b"--b--\r\n"
    assert by_either(TYPE, many) == by_parser(TYPE, many) == "the form has more than 4 parts"
    assert by_either(TYPE, many, 5) == Form(fields={"a": "1"})
