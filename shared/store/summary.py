"""What a message says of its deliveries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, select, update

from shared.database import Transaction
from shared.lifecycle import DeliveryStatus, message_status, retries_made
from shared.statements import Prepared
from shared.tables import deliveries, messages

c = deliveries.c

_LOCK = Prepared(
    select(messages.c.id)
    .where(messages.c.id.in_(bindparam("ids", expanding=True)))
    .order_by(messages.c.id)
    .with_for_update()
)

_OF_MESSAGES = Prepared(
    select(c.message_id, c.status, c.attempts, c.started_at, c.processed_at, c.error_message).where(
        c.message_id.in_(bindparam("ids", expanding=True))
    )
)

_SUMMARISE = Prepared(
    update(messages)
    .where(messages.c.id.in_(bindparam("ids", expanding=True)))
    .values(
        status=bindparam("its_status"),
        retry_count=bindparam("its_retries"),
        processed_at=bindparam("its_end"),
        error_message=bindparam("its_error"),
        updated_at=bindparam("now"),
    )
)


def lock(tx: Transaction, message_ids: Iterable[str]) -> None:
    """Lock messages, always in the same order, before their deliveries change.

    Two who change different deliveries of one message would else each draw its status
    without seeing what the other changed.
    """
    ids = sorted(message_ids)
    if ids and tx.connection.dialect.name != "sqlite":  # there the whole transaction is the lock
        _LOCK.change(tx, {"ids": ids})


def refresh(tx: Transaction, message_ids: Iterable[str]) -> None:
    """Draw the status, counts and times of messages from their deliveries anew."""
    ids = list(message_ids)
    if not ids:
        return
    by_message: dict[str, list[Any]] = defaultdict(list)
    for row in _OF_MESSAGES.fetch(tx, {"ids": ids}):
        by_message[row.message_id].append(row)
    summarise(tx, by_message)


def summarise(tx: Transaction, by_message: Mapping[str, Sequence[Any]]) -> None:
    """Draw the status, counts and times of messages from the rows of all their deliveries."""
    alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for message_id, its in by_message.items():
        alike[_summary(its)].append(message_id)
    for (status, retries, end, error), its_ids in alike.items():
        values = {"its_status": status, "its_retries": retries, "its_end": end, "its_error": error}
        _SUMMARISE.change(tx, {"ids": its_ids, "now": tx.now, **values})


def _summary(its: Sequence[Any]) -> tuple[Any, ...]:
    statuses = [DeliveryStatus(row.status) for row in its]
    times = [row.processed_at for row in its if row.processed_at is not None]
    with_error = [row for row in its if row.error_message is not None]
    newest = max(with_error, key=lambda row: row.started_at or datetime.min, default=None)
    return (
        message_status(statuses),
        max(retries_made(status, row.attempts) for status, row in zip(statuses, its, strict=True)),
        max(times, default=None),
        newest.error_message if newest else None,
    )
