"""What a queue has, by status and by subscription. Nothing here changes anything."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select, union_all

from shared.database import seconds_between, utc_now
from shared.lifecycle import DeliveryStatus, MessageStatus
from shared.store import consumers, totals
from shared.store.listing import FIRST
from shared.store.totals import Total
from shared.tables import deliveries, messages, subscriptions

d = deliveries.c
m = messages.c
s = subscriptions.c

RECENT_SECONDS = 3600.0
"""Of which messages the time is averaged: those stored in this time."""

MOST_AVERAGED = 1000
"""Messages of each status whose time is averaged: of more, the newest."""

_OPEN = [status for status in MessageStatus if status != MessageStatus.COMPLETED]
"""Named, they let the index be gone into for each of them, and past what is completed."""

_COUNTED = ("waiting", "active", "scheduled", "dead")


def queue_stats(connection: Connection, queue: str) -> dict[str, Any] | None:
    """Count the messages of a queue by status, and its deliveries by subscription.

    :returns: as ``GET /queue/stats/<queue>`` answers; ``None`` for a queue that has
        neither a message nor a subscription.
    """
    total = totals.of(connection, queue)
    counts = message_counts(connection, queue, total)
    by_subscription = _subscription_counts(connection, queue)
    if not any(counts.values()) and not by_subscription:
        return None
    unrouted = totals.count_alone(connection, queue, total.counted_to)
    return {
        "queueName": queue,
        **counts,
        "total": sum(counts.values()),
        "unrouted": max(total.unrouted, 0) + unrouted,
        "avgProcessingSeconds": _average_seconds(connection, queue, utc_now(connection)),
        "subscriptions": by_subscription,
    }


def message_counts(connection: Connection, queue: str, total: Total) -> dict[str, int]:
    """Return how many messages of a queue have which status.

    :param total: what was counted of the queue: of these messages, only those are counted again
        that are not completed.
    """
    counts = dict.fromkeys(map(str, MessageStatus), 0)
    counted = select(m.status, func.count()).where(m.queue_name == queue).group_by(m.status)
    recent = m.status.in_(list(MessageStatus)), m.created_at >= total.counted_to
    for status, count in connection.execute(counted.where(*recent)):
        counts[status] += count
    if total.counted_to > FIRST:
        before = m.status.in_(_OPEN), m.created_at < total.counted_to
        open_before = 0
        for status, count in connection.execute(counted.where(*before)):
            counts[status] += count
            open_before += count
        # what was stored before the mark belatedly may be open, and is not among those counted
        counts[MessageStatus.COMPLETED] += max(total.messages - open_before, 0)
    return counts


def _average_seconds(connection: Connection, queue: str, now: datetime) -> float | None:
    """The mean time from being stored to the outcome, of deliveries of the newest messages."""
    since = now - timedelta(seconds=RECENT_SECONDS)
    newest = [
        select(m.id, m.created_at)
        .where(m.queue_name == queue, m.status == status, m.created_at >= since)
        .order_by(m.created_at.desc())
        .limit(MOST_AVERAGED)
        .subquery()
        for status in MessageStatus
    ]
    some = union_all(*[select(each) for each in newest]).subquery()
    seconds = seconds_between(connection, some.c.created_at, d.processed_at)
    average = connection.execute(
        select(func.avg(seconds))
        .select_from(some.join(deliveries, d.message_id == some.c.id))
        .where(d.status == DeliveryStatus.COMPLETED)
    ).scalar()
    return None if average is None else round(max(float(average), 0.0), 3)


def _subscription_counts(connection: Connection, queue: str) -> list[dict[str, Any]]:
    """Return what each subscriber has open, of all types together."""
    rows = connection.execute(
        select(s.id, s.subscriber)
        .where(s.queue_name == queue, s.retired_at.is_(None))
        .order_by(s.id)
    ).all()
    by_id = consumers.count_open(connection, [row.id for row in rows])
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTED, 0))
    for row in rows:
        its = found[row.subscriber]
        for name in _COUNTED:
            its[name] += by_id[row.id][name]
    return [{"subscriber": subscriber, **its} for subscriber, its in found.items()]
