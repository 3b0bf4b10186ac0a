"""How operations look at the queue and repair it, from a service or from the command line.

Each change is stored together with who made it, in one transaction.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from nameko.extensions import DependencyProvider
from sqlalchemy import Connection, select

from shared.database import Transaction, utc_now
from shared.errors import (
    MessageNotFoundError,
    NothingToRetryError,
    QueueError,
    SubscriptionLiveError,
)
from shared.events.client import QueueClient
from shared.events.dispatcher import make_envelope
from shared.events.operations import LogReader, Publisher, Reader
from shared.events.replays import BATCH, MOST_PAGES, Replays
from shared.lifecycle import MessageStatus
from shared.store import (
    causes,
    consumers,
    failures,
    limits,
    listing,
    overview,
    queries,
    repair,
    stats,
    subscriptions,
    trail,
)
from shared.store.limits import Limits
from shared.store.listing import ANY, Filters, Place
from shared.store.repair import ORIGIN
from shared.store.trail import Deed
from shared.store.why import Provider, why
from shared.tables import MESSAGE_COLUMNS, OWN_METADATA, envelope_of, messages
from shared.types import Delivery, Envelope, Subscription

_log = logging.getLogger(__name__)


class Operations(Publisher, Replays):
    """Looks at messages and subscriptions, and repairs them.

    ``actor`` says who does it, for the audit log.
    """

    reader: Reader

    # --- looking

    def stats(self, queue: str) -> dict[str, Any] | None:
        """Return the counts of a queue; ``None`` when nothing is known of it."""
        return self.reader.read(stats.queue_stats, queue)

    def queues(self) -> list[str]:
        """Return the queues that have a message or a subscription."""
        return self.reader.read(listing.queues)

    def messages(self, filters: Filters, cursor: str | None, limit: int) -> dict[str, Any]:
        """List messages, newest first."""
        return self.reader.read(listing.list_messages, filters, cursor, limit)

    def message(self, message_id: str) -> dict[str, Any]:
        """Return one message, its deliveries, each attempt that failed, its cause and effects.

        :raises MessageNotFoundError: when there is none of that id.
        """
        shown = self.reader.read(queries.message, message_id)
        origin = shown["metadata"].get(OWN_METADATA, {}).get(ORIGIN)
        return {**shown, "origin": origin, **self.causes(message_id)}

    def causes(self, message_id: str) -> dict[str, Any]:
        """Return what caused a message, and the tree of what it caused."""
        return self.reader.read(_causes, message_id)

    def why(self, message_id: str) -> dict[str, Any]:
        """Say why a message is where it is.

        :raises MessageNotFoundError: when there is none of that id.
        """
        provider = Provider(
            self.client.settings.provider, self.client.health(), self.client.joins_log
        )
        return self.reader.read(_why, message_id, provider)

    def failures(self) -> list[dict[str, Any]]:
        """Return the groups of dead letters, the largest first."""
        return self.reader.read(failures.groups)

    def overview(self) -> dict[str, Any]:
        """Return what each queue has to do, and what was dispatched lately."""
        return self.reader.read(_overview)

    def subscriptions(self, queue: str | None) -> list[dict[str, Any]]:
        """Return the subscriptions, and what each of them has."""
        return self.reader.read(_subscriptions, queue)

    def audit_log(self, before: int | None, limit: int) -> dict[str, Any]:
        """Return who did what, the newest first."""
        return self.reader.read(trail.entries, before, limit)

    # --- messages

    def publish_as(self, actor: str, **event: Any) -> str:
        """Publish one message, as :meth:`publish` does, and note who did; return its id."""
        message_id = self.publish(**event)
        try:
            self.note(Deed(actor, "publish", f"message {message_id}"))
        except QueueError as exc:
            # it is stored: who is told otherwise would publish it once more
            _log.warning("not in the audit log: publish of message_id=%s: %s", message_id, exc)
        return message_id

    def note(self, deed: Deed) -> None:
        """Store what somebody did that is stored already."""

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            trail.note(tx, deed)
            return None, []

        self.client.call(step)

    def retry_message(self, actor: str, message_id: str) -> int:
        """Let the failed deliveries of a message run again; return how many there are.

        :raises MessageNotFoundError: when there is no such message.
        :raises NothingToRetryError: when none of its deliveries had failed.
        """

        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            again = repair.retry_message(tx, message_id)
            _note(tx, actor, "retry", message_id, deliveries=len(again))
            return len(again), again

        return int(self.client.call(step))

    def retry_matching(
        self, actor: str, filters: Filters, cursor: str | None, limit: int
    ) -> dict[str, Any]:
        """Let the failed deliveries that fit run again, those of the newest messages first.

        :param limit: messages at most.
        :returns: how many, and the cursor to go on from; ``None`` at the end.
        """
        filters = replace(filters, status=MessageStatus.FAILED.value)
        place = listing.place_of(cursor) if cursor else None
        found, retried = 0, 0
        for _ in range(MOST_PAGES):
            page = self.reader.read(listing.find, filters, place, min(BATCH, limit - found))
            ids = [row.id for row in page.rows]
            if ids:
                retried += self._retry_page(actor, filters, ids)
            found, place = found + len(ids), page.next
            if place is None or found >= limit:
                break
        return {
            "messages": found,
            "retried": retried,
            "nextCursor": place.cursor() if isinstance(place, Place) else None,
        }

    def _retry_page(self, actor: str, filters: Filters, ids: Sequence[str]) -> int:
        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            again = repair.retry(tx, repair.failed_seqs(tx, ids, listing.of_deliveries(filters)))
            if again:
                detail = {"filters": _asked(filters), "deliveries": len(again)}
                trail.note(tx, Deed(actor, "retry", "messages by filter", detail))
            return len(again), again

        return int(self.client.call(step))

    def discard_message(self, actor: str, message_id: str) -> int:
        """Give up the failed deliveries of a message; return how many.

        :raises MessageNotFoundError: when there is no such message.
        :raises NothingToChangeError: when none of its deliveries had failed.
        """

        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            count = repair.discard_message(tx, message_id)
            _note(tx, actor, "discard", message_id, deliveries=count)
            return count, []

        return int(self.client.call(step))

    def cancel(self, actor: str, message_id: str) -> int:
        """Discard the waiting deliveries of a message; return how many.

        :raises MessageNotFoundError: when there is no such message.
        :raises NothingToChangeError: when none of its deliveries waits.
        """

        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            count = repair.cancel(tx, message_id)
            _note(tx, actor, "cancel", message_id, deliveries=count)
            return count, []

        return int(self.client.call(step))

    def reschedule(self, actor: str, message_id: str, scheduled_at: datetime) -> int:
        """Have the waiting deliveries of a message handled at another time; return how many.

        :param scheduled_at: with its time zone; one in the past means now.
        :raises MessageNotFoundError: when there is no such message.
        :raises NothingToChangeError: when none of its deliveries waits.
        """
        at = scheduled_at.astimezone(UTC).replace(tzinfo=None)

        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            new = repair.reschedule(tx, message_id, at)
            _note(tx, actor, "reschedule", message_id, scheduledAt=at.isoformat() + "Z")
            return len(new), new

        return int(self.client.call(step))

    def resend(self, actor: str, message_id: str, payload: Any) -> dict[str, Any]:
        """Send another payload in place of one that failed, to those who failed.

        :returns: the id of the new message, and how many deliveries take the place of how
            many dead letters.
        :raises MessageNotFoundError: when there is no such message.
        :raises NothingToRetryError: when none of its deliveries had failed.
        :raises PayloadError: when the payload cannot be, or breaks the contract.
        """
        edited = self._edited(self.reader.read(_envelope, message_id), payload)

        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            limit = self.client.settings.retries.limit
            new = repair.replace_message(tx, message_id, edited, limit)
            _note(tx, actor, "resend", message_id, newId=edited.id, deliveries=len(new))
            return len(new), new

        return {"messageId": edited.id, "origin": message_id, "sent": self.client.call(step)}

    def _edited(self, old: Envelope, payload: Any) -> Envelope:
        own = old.metadata.get(OWN_METADATA, {})
        return make_envelope(
            self.client.settings,
            old.queue,
            old.type,
            payload,
            priority=old.priority,
            max_retries=old.max_retries,
            metadata={k: v for k, v in old.metadata.items() if k != OWN_METADATA},
            context=own.get("context"),
            own={ORIGIN: old.id},
        )

    # --- groups of dead letters

    def retry_group(self, actor: str, group: str, limit: int) -> dict[str, int]:
        """Let dead letters of a group run again, the oldest first; return how many, and are left.

        :raises NothingToRetryError: when there is no such group.
        """

        def step(tx: Transaction, count: int) -> tuple[int, list[Delivery]]:
            seqs = failures.seqs_of(tx.connection, group, count, of_the_living=True)
            again = repair.retry(tx, seqs)
            return len(again), again

        return {"retried": self._in_batches(actor, "retry", group, limit, step)} | self._left(group)

    def discard_group(self, actor: str, group: str, limit: int) -> dict[str, int]:
        """Give up dead letters of a group, the oldest first; return how many, and are left.

        :raises NothingToRetryError: when there is no such group.
        """

        def step(tx: Transaction, count: int) -> tuple[int, list[Delivery]]:
            return repair.discard(tx, failures.seqs_of(tx.connection, group, count)), []

        done = self._in_batches(actor, "discard", group, limit, step)
        return {"discarded": done} | self._left(group)

    def group_size(self, group: str) -> int:
        """Return how many dead letters a group has."""
        return int(self.reader.read(failures.size, group))

    def _left(self, group: str) -> dict[str, int]:
        return {"remaining": self.group_size(group)}

    def _in_batches(
        self,
        actor: str,
        action: str,
        group: str,
        limit: int,
        step: Callable[[Transaction, int], tuple[int, list[Delivery]]],
    ) -> int:
        def noted(tx: Transaction) -> tuple[int, list[Delivery]]:
            count, new = step(tx, min(BATCH, limit - done))
            if count:
                target = f"failure group {group}"
                trail.note(tx, Deed(actor, action, target, {"deliveries": count}))
            return count, new

        size, done = self.group_size(group), 0
        if not size:
            raise NothingToRetryError(f"no dead letter is in the group {group}")
        # what fails again meanwhile is back in the group, and is left there
        limit = min(limit, size)
        while done < limit and (count := int(self.client.call(noted))):
            done += count
        return done

    # --- subscriptions

    def pause(self, actor: str, subscription_id: int) -> dict[str, Any]:
        """Have nothing more reserved for a subscription.

        :raises SubscriptionNotFoundError: when there is none of that id.
        :raises ProviderError: when the provider could not do it; nothing changed.
        """
        return self._pause(actor, [self.reader.read(consumers.find, subscription_id)], True)

    def resume(self, actor: str, subscription_id: int) -> dict[str, Any]:
        """Take back a pause; raises as :meth:`pause`."""
        return self._pause(actor, [self.reader.read(consumers.find, subscription_id)], False)

    def pause_queue(self, actor: str, queue: str, is_paused: bool) -> dict[str, Any] | None:
        """Pause or resume the subscriptions that a queue has; ``None`` when it has none."""
        its = self.reader.read(consumers.of_queue, queue)
        return self._pause(actor, its, is_paused) if its else None

    def _pause(self, actor: str, wanted: Sequence[Subscription], is_paused: bool) -> dict[str, Any]:
        self._have_paused(wanted, is_paused)
        ids = [each.id for each in wanted]

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            subscriptions.set_paused(tx, ids, actor if is_paused else None)
            for each in ids:
                action = "pause" if is_paused else "resume"
                trail.note(tx, Deed(actor, action, f"subscription {each}"))
            return None, []

        self.client.call(step)
        # an audit that saw it at one of both alone may have taken it back in between
        self._have_paused(wanted, is_paused)
        return {"subscriptions": ids, "paused": is_paused}

    def _have_paused(self, wanted: Sequence[Subscription], is_paused: bool) -> None:
        for each in wanted:
            self.client.ask_all(partial(_set_paused, subscription=each, is_paused=is_paused))

    def limit(self, actor: str, subscription_id: int, wanted: Limits) -> dict[str, Any]:
        """Set the limits of a subscription, all of them; whoever consumes hears within seconds.

        :raises SubscriptionNotFoundError: when there is none of that id.
        """

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            consumers.find(tx.connection, subscription_id)
            limits.change(tx, subscription_id, wanted)
            trail.note(tx, Deed(actor, "limit", f"subscription {subscription_id}", wanted.shown()))
            return None, []

        self.client.call(step)
        return {"subscription": subscription_id, "limits": wanted.shown()}

    def retire(self, actor: str, subscription_id: int) -> dict[str, Any]:
        """End a subscription whose handler is gone, and discard what waits for it.

        :raises SubscriptionNotFoundError: when there is none of that id.
        :raises SubscriptionLiveError: when it has a live consumer.
        """

        def step(tx: Transaction) -> tuple[Subscription, list[Delivery]]:
            its = consumers.find(tx.connection, subscription_id)
            if consumers.is_live(consumers.seen_at(tx.connection, subscription_id), tx.now):
                raise SubscriptionLiveError(f"{its.subscriber} was there in the last 30 s")
            subscriptions.end(tx, [subscription_id])
            detail = {"messageType": its.event_type, "subscriber": its.subscriber}
            trail.note(tx, Deed(actor, "retire", f"subscription {subscription_id}", detail))
            return its, []

        its = self.client.call(step)
        # each in a transaction of its own: others go on dispatching
        while self.client.call(lambda tx: (subscriptions.discard(tx, [subscription_id]), [])):
            pass
        self.client.forget([its])
        return {"subscriptions": [subscription_id], "retired": True}


class QueueOperations(DependencyProvider, Operations):
    """Injects :class:`Operations`."""

    client = QueueClient()
    reader = LogReader()

    def get_dependency(self, _worker_ctx: Any) -> QueueOperations:
        return self


def _set_paused(provider: Any, subscription: Subscription, is_paused: bool) -> None:
    (provider.pause if is_paused else provider.resume)(subscription)


def _note(tx: Transaction, actor: str, action: str, message_id: str, **detail: Any) -> None:
    trail.note(tx, Deed(actor, action, f"message {message_id}", detail))


def _asked(filters: Filters) -> Mapping[str, Any]:
    """Return what a filter asks for, as JSON."""
    # asdict() would copy ANY, which nothing then is equal to
    asked = {each.name: getattr(filters, each.name) for each in fields(filters)}
    given = {key: value for key, value in asked.items() if value not in (None, ANY)}
    return json.loads(json.dumps(given, default=str))


def _causes(connection: Connection, message_id: str) -> dict[str, Any]:
    tree, is_cut = causes.caused(connection, message_id)
    return {
        "causedBy": causes.caused_by(connection, message_id),
        "caused": tree,
        "causedMore": is_cut,
    }


def _why(connection: Connection, message_id: str, provider: Provider) -> dict[str, Any]:
    return why(connection, message_id, utc_now(connection), provider)


def _overview(connection: Connection) -> dict[str, Any]:
    return overview.overview(connection, utc_now(connection))


def _subscriptions(connection: Connection, queue: str | None) -> list[dict[str, Any]]:
    return consumers.list_subscriptions(connection, utc_now(connection), queue)


def _envelope(connection: Connection, message_id: str) -> Envelope:
    row = connection.execute(select(*MESSAGE_COLUMNS).where(messages.c.id == message_id)).first()
    if row is None:
        raise MessageNotFoundError(f"no message {message_id}")
    return envelope_of(row)
