"""Who waits to be let in while others are: everybody is taken in at once.

The event loop of libuv takes one new connection a round. A round in which requests are answered
takes a millisecond or more, so hundreds who come at the same moment would stand outside for a
second, while those who are in are answered again and again.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Final

from app.http.listener import BACKLOG

MAX_A_ROUND: Final = 64
"""More would hold up the requests of those who are in for milliseconds."""
IN_WITHIN_S: Final = 1.0


class Arrivals:
    """Takes in what waits at `listeners`; use it on the event loop.

    Args:
        listeners: sockets that listen, and do not block.
        make: makes the protocol of a connection.
    """

    def __init__(
        self, listeners: Sequence[socket.socket], make: Callable[[], asyncio.Protocol]
    ) -> None:
        self._listeners = listeners
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._is_due = False
        self._tasks: set[asyncio.Task[None]] = set()

    def one_came(self) -> None:
        """A connection was taken in, and others may wait behind it."""
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._take_in)

    def take_over(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        connection.setblocking(False)
        task = self._loop.create_task(self._serve(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def all_in(self) -> None:
        """Return once everybody who waits outside now is in."""
        for _ in range(BACKLOG // MAX_A_ROUND + 1):  # more the kernel lets nobody wait
            if not self._take_in():
                break
            await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=IN_WITHIN_S)

    def _take_in(self) -> bool:
        """Whether somebody was let in; each of them, once in, has who comes after looked for."""
        self._is_due = False
        for number in range(MAX_A_ROUND):
            connection = self._accepted()
            if connection is None:
                return number > 0
            self.take_over(connection)
        return True

    def _accepted(self) -> socket.socket | None:
        for listener in self._listeners:
            # Nobody is there, or has gone again, or the files of the process have run out.
            with contextlib.suppress(OSError):
                return listener.accept()[0]
        return None

    async def _serve(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError:  # it ended meanwhile
            connection.close()
