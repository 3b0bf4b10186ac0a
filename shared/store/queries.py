"""What operations ask the message log. Nothing here changes anything."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, literal_column, or_, select

from shared.database import Transaction, seconds_between
from shared.errors import MessageNotFoundError
from shared.lifecycle import WAITING
from shared.statements import Prepared
from shared.store.subscriptions import SILENT_AFTER_SECONDS
from shared.tables import attempts, deliveries, messages, subscriptions
from shared.types import shown_payload

d = deliveries.c
m = messages.c
s = subscriptions.c

_IS_OPEN = d.status != literal_column("'completed'")
"""Spelled as the condition of SQLite's index, which it would not see otherwise."""


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
        "payload": shown_payload(row["payload"]),
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
    tx = Transaction(connection, now)
    silent = [row for row in rows if _has_due(tx, row.id)]
    return [f"{row.message_type} {row.subscriber}" for row in silent]


# Asked of each subscription and status alone: of all at once, MariaDB would read every delivery.
_DUE = Prepared(
    select(d.seq)
    .where(
        d.subscription_id == bindparam("id"),
        d.status == bindparam("status"),
        _IS_OPEN,
        or_(
            d.available_at.is_(None), d.available_at <= bindparam("now", type_=d.available_at.type)
        ),
    )
    .limit(1)
)


def _has_due(tx: Transaction, subscription_id: int) -> bool:
    of_it = {"id": subscription_id, "now": tx.now}
    return any(_DUE.fetch(tx, {**of_it, "status": status}) for status in sorted(WAITING))


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
