"""Who gets which events: the rows of ``queue_subscriptions``."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    delete,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from shared.database import Transaction
from shared.lifecycle import WAITING, DeliveryStatus
from shared.statements import Prepared
from shared.store import limits
from shared.store.summary import lock, refresh
from shared.tables import SUBSCRIPTION_COLUMNS, deliveries, pauses, subscription_of, subscriptions
from shared.types import Envelope, Subscription

SILENT_AFTER_SECONDS = 30.0
"""A subscription that nobody signed for in this time has no live consumer."""

FORGOTTEN_AFTER_SECONDS = 120.0
"""An unreliable subscription is over when nobody signed for it in this time."""

MOST_AT_ONCE = 1000
"""Deliveries that are discarded in one transaction: others write meanwhile."""


def register(tx: Transaction, wanted: Sequence[Subscription]) -> list[Subscription]:
    """Store subscriptions that are not yet, and return them all with their ids."""
    return activate(tx, announce(tx, wanted))


def announce(tx: Transaction, wanted: Sequence[Subscription]) -> list[Subscription]:
    """Store subscriptions that get no events yet: a provider apart has no queue for them.

    Those that got some before go on to. Return them all with their ids.
    """
    return [_announce(tx, subscription) for subscription in wanted]


def changed(tx: Transaction, wanted: Sequence[Subscription]) -> list[Subscription]:
    """Return those that are about to become reliable, or to be so no more."""
    known = tx.connection.execute(
        select(*SUBSCRIPTION_COLUMNS).where(
            subscriptions.c.subscriber.in_([each.subscriber for each in wanted]),
            subscriptions.c.retired_at.is_(None),
        )
    )
    were = {
        (each.queue, each.event_type, each.subscriber): each for each in map(subscription_of, known)
    }
    return [
        each
        for each in wanted
        if (was := were.get((each.queue, each.event_type, each.subscriber)))
        and was.reliable is not each.reliable
    ]


def activate(tx: Transaction, announced: Sequence[Subscription]) -> list[Subscription]:
    """Have subscriptions get what is dispatched from now on; return them."""
    tx.connection.execute(
        update(subscriptions)
        .where(subscriptions.c.id.in_([subscription.id for subscription in announced]))
        .values(seen_at=tx.now, retired_at=None)
    )
    return list(announced)


def _announce(tx: Transaction, wanted: Subscription) -> Subscription:
    is_it = and_(
        subscriptions.c.queue_name == wanted.queue,
        subscriptions.c.message_type == wanted.event_type,
        subscriptions.c.subscriber == wanted.subscriber,
    )
    values = {
        "source": wanted.source,
        "handler_type": wanted.handler_type,
        "reliable": wanted.reliable,
    }
    find = select(subscriptions.c.id).where(is_it)
    if tx.connection.execute(find).scalar() is None:
        _add(tx, wanted, values)
    tx.connection.execute(update(subscriptions).where(is_it).values(**values))
    return replace(wanted, id=tx.connection.execute(find).scalar_one())


def _add(tx: Transaction, wanted: Subscription, values: Mapping[str, Any]) -> None:
    names = {
        "queue_name": wanted.queue,
        "message_type": wanted.event_type,
        "subscriber": wanted.subscriber,
        "created_at": tx.now,
        "retired_at": tx.now,
    }
    # another process of the service may be starting at the same moment
    with contextlib.suppress(IntegrityError), tx.connection.begin_nested():
        tx.connection.execute(insert(subscriptions).values(**names, **values))


def sign(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """Note that these subscriptions have a live consumer."""
    tx.connection.execute(
        update(subscriptions).where(subscriptions.c.id.in_(subscription_ids)).values(seen_at=tx.now)
    )


def unsign(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """Note that these subscriptions have no consumer that gets anything."""
    tx.connection.execute(
        update(subscriptions).where(subscriptions.c.id.in_(subscription_ids)).values(seen_at=None)
    )


def retire(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """End subscriptions: no further events for them, and what is open is discarded.

    Who dispatches meanwhile waits, so this is for those of which little is open.
    """
    end(tx, subscription_ids)
    while discard(tx, subscription_ids):
        pass


def end(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """Have subscriptions get no further events; what is open is left to :func:`discard`.

    Their limits go with them: one that comes back by the same name begins without.
    """
    tx.connection.execute(
        update(subscriptions)
        .where(subscriptions.c.id.in_(subscription_ids), subscriptions.c.retired_at.is_(None))
        .values(retired_at=tx.now)
    )
    limits.remove(tx, subscription_ids)


def set_paused(tx: Transaction, subscription_ids: Sequence[int], by: str | None) -> None:
    """Note who paused subscriptions, or with ``None`` that they go on."""
    tx.connection.execute(
        update(subscriptions)
        .where(subscriptions.c.id.in_(subscription_ids))
        .values(paused_at=tx.now if by else None)
    )
    tx.connection.execute(delete(pauses).where(pauses.c.subscription_id.in_(subscription_ids)))
    rows = [{"subscription_id": each, "paused_by": by} for each in subscription_ids if by]
    if rows:
        tx.connection.execute(insert(pauses), rows)


def retire_forgotten(tx: Transaction) -> list[Subscription]:
    """End the unreliable subscriptions whose last instance is gone; return them."""
    rows = tx.connection.execute(
        select(*SUBSCRIPTION_COLUMNS).where(
            subscriptions.c.reliable.is_(False),
            subscriptions.c.retired_at.is_(None),
            subscriptions.c.seen_at < tx.later(-FORGOTTEN_AFTER_SECONDS),
        )
    ).all()
    gone = [subscription_of(row) for row in rows]
    if gone:
        retire(tx, [subscription.id for subscription in gone])
    return gone


def active(connection: Connection) -> list[Subscription]:
    """Return all subscriptions that get events."""
    found = select(*SUBSCRIPTION_COLUMNS).where(subscriptions.c.retired_at.is_(None))
    ordered = found.order_by(subscriptions.c.source, subscriptions.c.id)
    return [subscription_of(row) for row in connection.execute(ordered)]


def paused(connection: Connection) -> list[Subscription]:
    """Return the subscriptions that somebody paused."""
    found = select(*SUBSCRIPTION_COLUMNS).where(
        subscriptions.c.retired_at.is_(None), subscriptions.c.paused_at.is_not(None)
    )
    return [subscription_of(row) for row in connection.execute(found)]


def discard(tx: Transaction, subscription_ids: Sequence[int]) -> bool:
    """Discard what is open of those subscriptions that are retired, so many at once.

    :returns: whether there may be more.
    """
    # who added deliveries, and has yet to commit them, is waited for: each holds this lock, too
    gone = select(subscriptions.c.id).where(
        subscriptions.c.id.in_(subscription_ids), subscriptions.c.retired_at.is_not(None)
    )
    retired = tx.connection.execute(gone.with_for_update()).scalars().all()
    # what an instance was handling when it was killed nobody else may take over
    is_open = deliveries.c.status.in_([*WAITING, DeliveryStatus.PROCESSING])
    found = tx.connection.execute(
        select(deliveries.c.seq, deliveries.c.message_id)
        .where(deliveries.c.subscription_id.in_(retired), is_open)
        .limit(MOST_AT_ONCE)
    ).all()
    touched = {row.message_id for row in found}
    lock(tx, touched)
    tx.connection.execute(
        update(deliveries)
        .where(deliveries.c.seq.in_([row.seq for row in found]), is_open)
        .values(
            status=DeliveryStatus.DISCARDED,
            processed_at=tx.now,
            available_at=None,
            ready=False,
            lease_expires_at=None,
        )
    )
    refresh(tx, touched)
    return len(found) == MOST_AT_ONCE


def gets_events(alive: Any) -> ColumnElement[bool]:
    """Return the SQL for whether a subscription gets what is dispatched now.

    :param alive: the oldest sign of life of an instance that is taken to be there.
    """
    return and_(
        subscriptions.c.retired_at.is_(None),
        or_(subscriptions.c.reliable.is_(True), subscriptions.c.seen_at > alive),
    )


_SUBSCRIBERS = Prepared(
    select(subscriptions.c.id, subscriptions.c.queue_name, subscriptions.c.message_type).where(
        subscriptions.c.queue_name.in_(bindparam("queues", expanding=True)),
        subscriptions.c.message_type.in_(bindparam("types", expanding=True)),
        gets_events(bindparam("alive")),
    )
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
    for row in _SUBSCRIBERS.fetch(tx, values):
        found[row.queue_name, row.message_type].append(row.id)
    return dict(found)
