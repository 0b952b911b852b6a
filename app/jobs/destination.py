"""Where webhooks may go: an allow-list of hosts, held against the address that is really used.

A name is looked up once, and what was looked at is what is connected to: a name that leads
elsewhere a moment later leads nowhere.
"""

import asyncio
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final

from app.errors import BadInput

if TYPE_CHECKING:
    from httpx import URL

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
LOCALHOST: Final = "localhost"
_LOOPBACK: Final[tuple[Network, ...]] = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_TRANSLATED: Final[tuple[Network, ...]] = (ip_network("64:ff9b::/96"), ip_network("2002::/16"))
"""Global by their look, and an IPv4 address of any kind by what becomes of them."""


class DestinationRefused(BadInput):
    """No webhook goes there."""


class Destinations:
    """The hosts that webhooks may go to.

    Args:
        hosts: names, addresses, and networks such as `10.0.0.0/8`. What lies on no public address
            is reached only where its address or network is listed; `localhost` stands for loopback.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._names = {host.lower() for host in hosts}
        networks = [network for host in hosts if (network := _network(host)) is not None]
        self._networks = (*networks, *(_LOOPBACK if LOCALHOST in self._names else ()))

    def check(self, url: str) -> "URL":
        """`url`, taken apart, if its host is listed; looks nothing up.

        Raises:
            DestinationRefused: it is not, or `url` is none that a webhook can go to.
        """
        import httpx  # slow to load, and most servers send none

        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise DestinationRefused(f"{url[:80]!r} is no URL: {error}", param="webhook") from None
        host = _host(parsed)
        if not host or parsed.userinfo or parsed.scheme not in ("http", "https"):
            raise DestinationRefused(
                f"{url[:80]!r} is no URL of a webhook: https://HOST/PATH without a password",
                param="webhook",
            )
        address = _address(host)
        if not (self._lists(address) if address else host in self._names):
            raise DestinationRefused(
                f"webhooks do not go to {host[:80]}: whoever runs this server lists their hosts "
                "in PYTORCHLIB_WEBHOOK_HOSTS",
                param="webhook",
            )
        if parsed.scheme == "http" and not (address.is_loopback if address else host == LOCALHOST):
            raise DestinationRefused(
                "a webhook needs https; http only goes to loopback", param="webhook"
            )
        return parsed

    async def addresses(self, url: "URL") -> list[Address]:
        """Every address of a checked URL's host.

        Raises:
            DestinationRefused: one of them may not be reached.
            OSError: the name leads nowhere.
        """
        loop = asyncio.get_running_loop()
        host = _host(url)
        found = await loop.getaddrinfo(host, url.port or 443, type=socket.SOCK_STREAM)
        addresses = [ip_address(str(one[4][0]).partition("%")[0]) for one in found]
        for one in addresses:
            if not self._may_reach(one) or (url.scheme == "http" and not one.is_loopback):
                raise DestinationRefused(
                    f"{host} leads to {one}, which is no public address; list it in "
                    "PYTORCHLIB_WEBHOOK_HOSTS if webhooks may go there"
                )
        return addresses

    def _may_reach(self, address: Address) -> bool:
        return self._lists(address) or (
            address.is_global
            and not address.is_multicast
            and not any(address in network for network in _TRANSLATED)
        )

    def _lists(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


def _host(url: "URL") -> str:
    return url.raw_host.decode("ascii").lower()


def _network(text: str) -> Network | None:
    try:
        return ip_network(text)
    except ValueError:
        return None


def _address(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None
