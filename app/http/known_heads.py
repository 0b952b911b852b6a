"""Heads that were answered on one connection, for the other connections of the same server.

Who opens a connection for each request, or for each of many threads, sends the same head on all of
them. What was found out about it once holds for every connection; only who calls is another.
"""

from collections import OrderedDict
from typing import Any, Final, NamedTuple

from app.http.known_head import KnownHead
from app.http.repeat import Repeat

MAX_HEADS: Final = 256
OF_ONE_CONNECTION: Final = frozenset({"server", "client", "scheme", "extensions", "state"})


class Remembered(NamedTuple):
    """What is known of one head.

    Attributes:
        head: as it came first.
        scope: what the parser made of it, without what belongs to a connection.
        repeat: what the application offers for it.
    """

    head: KnownHead
    scope: dict[str, Any]
    repeat: Repeat


class KnownHeads:
    """The heads that were used last, at most 256.

    Looked up by their hash, which is drawn anew for each process: how long a look takes says
    nothing of how much of a head, a key within it, was guessed right.
    """

    def __init__(self) -> None:
        self._remembered: OrderedDict[KnownHead, Remembered] = OrderedDict()

    def keep(self, head: KnownHead, scope: dict[str, Any], repeat: Repeat) -> None:
        """Remember a head whose request was answered; the one not used for longest may go."""
        shared = {name: scope[name] for name in scope.keys() - OF_ONE_CONNECTION}
        self._remembered[head] = Remembered(head, shared, repeat)
        self._remembered.move_to_end(head)
        if len(self._remembered) > MAX_HEADS:
            self._remembered.popitem(last=False)

    def find(self, head: KnownHead) -> Remembered | None:
        """What is known of an equal head."""
        found = self._remembered.get(head)
        if found is not None:
            self._remembered.move_to_end(head)
        return found
