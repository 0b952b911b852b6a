"""Answers given before the application is asked: the error body by path, and the safe headers.

Used below the framework (`http_protocol`) and around it (`origin`), so that a client sees one
form of error whoever refuses it.
"""

import json
from http import HTTPStatus

SAFE_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
CLOSED_CONTENT_POLICY = b"default-src 'none'; frame-ancestors 'none'"


class HttpRefusal(Exception):
    """A request that is refused: HTTP status, a short code for machines, a sentence for people."""

    def __init__(self, status: int, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status
        self.code = code
        self.sentence = sentence

    def body(self, path: bytes) -> bytes:
        """Return the JSON error in the form of the interface that `path` belongs to."""
        if path == b"/v2" or path.startswith(b"/v2/"):
            return json.dumps({"error": self.sentence}).encode()
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"type": kind, "message": self.sentence, "param": None, "code": self.code}
        return json.dumps({"error": error}).encode()

    def headers(self, body: bytes) -> list[tuple[bytes, bytes]]:
        """Return the headers that go with `body`; the connection ends with this answer."""
        return [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]

    def status_line(self) -> bytes:
        """Return the first line of the answer, with its line end."""
        return f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n".encode()
