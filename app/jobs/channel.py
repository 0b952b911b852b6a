"""The child's end of its pipes: JSON lines to the server, words from it.

The child ends itself when the server's end closes, and closes its loop when the server has been
silent for a whole lease: then somebody else may have the job by now.
"""

import json
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

ALIVE, PAUSE, STOP, PUBLISH = "alive", "pause", "stop", "publish"
ORPHANED: Final = 3
"""Exit status of a child whose server is gone."""


class Channel:
    """What the child says and hears.

    Args:
        lease_s: how long the server may be silent.
    """

    def __init__(self, lease_s: float) -> None:
        self.lease_s = lease_s
        self._heard = time.monotonic()
        self._words: set[str] = set()
        self._changed = threading.Condition()
        self._saying = threading.Lock()
        # Whatever else prints must not look like a message of ours.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._in = sys.stdin.fileno()

    def listen(self) -> None:
        """Hear the server from now on."""
        threading.Thread(target=self._listen, name="hear the server", daemon=True).start()

    def say(self, kind: str, **fields: Any) -> None:
        """Send one line; the child ends where nobody reads it."""
        try:
            with self._saying:
                self._out.write(json.dumps({"kind": kind, **fields}) + "\n")
                self._out.flush()
        except OSError:
            os._exit(ORPHANED)

    def was_told(self, word: str) -> bool:
        """Whether the server has said this."""
        return word in self._words

    @property
    def is_fenced(self) -> bool:
        """Whether the server has been silent for so long that the job may be another's."""
        return time.monotonic() - self._heard > self.lease_s

    def wait_for(self, word: str) -> bool:
        """Wait until the server says this; False once it has been silent for a lease."""
        with self._changed:
            while word not in self._words:
                if self.is_fenced:
                    return False
                self._changed.wait(0.1)
            return True

    def _listen(self) -> None:
        rest = b""
        while True:
            select.select([self._in], [], [])
            data = os.read(self._in, 4096)
            if not data:
                os._exit(ORPHANED)
            *lines, rest = (rest + data).split(b"\n")
            with self._changed:
                self._heard = time.monotonic()
                self._words.update(line.decode() for line in lines)
                self._changed.notify_all()


def read_order() -> Mapping[str, Any]:
    """The first line, which says what to do."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            os._exit(ORPHANED)
        line += byte
    order: dict[str, Any] = json.loads(line)
    return order
