"""What rank 0 and one other rank say to each other: JSON lines over a socket of the file system.

The socket lies in a folder that nobody else may enter, and the system closes it when either process
dies: so a death is noticed without a clock.
"""

import json
import socket
from pathlib import Path
from typing import Any, Final

MAX_LINE_BYTES: Final = 1 << 16


class LinkClosed(Exception):
    """The process at the other end is gone."""


class Link:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._rest = b""

    @classmethod
    def to(cls, path: Path, deadline_s: float) -> "Link":
        """Connect to whoever listens at `path`; raises LinkClosed where nobody does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(deadline_s)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            raise LinkClosed(f"rank 0 does not listen at {path}: {error}") from None
        return cls(connection)

    def say(self, word: str, **fields: Any) -> None:
        """Send one line.

        Raises:
            LinkClosed: nobody is there to read it.
        """
        line = json.dumps({"word": word, **fields})[: MAX_LINE_BYTES - 1]
        try:
            self._connection.sendall(line.encode() + b"\n")
        except OSError as error:
            raise LinkClosed(f"the connection is closed: {error}") from None

    def hear(self, deadline_s: float) -> dict[str, Any]:
        """The next line.

        Raises:
            LinkClosed: the other end is closed.
            TimeoutError: it was silent for so long.
        """
        self._connection.settimeout(max(1e-3, deadline_s))
        while b"\n" not in self._rest:
            try:
                data = self._connection.recv(MAX_LINE_BYTES)
            except TimeoutError:
                raise
            except OSError as error:
                raise LinkClosed(f"the connection is closed: {error}") from None
            if not data:
                raise LinkClosed("the connection is closed")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """Let the other end notice."""
        self._connection.close()
