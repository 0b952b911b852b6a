"""What an application may offer for the requests that repeat a head: an answer without ASGI.

A client sends the same head again and again, and what follows from it alone need not be found out
again. In `scope["extensions"][EXTENSION]` a connection that can take the offer has a function for
it; what is offered there answers from then on whatever comes with this head, on any connection.
"""

from collections.abc import Callable
from typing import Final, Protocol

Client = tuple[str, int] | None
"""Address and port of who calls, where that is known."""

EXTENSION: Final = "pytorchlib.repeat"


class Reply(Protocol):
    """Writes the one answer to a request."""

    def __call__(self, status: int, lines: bytes, body: bytes) -> None:
        """Write it.

        Args:
            lines: the header fields, `content-length` among them, each with its line end. Nobody
                checks them: only what cannot hold a line end may be put there.
        """


class Repeat(Protocol):
    """Answers a request by its body."""

    def __call__(
        self, client: Client, body: bytes, boundary: bytes | None, reply: Reply
    ) -> Callable[[], object] | None:
        """Begin to answer `client`, or return None for a request that has to take the usual way.

        `boundary` is that of its form, which the head says anew; None where it brings no form.

        It raises nothing. `reply` is called once, now or later, unless the caller goes before:
        then what was returned is called, which does no harm when all is over.
        """
