"""What is kept of heads for other connections: no more than holds for them, and not without end."""

from typing import Any

from app.http.known_head import KnownHead
from app.http.known_heads import MAX_HEADS, KnownHeads

SCOPE = {
    **{"type": "http", "path": "/a", "headers": [(b"host", b"x")], "http_version": "1.1"},
    **{"client": ("10.0.0.1", 1), "server": ("10.0.0.2", 80), "scheme": "http"},
    **{"extensions": {"of": "one connection"}, "state": {"of": "one request"}},
}


def head(path: str = "/a", length: int = 3, boundary: str = "x") -> KnownHead:
    lines = (
        f"POST {path} HTTP/1.1",
        f"Content-Length: {length}",
        f"Content-Type: multipart/form-data; boundary={boundary}",
    )
    return KnownHead("".join(f"{line}\r\n" for line in (*lines, "")).encode())


def offer(*_: Any) -> None:
    """What an application offers."""


def test_a_head_is_found_whatever_its_length_and_boundary() -> None:
    heads = KnownHeads()
    heads.keep(head(), SCOPE, offer)
    found = heads.find(head(length=12345, boundary="another"))
    assert found is not None
    assert found.repeat is offer
    assert heads.find(head("/b")) is None
    assert heads.find(KnownHead()) is None


def test_nothing_is_kept_of_the_connection_that_it_came_on() -> None:
    heads = KnownHeads()
    heads.keep(head(), SCOPE, offer)
    found = heads.find(head())
    assert found is not None
    assert found.scope.keys() == {"type", "path", "headers", "http_version"}


def test_the_one_not_used_for_longest_is_forgotten() -> None:
    heads = KnownHeads()
    for number in range(MAX_HEADS):
        heads.keep(head(f"/{number}"), SCOPE, offer)
    assert heads.find(head("/0")) is not None
    heads.keep(head("/new"), SCOPE, offer)
    assert heads.find(head("/1")) is None
    assert heads.find(head("/0")) is not None
    assert heads.find(head("/new")) is not None
