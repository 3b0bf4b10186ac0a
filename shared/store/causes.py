"""What caused a message: the one whose handler dispatched it; and what it caused."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, insert, select

from shared.database import Transaction
from shared.statements import Prepared
from shared.store.listing import LISTED_COLUMNS
from shared.store.queries import iso
from shared.tables import OWN_METADATA, causes, messages
from shared.types import Envelope

CAUSE = "cause"
"""The key of the suite's own metadata that holds the id of the message that caused this one."""

MOST_ABOVE = 20
"""How many causes of causes are shown."""

MOST_BELOW = 200
"""How many messages of the tree are shown."""

MOST_DEEP = 10
"""How many levels of the tree are shown."""

_ADD = Prepared(insert(causes), ["message_id", "cause_id"])


def note(tx: Transaction, envelopes: Sequence[Envelope]) -> None:
    """Store what caused these messages, where something did."""
    rows = [
        {"message_id": envelope.id, "cause_id": cause}
        for envelope in envelopes
        if (cause := envelope.metadata.get(OWN_METADATA, {}).get(CAUSE))
    ]
    if rows:
        _ADD.change_many(tx, rows)


def caused_by(connection: Connection, message_id: str) -> list[dict[str, Any]]:
    """Return the cause of a message, the cause of that, and so on."""
    found: list[dict[str, Any]] = []
    seen = {message_id}
    while len(found) < MOST_ABOVE:
        row = connection.execute(
            select(causes.c.cause_id).where(causes.c.message_id == message_id)
        ).first()
        if row is None or row.cause_id in seen:
            break
        message_id = row.cause_id
        seen.add(message_id)
        its = _messages(connection, [message_id])
        # one that was deleted is no longer there to tell of itself
        found.append(its.get(message_id, {"messageId": message_id}))
    return found


def caused(connection: Connection, message_id: str) -> tuple[list[dict[str, Any]], bool]:
    """Return the tree of what a message caused, and whether there is more than is shown."""
    below: dict[str, list[str]] = defaultdict(list)
    level, shown, is_cut = [message_id], [message_id], False
    for _ in range(MOST_DEEP):
        room = MOST_BELOW + 1 - len(shown)
        rows = connection.execute(
            select(causes.c.cause_id, causes.c.message_id)
            .where(causes.c.cause_id.in_(level))
            .order_by(causes.c.cause_id, causes.c.message_id)
            .limit(room + 1)
        ).all()
        is_cut = len(rows) > room
        level = [row.message_id for row in rows[:room]]
        for row in rows[:room]:
            below[row.cause_id].append(row.message_id)
        shown += level
        if not level or is_cut:
            break
    else:
        is_cut = _has_any(connection, level)
    details = _messages(connection, shown[1:])
    return _tree(message_id, below, details), is_cut


def _has_any(connection: Connection, ids: Sequence[str]) -> bool:
    found = select(causes.c.message_id).where(causes.c.cause_id.in_(ids)).limit(1)
    return connection.execute(found).first() is not None


def _tree(
    message_id: str, below: dict[str, list[str]], details: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {**details[each], "caused": _tree(each, below, details)}
        for each in below.get(message_id, ())
        if each in details
    ]


def _messages(connection: Connection, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    rows = connection.execute(select(*LISTED_COLUMNS).where(messages.c.id.in_(ids)))
    return {
        row.id: {
            "messageId": row.id,
            "queueName": row.queue_name,
            "messageType": row.message_type,
            "status": row.status,
            "createdAt": iso(row.created_at),
        }
        for row in rows
    }
