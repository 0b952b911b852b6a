"""The owner of webhooks on their way: each is tried until its receiver says that it came.

An attempt has a deadline, follows no redirect and reads no answer but its status. Pauses between
attempts grow, and their number is bounded.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from app.errors import DatabaseUnavailable
from app.jobs.destination import DestinationRefused, Destinations
from app.jobs.outbox import Outbox
from app.jobs.webhook import Webhook

if TYPE_CHECKING:
    from httpx import URL, AsyncClient

log = logging.getLogger(__name__)

PAUSES_S: Final = (5, 30, 120, 900, 3600, 10_800, 21_600, 43_200, 86_400, 86_400)
"""Between one attempt and the next: three days in all, after which a webhook is given up."""
ATTEMPT_S: Final = 10.0
HOLD_S: Final = 3 * ATTEMPT_S
"""Longer than an attempt: then whoever claimed the webhook is dead."""
LOOK_S: Final = 1.0
MAX_AT_ONCE: Final = 8
GONE: Final = 410
"""How a receiver says that it wants no more of them."""


class NotDelivered(Exception):
    """The receiver did not say that it came; the sentence says what happened instead."""


class Courier:
    """Delivers the webhooks of one outbox.

    Args:
        outbox: where they lie.
        destinations: where they may go.
        secret: signs them.
        url: that is told of every job.
        pauses_s: between attempts; one attempt more than pauses.

    Raises:
        DestinationRefused: `url` is nowhere that a webhook may go.
    """

    def __init__(
        self,
        outbox: Outbox,
        destinations: Destinations,
        secret: bytes,
        url: str | None = None,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._outbox, self._destinations, self._secret = outbox, destinations, secret
        self._urls = [] if url is None else [str(destinations.check(url))]
        self._pauses_s = pauses_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._owner: asyncio.Task[None] | None = None
        self._trouble = ""

    def addressees(self, own: str | None) -> list[str]:
        """Whom a job tells: the one of all jobs, and its own.

        Raises:
            DestinationRefused: its own is nowhere that a webhook may go.
        """
        urls = self._urls if own is None else [*self._urls, str(self._destinations.check(own))]
        return list(dict.fromkeys(urls))

    def start(self) -> None:
        """Begin to deliver."""
        self._owner = asyncio.create_task(self._own(), name="deliver webhooks")
        self._owner.add_done_callback(_tell_of_end)

    async def stop(self) -> None:
        """Let go of what is on its way; it is tried again by whoever starts next."""
        tasks = [task for task in (self._owner, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _own(self) -> None:
        import httpx

        certificates = await asyncio.to_thread(httpx.create_ssl_context)
        # No proxy and no connection that is used twice: either would go where nobody has looked.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            verify=certificates, trust_env=False, timeout=ATTEMPT_S, limits=limits
        ) as client:
            while True:
                await self._look(client)
                await asyncio.sleep(LOOK_S)

    async def _look(self, client: "AsyncClient") -> None:
        """Send what is due, a few at once."""
        try:
            while len(self._tasks) < MAX_AT_ONCE and await asyncio.to_thread(self._outbox.has_due):
                webhook = await asyncio.to_thread(self._outbox.claim, HOLD_S)
                if webhook is None:
                    return
                task = asyncio.create_task(self._carry(client, webhook), name=webhook.id)
                self._tasks.add(task)
                task.add_done_callback(self._ended)
            self._trouble = ""
        except DatabaseUnavailable as error:
            if str(error) != self._trouble:
                log.error("no webhooks are sent: %s", error)
            self._trouble = str(error)

    async def _carry(self, client: "AsyncClient", webhook: Webhook) -> None:
        """One attempt, and what follows from it; without a database it comes due again."""
        with contextlib.suppress(DatabaseUnavailable):
            try:
                if webhook.attempts > len(self._pauses_s) + 1:
                    raise NotDelivered("the last attempts ended without a word")
                await self._deliver(client, webhook)
            except NotDelivered as error:
                await self._miss(webhook, str(error))
            else:
                await asyncio.to_thread(self._outbox.remove, webhook)

    async def _miss(self, webhook: Webhook, why: str) -> None:
        told = f"webhook {webhook.id} ({webhook.type}, {webhook.job}), attempt {webhook.attempts}"
        if webhook.attempts > len(self._pauses_s):
            log.error("%s: %s; it is given up", told, why)
            await asyncio.to_thread(self._outbox.remove, webhook)
            return
        # Not all at the same moment when a receiver comes back.
        pause_s = self._pauses_s[webhook.attempts - 1] * random.uniform(0.9, 1.1)
        log.warning("%s: %s; again in %.0f s", told, why, pause_s)
        await asyncio.to_thread(self._outbox.postpone, webhook, pause_s)

    async def _deliver(self, client: "AsyncClient", webhook: Webhook) -> None:
        """Send it once.

        Raises:
            NotDelivered: no answer in time, or none that says yes.
        """
        import httpx

        try:
            async with asyncio.timeout(ATTEMPT_S):
                url = self._destinations.check(webhook.url)
                status = await self._status(client, url, webhook)
        except TimeoutError:
            raise NotDelivered(f"no answer within {ATTEMPT_S:.0f} s") from None
        except (DestinationRefused, OSError, httpx.HTTPError) as error:
            raise NotDelivered(str(error) or type(error).__name__) from None
        if status == GONE:
            log.warning("%s wants no webhooks any more; %s is given up", url.host, webhook.id)
        elif not 200 <= status < 300:
            raise NotDelivered(f"{url.host} answered {status}")

    async def _status(self, client: "AsyncClient", url: "URL", webhook: Webhook) -> int:
        """What the first address that answers says."""
        import httpx

        host, trouble = url.raw_host.decode("ascii"), "its name leads nowhere"
        headers = webhook.headers(self._secret, time.time())
        headers["Host"] = url.netloc.decode("ascii")
        for address in await self._destinations.addresses(url):
            try:
                async with client.stream(
                    "POST",
                    url.copy_with(host=str(address)),
                    content=webhook.body(),
                    headers=headers,
                    extensions={"sni_hostname": host},  # whose certificate it must be
                ) as response:
                    return response.status_code
            except httpx.ConnectError as error:
                trouble = str(error)
        raise NotDelivered(f"{host} cannot be reached: {trouble}")

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A fault of ours; the webhook comes due again, a bounded number of times.
            log.error("webhook %s was lost sight of", task.get_name(), exc_info=task.exception())


def _tell_of_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("no more webhooks are sent", exc_info=task.exception())
