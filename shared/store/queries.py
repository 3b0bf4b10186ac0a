"""What operations ask the message log. Nothing here changes anything."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, exists, func, literal_column, select

from shared.database import seconds_between
from shared.errors import MessageNotFoundError
from shared.lifecycle import WAITING, DeliveryStatus, MessageStatus
from shared.store.subscriptions import SILENT_AFTER_SECONDS
from shared.tables import attempts, deliveries, messages, subscriptions

d = deliveries.c
m = messages.c
s = subscriptions.c

_IS_OPEN = d.status != literal_column("'completed'")
"""Spelled as the condition of SQLite's index, which it would not see otherwise."""


def queue_stats(connection: Connection, queue: str) -> dict[str, Any] | None:
    """Count the messages of a queue by status, and its deliveries by subscription.

    :returns: as ``GET /queue/stats/<queue>`` answers; ``None`` for a queue that has
        neither a message nor a subscription.
    """
    counts = _message_counts(connection, queue)
    by_subscription = _subscription_counts(connection, queue)
    if not any(counts.values()) and not by_subscription:
        return None
    return {
        "queueName": queue,
        **counts,
        "total": sum(counts.values()),
        "unrouted": _unrouted(connection, queue),
        "avgProcessingSeconds": _average_seconds(connection, queue),
        "subscriptions": by_subscription,
    }


def message(connection: Connection, message_id: str) -> dict[str, Any]:
    """Return one message with its deliveries and their history.

    :raises MessageNotFoundError: when there is none of that id.
    """
    row = connection.execute(select(messages).where(m.id == message_id)).mappings().first()
    if row is None:
        raise MessageNotFoundError(f"no message {message_id}")
    return {
        "messageId": row["id"],
        "queueName": row["queue_name"],
        "messageType": row["message_type"],
        "payload": json.loads(row["payload"]),
        "status": row["status"],
        "priority": row["priority"],
        "retryCount": row["retry_count"],
        "maxRetries": row["max_retries"],
        "metadata": json.loads(row["metadata"] or "{}"),
        "createdAt": iso(row["created_at"]),
        "scheduledAt": iso(row["scheduled_at"]),
        "processedAt": iso(row["processed_at"]),
        "errorMessage": row["error_message"],
        "deliveries": _deliveries(connection, message_id),
    }


def silent_subscriptions(connection: Connection, now: datetime) -> list[str]:
    """Return the subscribers that have work waiting and no live consumer."""
    seconds_silent = seconds_between(connection, s.seen_at, now)
    rows = connection.execute(
        select(s.id, s.message_type, s.subscriber).where(
            s.retired_at.is_(None),
            s.paused_at.is_(None),
            func.coalesce(seconds_silent, SILENT_AFTER_SECONDS + 1) > SILENT_AFTER_SECONDS,
        )
    ).all()
    silent = [row for row in rows if _has_due(connection, row.id, now)]
    return [f"{row.message_type} {row.subscriber}" for row in silent]


def _has_due(connection: Connection, subscription_id: int, now: datetime) -> bool:
    # asked of each alone: of all at once, MariaDB would read every delivery that there is
    return any(
        connection.execute(
            select(d.seq)
            .where(
                d.subscription_id == subscription_id,
                d.status == status,
                _IS_OPEN,
                func.coalesce(d.available_at, now) <= now,
            )
            .limit(1)
        ).first()
        for status in sorted(WAITING)
    )


def _message_counts(connection: Connection, queue: str) -> dict[str, int]:
    rows = connection.execute(
        select(m.status, func.count()).where(m.queue_name == queue).group_by(m.status)
    )
    found = {MessageStatus(status): count for status, count in rows}
    return {status.value: found.get(status, 0) for status in MessageStatus}


def _unrouted(connection: Connection, queue: str) -> int:
    return connection.execute(
        select(func.count())
        .select_from(messages)
        .where(
            m.queue_name == queue,
            m.status == MessageStatus.COMPLETED,
            ~exists().where(d.message_id == m.id),
        )
    ).scalar_one()


def _average_seconds(connection: Connection, queue: str) -> float | None:
    """The mean time from being stored to the last outcome, of messages that were delivered."""
    seconds = seconds_between(connection, m.created_at, d.processed_at)
    average = connection.execute(
        select(func.avg(seconds))
        .select_from(deliveries.join(messages))
        .where(m.queue_name == queue, d.status == DeliveryStatus.COMPLETED)
    ).scalar()
    return None if average is None else round(max(float(average), 0.0), 3)


def _subscription_counts(connection: Connection, queue: str) -> list[dict[str, Any]]:
    is_open = and_(d.subscription_id == s.id, _IS_OPEN)
    is_scheduled = and_(d.status.in_(WAITING), d.available_at.is_not(None))
    rows = connection.execute(
        select(
            s.subscriber,
            _count_if(and_(d.status.in_(WAITING), d.available_at.is_(None))).label("waiting"),
            _count_if(d.status == DeliveryStatus.PROCESSING).label("active"),
            _count_if(is_scheduled).label("scheduled"),
            _count_if(d.status == DeliveryStatus.FAILED).label("dead"),
        )
        .select_from(subscriptions.outerjoin(deliveries, is_open))
        .where(s.queue_name == queue, s.retired_at.is_(None))
        .group_by(s.subscriber)
        .order_by(func.min(s.id))
    ).mappings()
    return [
        {
            "subscriber": row["subscriber"],
            **{key: int(row[key]) for key in ("waiting", "active", "scheduled", "dead")},
        }
        for row in rows
    ]


def _count_if(condition: Any) -> Any:
    return func.count(func.nullif(condition, False))


def _deliveries(connection: Connection, message_id: str) -> list[dict[str, Any]]:
    rows = connection.execute(
        select(deliveries, s.subscriber)
        .select_from(deliveries.join(subscriptions))
        .where(d.message_id == message_id)
        .order_by(d.seq)
    ).mappings()
    return [
        {
            "subscriber": row["subscriber"],
            "status": row["status"],
            "attempts": row["attempts"],
            "takeovers": row["takeovers"],
            "availableAt": iso(row["available_at"]),
            "startedAt": iso(row["started_at"]),
            "processedAt": iso(row["processed_at"]),
            "worker": row["worker"],
            "errorType": row["error_type"],
            "errorMessage": row["error_message"],
            "history": _history(connection, row["seq"]),
        }
        for row in rows
    ]


def _history(connection: Connection, seq: int) -> list[dict[str, Any]]:
    rows = connection.execute(
        select(attempts).where(attempts.c.delivery_seq == seq).order_by(attempts.c.id)
    ).mappings()
    return [
        {
            "attempt": row["number"],
            "outcome": row["outcome"],
            "startedAt": iso(row["started_at"]),
            "endedAt": iso(row["ended_at"]),
            "retryAt": iso(row["retry_at"]),
            "worker": row["worker"],
            "errorType": row["error_type"],
            "errorMessage": row["error_message"],
            "traceback": row["traceback"],
        }
        for row in rows
    ]


def iso(time: datetime | None) -> str | None:
    """Return a time as JSON has it: UTC, to the millisecond."""
    return None if time is None else time.isoformat(timespec="milliseconds") + "Z"
