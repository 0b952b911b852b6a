"""The socket that listens. It is bound before anything slow, so a taken port is told at once."""

import socket
from ipaddress import ip_address
from typing import Final

BACKLOG: Final = 2048


class ListenError(Exception):
    """The address cannot be listened on."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host` and `port` (0 takes a free port).

    Bound before anything slow, so that a taken port is told at once. Raises ListenError.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenError(f"Cannot listen on {host}: {error.strerror}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`; no where nobody can tell."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return bool(found) and all(ip_address(one[4][0]).is_loopback for one in found)
