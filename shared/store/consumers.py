"""Subscriptions as operations see them: what waits, who consumes, who paused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from itertools import product
from typing import Any

from sqlalchemy import Connection, bindparam, func, literal_column, select

from shared.database import Transaction
from shared.errors import SubscriptionNotFoundError
from shared.lifecycle import WAITING, DeliveryStatus
from shared.statements import Prepared
from shared.store import limits
from shared.store.limits import Limits
from shared.store.queries import iso
from shared.store.subscriptions import SILENT_AFTER_SECONDS
from shared.tables import (
    SUBSCRIPTION_COLUMNS,
    deliveries,
    messages,
    pauses,
    subscription_of,
    subscriptions,
)
from shared.types import Subscription

s = subscriptions.c
d = deliveries.c

OPEN = (*sorted(WAITING), DeliveryStatus.PROCESSING, DeliveryStatus.FAILED)
"""States that are counted; the others only grow."""

IS_OPEN = d.status != literal_column("'completed'")
"""Spelled as the condition of SQLite's index, which it would not see otherwise."""


def list_subscriptions(
    connection: Connection, now: datetime, queue: str | None = None
) -> list[dict[str, Any]]:
    """Return all subscriptions that get events, with what each of them has."""
    wanted = select(subscriptions, pauses.c.paused_by).where(s.retired_at.is_(None))
    wanted = wanted.outerjoin(pauses, pauses.c.subscription_id == s.id)
    if queue is not None:
        wanted = wanted.where(s.queue_name == queue)
    rows = connection.execute(wanted.order_by(s.queue_name, s.message_type, s.subscriber)).all()
    counts = count_open(connection, [row.id for row in rows])
    oldest = _oldest(connection, [each for each, its in counts.items() if its["waiting"]], now)
    limited = limits.of(connection, [row.id for row in rows])
    return [
        {
            **_shown(row, now, counts[row.id], oldest.get(row.id)),
            "limits": limited.get(row.id, Limits()).shown(),
        }
        for row in rows
    ]


def find(connection: Connection, subscription_id: int, *, locks: bool = False) -> Subscription:
    """Return a subscription that gets events.

    :param locks: nobody else changes it in this transaction.
    :raises SubscriptionNotFoundError: when there is none of that id.
    """
    wanted = select(*SUBSCRIPTION_COLUMNS).where(s.id == subscription_id, s.retired_at.is_(None))
    if locks:
        wanted = wanted.with_for_update()
    # SQLite raises for what is larger
    row = connection.execute(wanted).first() if subscription_id < 1 << 31 else None
    if row is None:
        raise SubscriptionNotFoundError(f"no subscription {subscription_id}")
    return subscription_of(row)


def of_queue(connection: Connection, queue: str) -> list[Subscription]:
    """Return the subscriptions of a queue that get events."""
    wanted = select(*SUBSCRIPTION_COLUMNS).where(s.queue_name == queue, s.retired_at.is_(None))
    return [subscription_of(row) for row in connection.execute(wanted.order_by(s.id))]


def is_live(seen_at: datetime | None, now: datetime) -> bool:
    """Say whether an instance that consumes signed in time."""
    return seen_at is not None and (now - seen_at).total_seconds() <= SILENT_AFTER_SECONDS


def seen_at(connection: Connection, subscription_id: int) -> datetime | None:
    """Return the last sign of life of an instance that consumes a subscription."""
    return connection.execute(select(s.seen_at).where(s.id == subscription_id)).scalar()


def _shown(row: Any, now: datetime, counts: dict[str, int], oldest: Any) -> dict[str, Any]:
    age = None if oldest is None else max(0.0, (now - oldest).total_seconds())
    return {
        "id": row.id,
        "queueName": row.queue_name,
        "source": row.source,
        "messageType": row.message_type,
        "subscriber": row.subscriber,
        "handlerType": row.handler_type,
        "reliable": bool(row.reliable),
        "consumer": "live" if is_live(row.seen_at, now) else "silent",
        "lastSeenAt": iso(row.seen_at),
        "pausedAt": iso(row.paused_at),
        "pausedBy": row.paused_by,
        **counts,
        "oldestWaitingAt": iso(oldest),
        "oldestWaitingSeconds": age,
    }


def count_open(connection: Connection, ids: Sequence[int]) -> dict[int, dict[str, int]]:
    """Return how many deliveries each subscription has: waiting, scheduled, active and dead."""
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    by_status = connection.execute(
        select(d.subscription_id, d.status, func.count().label("number"))
        .where(d.subscription_id.in_(ids), d.status.in_(OPEN), IS_OPEN)
        .group_by(d.subscription_id, d.status)
    )
    for row in by_status:
        counts[row.subscription_id][row.status] = row.number
    timed = connection.execute(
        select(d.subscription_id, func.count().label("number"))
        .where(d.subscription_id.in_(ids), d.available_at.is_not(None), d.status.in_(WAITING))
        .group_by(d.subscription_id)
    )
    scheduled = {row.subscription_id: row.number for row in timed}
    return {
        each: {
            "waiting": sum(counts[each][x] for x in WAITING) - scheduled.get(each, 0),
            "scheduled": scheduled.get(each, 0),
            "active": counts[each][DeliveryStatus.PROCESSING],
            "dead": counts[each][DeliveryStatus.FAILED],
        }
        for each in ids
    }


_OLDEST = Prepared(
    select(func.coalesce(d.processed_at, messages.c.created_at).label("since"))
    .select_from(deliveries.join(messages))
    .where(
        d.subscription_id == bindparam("id"),
        d.status == bindparam("status"),
        IS_OPEN,
        d.available_at.is_(None),
    )
    .order_by(d.seq)
    .limit(1)
)


def _oldest(connection: Connection, ids: list[int], now: datetime) -> dict[int, datetime]:
    """Return since when the oldest waits that each of them has, and that is due."""
    tx = Transaction(connection, now)
    found: dict[int, datetime] = {}
    for each, status in product(ids, sorted(WAITING)):
        for row in _OLDEST.fetch(tx, {"id": each, "status": status}):
            found[each] = min(row.since, found.get(each, row.since))
    return found
