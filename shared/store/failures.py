"""Dead letters in groups: those that failed by the same exception at the same place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, insert, select

from shared.database import Transaction
from shared.statements import Prepared
from shared.store.queries import iso
from shared.tables import deliveries, failures, messages, subscriptions

f = failures.c

MOST_GROUPS = 200
"""Groups of one answer: those with the most dead letters."""

_ADD = Prepared(insert(failures), [column.name for column in f])
_REMOVE = Prepared(delete(failures).where(f.delivery_seq.in_(bindparam("seqs", expanding=True))))


def fingerprint(error_type: str, place: str) -> str:
    """Return the name of the group of what failed so: 16 hexadecimal digits."""
    return hashlib.sha256(f"{error_type}\n{place}".encode()).hexdigest()[:16]


def add(tx: Transaction, dead: Sequence[tuple[int, str, str]]) -> None:
    """Note dead letters: number, type of the exception, and place."""
    remove(tx, [seq for seq, _, _ in dead])
    rows = [
        {
            "delivery_seq": seq,
            "fingerprint": fingerprint(error_type, place),
            "error_type": error_type,
            "place": place,
            "failed_at": tx.now,
        }
        for seq, error_type, place in dead
    ]
    _ADD.change_many(tx, rows)


def remove(tx: Transaction, seqs: Sequence[int]) -> None:
    """Note that these are no dead letters any more."""
    if seqs:
        _REMOVE.change(tx, {"seqs": seqs})


def groups(connection: Connection) -> list[dict[str, Any]]:
    """Return the groups of dead letters, the largest first."""
    counted = connection.execute(
        select(
            f.fingerprint,
            func.count().label("number"),
            func.min(f.failed_at).label("first"),
            func.max(f.failed_at).label("last"),
            func.max(f.delivery_seq).label("example"),
        )
        .group_by(f.fingerprint)
        .order_by(func.count().desc(), f.fingerprint)
        .limit(MOST_GROUPS)
    ).all()
    examples = _examples(connection, [row.example for row in counted])
    return [
        {
            "fingerprint": row.fingerprint,
            "count": row.number,
            "firstSeenAt": iso(row.first),
            "lastSeenAt": iso(row.last),
            **_example(examples[row.example]),
        }
        for row in counted
        if row.example in examples
    ]


def _examples(connection: Connection, seqs: Sequence[int]) -> dict[int, Any]:
    rows = connection.execute(
        select(
            f.delivery_seq,
            f.error_type,
            f.place,
            deliveries.c.error_message,
            deliveries.c.message_id,
            messages.c.queue_name,
            messages.c.message_type,
            subscriptions.c.subscriber,
        )
        .select_from(failures)
        .join(deliveries, deliveries.c.seq == f.delivery_seq)
        .join(messages, messages.c.id == deliveries.c.message_id)
        .join(subscriptions, subscriptions.c.id == deliveries.c.subscription_id)
        .where(f.delivery_seq.in_(seqs))
    )
    return {row.delivery_seq: row for row in rows}


def _example(row: Any) -> dict[str, Any]:
    return {
        "errorType": row.error_type,
        "place": row.place or None,
        "example": {
            "messageId": row.message_id,
            "queueName": row.queue_name,
            "messageType": row.message_type,
            "subscriber": row.subscriber,
            "errorMessage": row.error_message,
        },
    }


def seqs_of(
    connection: Connection, group: str, limit: int, *, of_the_living: bool = False
) -> list[int]:
    """Return numbers of the dead letters of a group, the oldest failure first.

    :param of_the_living: without those of subscriptions that were retired.
    """
    its = select(f.delivery_seq).where(f.fingerprint == group)
    if of_the_living:
        its = (
            its.select_from(failures)
            .join(deliveries, deliveries.c.seq == f.delivery_seq)
            .join(subscriptions, subscriptions.c.id == deliveries.c.subscription_id)
            .where(subscriptions.c.retired_at.is_(None))
        )
    ordered = its.order_by(f.failed_at, f.delivery_seq).limit(limit)
    return list(connection.execute(ordered).scalars())


def size(connection: Connection, group: str) -> int:
    """Return how many dead letters a group has."""
    counted = select(func.count()).select_from(failures).where(f.fingerprint == group)
    return connection.execute(counted).scalar_one()
