"""Who gets which events: the rows of ``queue_subscriptions``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import and_, bindparam, insert, or_, select, update

from shared.database import Transaction
from shared.lifecycle import DeliveryStatus
from shared.store.summary import refresh
from shared.tables import deliveries, subscriptions
from shared.types import Envelope, Subscription

SILENT_AFTER_SECONDS = 30.0
"""A subscription that nobody signed for in this time has no live consumer."""

FORGOTTEN_AFTER_SECONDS = 120.0
"""An unreliable subscription is over when nobody signed for it in this time."""


def register(tx: Transaction, wanted: Sequence[Subscription]) -> list[Subscription]:
    """Store subscriptions that are not yet, and return them all with their ids."""
    return [_register(tx, subscription) for subscription in wanted]


def _register(tx: Transaction, wanted: Subscription) -> Subscription:
    is_it = and_(
        subscriptions.c.queue_name == wanted.queue,
        subscriptions.c.message_type == wanted.event_type,
        subscriptions.c.subscriber == wanted.subscriber,
    )
    found = tx.connection.execute(select(subscriptions.c.id).where(is_it)).scalar()
    values = {
        "source": wanted.source,
        "handler_type": wanted.handler_type,
        "reliable": wanted.reliable,
        "seen_at": tx.now,
        "retired_at": None,
    }
    if found is None:
        names = {
            "queue_name": wanted.queue,
            "message_type": wanted.event_type,
            "subscriber": wanted.subscriber,
            "created_at": tx.now,
        }
        added = tx.connection.execute(insert(subscriptions).values(**names, **values))
        found = added.inserted_primary_key[0]  # type: ignore[index]
    else:
        tx.connection.execute(update(subscriptions).where(is_it).values(**values))
    return replace(wanted, id=found)


def sign(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """Note that these subscriptions have a live consumer."""
    tx.connection.execute(
        update(subscriptions).where(subscriptions.c.id.in_(subscription_ids)).values(seen_at=tx.now)
    )


def retire(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """End subscriptions: no further events for them, and what waits is discarded."""
    tx.connection.execute(
        update(subscriptions)
        .where(subscriptions.c.id.in_(subscription_ids), subscriptions.c.retired_at.is_(None))
        .values(retired_at=tx.now)
    )
    refresh(tx, _discard_waiting(tx, subscription_ids))


def retire_forgotten(tx: Transaction) -> None:
    """End the unreliable subscriptions whose last instance is gone."""
    gone = tx.connection.execute(
        select(subscriptions.c.id).where(
            subscriptions.c.reliable.is_(False),
            subscriptions.c.retired_at.is_(None),
            subscriptions.c.seen_at < tx.later(-FORGOTTEN_AFTER_SECONDS),
        )
    ).scalars()
    ids = list(gone)
    if ids:
        retire(tx, ids)


def _discard_waiting(tx: Transaction, subscription_ids: Sequence[int]) -> set[str]:
    its = deliveries.c.subscription_id.in_(subscription_ids)
    waiting = deliveries.c.status.in_([DeliveryStatus.PENDING, DeliveryStatus.RETRY])
    found = tx.connection.execute(select(deliveries.c.message_id).where(its, waiting))
    touched = set(found.scalars())
    tx.connection.execute(
        update(deliveries)
        .where(its, waiting)
        .values(
            status=DeliveryStatus.DISCARDED, processed_at=tx.now, ready=False, available_at=None
        )
    )
    return touched


_SUBSCRIBERS = select(
    subscriptions.c.id, subscriptions.c.queue_name, subscriptions.c.message_type
).where(
    subscriptions.c.queue_name.in_(bindparam("queues", expanding=True)),
    subscriptions.c.message_type.in_(bindparam("types", expanding=True)),
    subscriptions.c.retired_at.is_(None),
    or_(subscriptions.c.reliable.is_(True), subscriptions.c.seen_at > bindparam("alive")),
)


def subscribers_of(
    tx: Transaction, envelopes: Sequence[Envelope]
) -> dict[tuple[str, str], list[int]]:
    """Return the ids of the subscriptions that get these events now, by queue and type."""
    values = {
        "queues": list({envelope.queue for envelope in envelopes}),
        "types": list({envelope.type for envelope in envelopes}),
        "alive": tx.later(-FORGOTTEN_AFTER_SECONDS),
    }
    found = defaultdict(list)
    for row in tx.connection.execute(_SUBSCRIBERS, values):
        found[row.queue_name, row.message_type].append(row.id)
    return dict(found)
