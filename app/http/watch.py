"""One clock and one sweep for all connections, so that a request sets no timer of its own."""

import asyncio
from typing import Final, Protocol

NUM_EXPIRED_AT_ONCE: Final = 8


class Watched(Protocol):
    """What has a deadline, in the time of the watch, and is told when it has passed."""

    deadline: float

    def expire(self) -> None:
        """End what took too long, or set a later deadline."""


class Watch:
    """The coarse clock of one server and the sweep that ends connections past their deadline."""

    def __init__(self, tick_s: float) -> None:
        self.now = 0.0
        self.stopping = False
        self._tick_s = tick_s
        self._connections: set[Watched] = set()
        self._loop_time = 0.0
        self._is_sweeping = False

    def add(self, connection: Watched, loop: asyncio.AbstractEventLoop) -> None:
        """Watch over `connection` until `remove`; the sweep runs while there is one to watch."""
        self._connections.add(connection)
        if not self._is_sweeping:
            self._is_sweeping = True
            self._loop_time = loop.time()
            loop.call_later(self._tick_s, self._sweep, loop)

    def remove(self, connection: Watched) -> None:
        """Forget `connection`."""
        self._connections.discard(connection)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._connections:
            self._is_sweeping = False
            return
        # First, so that a fault in one connection does not end the watch over the others.
        loop.call_later(self._tick_s, self._sweep, loop)
        elapsed = loop.time() - self._loop_time
        self._loop_time += elapsed
        # Time in which the loop itself stood still is not the clients' fault.
        self.now += min(elapsed, 4 * self._tick_s)
        self._expire([each for each in self._connections if each.deadline <= self.now], loop)

    def _expire(self, due: list[Watched], loop: asyncio.AbstractEventLoop) -> None:
        """End the connections in `due`, a few at a time: a thousand would hold requests up."""
        if len(due) > NUM_EXPIRED_AT_ONCE:
            loop.call_later(0.001, self._expire, due[NUM_EXPIRED_AT_ONCE:], loop)
        for connection in due[:NUM_EXPIRED_AT_ONCE]:
            if connection.deadline <= self.now:
                connection.expire()
