"""What a client may take in time and bytes before the application is concerned."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one connection; all of them in seconds, bytes or counts."""

    first_byte_s: float = 5.0
    head_s: float = 10.0
    max_head_bytes: int = 32 * 1024
    max_fields: int = 100
    body_idle_s: float = 30.0
    body_grace_s: float = 10.0
    min_body_bytes_per_s: int = 16 * 1024
    keep_alive_s: float = 75.0
    write_idle_s: float = 30.0
    linger_s: float = 2.0
    max_discarded_bytes: int = 256 * 1024
    max_pipelined_bytes: int = 64 * 1024

    @property
    def tick_s(self) -> float:
        """Seconds between two sweeps: deadlines are kept to this precision."""
        shortest = min(self.first_byte_s, self.head_s, self.body_idle_s, self.keep_alive_s)
        return min(0.25, shortest / 4)
