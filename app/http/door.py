"""Who comes while the service still starts: probes are answered, everybody else is kept for it.

torch takes seconds to import, and an orchestrator that asks `/livez` meanwhile must not find a dead
process. One thread accepts and looks at what was sent without taking it; only a probe is read and
answered. All other connections go to the server once it runs, their requests untouched.
"""

import contextlib
import logging
import selectors
import socket
import threading
from typing import Final

# More callers than this wait in the kernel's line, as they would without a door.
MAX_CONNECTIONS: Final = 256
MAX_HEAD_BYTES: Final = 8192
HEAD_END: Final = b"\r\n\r\n"
CLOSE_WITHIN_S: Final = 5.0
ANSWERS: Final = {
    b"/livez": (b"200 OK", b'{"live":true}'),
    b"/readyz": (b"503 Service Unavailable", b'{"ready":false,"reason":"the service is starting"}'),
}

log = logging.getLogger(__name__)


class EarlyDoor:
    """Stands at a socket that listens until `hand_over`; starts at once, in a thread of its own."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._unread: set[socket.socket] = set()
        self._kept: list[socket.socket] = []
        self._thread = threading.Thread(target=self._stand, name="early-door", daemon=True)
        self._thread.start()

    def hand_over(self) -> list[socket.socket]:
        """Close the door and return the connections that came and are still to be answered."""
        self._waker.send(b"x")
        self._thread.join(CLOSE_WITHIN_S)
        if self._thread.is_alive():
            log.error("the early door does not close; who stands in it is not served")
            return []
        return [*self._kept, *self._unread]

    def _stand(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        with self._selector, self._woken, self._waker:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._woken:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket):
                        self._look(key.fileobj)
                self._watch_listener(len(self._unread) + len(self._kept) < MAX_CONNECTIONS)

    def _watch_listener(self, wanted: bool) -> None:
        if wanted is not (self._listener in self._selector.get_map()):
            if wanted:
                self._selector.register(self._listener, selectors.EVENT_READ)
            else:
                self._selector.unregister(self._listener)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it is gone again, or files have run out: the next one may come in
            return
        connection.setblocking(False)
        self._unread.add(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _look(self, connection: socket.socket) -> None:
        """Answer a probe; keep what is anything else, or not all there yet."""
        self._selector.unregister(connection)
        self._unread.discard(connection)
        try:
            head = connection.recv(MAX_HEAD_BYTES, socket.MSG_PEEK)
        except OSError:
            head = b""
        answer = _answer(head)
        if not head:
            connection.close()
        elif answer is None:
            self._kept.append(connection)
        else:
            _send(connection, len(head), answer)


def _answer(head: bytes) -> bytes | None:
    """The answer to a probe, whole and with nothing behind it; None to anything else."""
    words = head.split(b" ", 2)
    if len(words) < 3 or words[0] != b"GET" or not head.endswith(HEAD_END):
        return None
    known = ANSWERS.get(words[1])
    if known is None or head.count(HEAD_END) > 1:
        return None
    status, body = known
    return (
        b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"cache-control: no-store\r\nconnection: close\r\n\r\n%b" % (status, len(body), body)
    )


def _send(connection: socket.socket, num_read: int, answer: bytes) -> None:
    """Take the probe, answer it and hang up; an answer this small fits into any socket."""
    with connection, contextlib.suppress(OSError):
        connection.recv(num_read)
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
