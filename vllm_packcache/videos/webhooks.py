"""Tell the addresses that an operator names of videos that have ended, as Standard Webhooks says.

A delivery is a row of the store, made together with the end of its video: it outlasts a restart, and one server of a
host makes it. An address may hear of an end twice, since its answer may be lost; the id of the event is then the same.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging

import httpx

from vllm_packcache.config.errors import ConfigError, shown
from vllm_packcache.config.videos import SECRET_PREFIX, VideosConfig, Webhook
from vllm_packcache.videos.store import Delivery, Store, StoreError

logger = logging.getLogger("vllm.packcache")

PAUSES = (10.0, 120.0, 900.0, 2400.0)
"""Seconds from one try to the next; behind the last one a delivery is given up."""

_TIMEOUT = 10.0
"""Seconds that an address has to answer."""

_LOOKS = 1.0
"""Seconds between two looks for what is due."""


class Webhooks:
    """What is told of the ends of a store's videos.

    It is to be built before any of them ends: an end that nobody was to be told of then is told to nobody later.

    Args:
        store: of the videos.
        config: names whom to tell.

    Raises:
        ConfigError: an address is named twice.
    """

    def __init__(self, store: Store, config: VideosConfig) -> None:
        self._store, self._webhooks = store, config.webhooks
        addresses = [webhook.url for webhook in self._webhooks]
        for address in addresses:
            if addresses.count(address) > 1:
                raise ConfigError(f"webhooks: {shown(address)} is named twice: name it once, with all of its events")
        store.tell({webhook.url: webhook.events for webhook in self._webhooks})

    async def run(self) -> None:
        """Deliver what is due until the task is cancelled."""
        async with (
            httpx.AsyncClient(timeout=_TIMEOUT) as client,
            # An address that does not answer keeps no other one waiting.
            asyncio.TaskGroup() as group,
        ):
            for webhook in self._webhooks:
                group.create_task(self._serve(client, webhook))
            await asyncio.Event().wait()

    async def _serve(self, client: httpx.AsyncClient, webhook: Webhook) -> None:
        failing = False
        while True:
            try:
                made = await self.deliver(client, webhook)
                failing = False
            except StoreError as error:
                # Said once: a full disk stays full for a while.
                if not failing:
                    logger.warning("Webhooks have to wait: %s", error)
                failing, made = True, 0
            if not made:
                await asyncio.sleep(_LOOKS)

    async def deliver(self, client: httpx.AsyncClient, webhook: Webhook) -> int:
        """Make the next deliveries to an address that are due, several at once.

        Returns:
            Count of them, whether they have come through or not.

        Raises:
            StoreError: the store cannot be read or written. What was taken is due again in a minute.
        """
        due = await asyncio.to_thread(self._store.due, webhook.url)
        # One that raises leaves no other one behind unawaited.
        for ended in await asyncio.gather(
            *(self._deliver(client, webhook, delivery) for delivery in due), return_exceptions=True
        ):
            if isinstance(ended, BaseException):
                raise ended
        return len(due)

    async def _deliver(self, client: httpx.AsyncClient, webhook: Webhook, delivery: Delivery) -> None:
        problem = await self._post(client, webhook, delivery)
        again = None if problem is None or delivery.tries > len(PAUSES) else PAUSES[delivery.tries - 1]
        if problem is not None:
            logger.warning(
                "%s of %s was not delivered to %s (%s): %s",
                delivery.type,
                delivery.video,
                shown(webhook.url),
                problem,
                "given up" if again is None else f"again in {again:g} s",
            )
        await asyncio.to_thread(self._store.done, delivery, again)

    async def _post(self, client: httpx.AsyncClient, webhook: Webhook, delivery: Delivery) -> str | None:
        """Post it once.

        Returns:
            What went wrong, or none if the address has taken it.
        """
        body = json.dumps(
            {
                "id": delivery.event,
                "object": "event",
                "type": delivery.type,
                "created_at": delivery.created_at,
                "data": {"id": delivery.video},
            },
            separators=(",", ":"),
        ).encode()
        headers = signed(webhook.secret.get_secret_value(), delivery.event, int(self._store.clock()), body)
        try:
            # httpx limits each read and write, not all of them; of what is answered nothing is read but the status.
            async with (
                asyncio.timeout(_TIMEOUT),
                # An address that points elsewhere is not the one that was named.
                client.stream("POST", webhook.url, content=body, headers=headers, follow_redirects=False) as answer,
            ):
                return None if answer.is_success else f"it answered {answer.status_code}"
        except TimeoutError:
            return f"it did not answer within {_TIMEOUT:g} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            # The latter of a host that cannot be looked up as it is written.
            return str(error) or type(error).__name__


def signed(secret: str, event: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Headers of a signed message.

    Args:
        secret: ``whsec_`` and base64 of the key.
        event: id of the message.
        timestamp: of this try, in seconds of Unix time.
        body: as it is sent.
    """
    key = base64.b64decode(secret.removeprefix(SECRET_PREFIX))
    digest = hmac.new(key, f"{event}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "webhook-id": event,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }
