"""A webhook: what it says, and its signature by the Standard Webhooks scheme."""

import base64
import binascii
import hmac
import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

PREFIX: Final = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64


class SecretUnfit(Exception):
    """This cannot sign webhooks."""


@dataclass(frozen=True, slots=True)
class Webhook:
    """One event that one address is told of; every attempt says the same.

    Attributes:
        id: of the event, by which a receiver knows what it has seen before.
        type: such as `fine_tuning.job.succeeded`.
        created: Unix seconds.
        job: the id of the job.
        url: where it goes.
        attempts: how often it has been tried, the running attempt included.
    """

    id: str
    type: str
    created: float
    job: str
    url: str
    attempts: int

    def body(self) -> bytes:
        """As OpenAI's client reads it; nothing in it is worth stealing."""
        event = {
            "id": self.id,
            "object": "event",
            "type": self.type,
            "created_at": int(self.created),
            "data": {"id": self.job},
        }
        return json.dumps(event, separators=(",", ":")).encode()

    def headers(self, secret: bytes, now: float) -> dict[str, str]:
        """Those of an attempt at `now`, in Unix seconds, after which a receiver asks."""
        signed = b"%s.%d.%s" % (self.id.encode(), int(now), self.body())
        signature = base64.b64encode(hmac.digest(secret, signed, sha256)).decode()
        return {
            "Content-Type": "application/json",
            "User-Agent": "PyTorchLib",
            "webhook-id": self.id,
            "webhook-timestamp": str(int(now)),
            "webhook-signature": f"v1,{signature}",
        }


def secret_bytes(text: str) -> bytes:
    """The bytes of a secret as people write it: `whsec_` and base64.

    Raises:
        SecretUnfit: it is not written so, or has fewer than 24 or more than 64 bytes.
    """
    try:
        found = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        found = b""
    if not text.startswith(PREFIX) or not LEAST_BYTES <= len(found) <= MOST_BYTES:
        raise SecretUnfit(
            f"PYTORCHLIB_WEBHOOK_SECRET must be {PREFIX} and {LEAST_BYTES} to {MOST_BYTES} bytes "
            f'in base64: echo "{PREFIX}$(head -c 32 /dev/urandom | base64)" makes one'
        )
    return found
