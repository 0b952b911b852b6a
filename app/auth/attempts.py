"""How often an address sent a bad key: ten a minute are looked at. Memory is bounded."""

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Final

MAX_A_MINUTE: Final = 10
WINDOW_S: Final = 60.0
MAX_ADDRESSES: Final = 4096
NETWORK_BITS: Final = 64


class FailedAttempts:
    """Counts bad keys by address; of too many addresses the one that began first is forgotten."""

    def __init__(self) -> None:
        self._windows: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._windows)

    def wait_s(self, address: str, now: float) -> float:
        """Seconds until `address` may try again; 0 where it may now.

        Args:
            now: in seconds of any clock that only goes forward.
        """
        ends, count = self._windows.get(_network(address), (0.0, 0))
        return max(0.0, ends - now) if count >= MAX_A_MINUTE else 0.0

    def count(self, address: str, now: float) -> None:
        """One bad key more; the first opens a window of a minute."""
        network = _network(address)
        ends, count = self._windows.get(network, (0.0, 0))
        if ends <= now:
            self._windows.pop(network, None)
            ends, count = now + WINDOW_S, 0
        self._windows[network] = (ends, count + 1)
        if len(self._windows) > MAX_ADDRESSES:
            self._windows.popitem(last=False)


def _network(address: str) -> str:
    """The address, or its network where one client has as many addresses as it likes."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> (128 - NETWORK_BITS):x}"
