"""What one process does for all of them, now and then: whoever comes first when it is due."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select, update

from shared.database import Transaction
from shared.store.queries import iso
from shared.tables import timers

t = timers.c


def take(tx: Transaction, name: str, seconds: float, *, first: float = 0.0) -> bool:
    """Say whether it is to be done now, and by us: until the next time it is nobody else's.

    :param seconds: from now to the next time.
    :param first: seconds from the first time that anybody asks, until it is due at all.
    """
    row = tx.connection.execute(
        select(t.next_at).where(t.name == name).with_for_update(skip_locked=True)
    ).first()
    if row is not None and row.next_at > tx.now:
        return False
    if row is not None:
        done = update(timers).where(t.name == name)
        tx.connection.execute(done.values(next_at=tx.later(seconds), last_at=tx.now))
        return True
    if tx.connection.execute(select(t.name).where(t.name == name)).first() is not None:
        return False  # somebody else has it just now
    # who comes second meets the first one's row, and begins again
    last_at = None if first else tx.now
    added = insert(timers).values(name=name, next_at=tx.later(first or seconds), last_at=last_at)
    tx.connection.execute(added)
    return not first


def start(tx: Transaction, name: str, seconds: float) -> None:
    """Note that it is done now, due or not, and when it is due next.

    :param seconds: from now to the next time.
    """
    values = {"next_at": tx.later(seconds), "last_at": tx.now}
    if not tx.connection.execute(update(timers).where(t.name == name).values(**values)).rowcount:
        tx.connection.execute(insert(timers).values(name=name, **values))


def is_due(connection: Connection, name: str, now: datetime) -> bool:
    """Say whether it may be to be done; :func:`take` decides."""
    next_at = connection.execute(select(t.next_at).where(t.name == name)).scalar()
    return next_at is None or next_at <= now


def note(tx: Transaction, name: str, result: Mapping[str, Any]) -> None:
    """Store what came of it."""
    tx.connection.execute(
        update(timers).where(t.name == name).values(result=json.dumps(result, ensure_ascii=False))
    )


def shown(connection: Connection, name: str) -> dict[str, Any]:
    """Return when it was done last, with what came of it, and when it will be."""
    row = connection.execute(select(timers).where(t.name == name)).first()
    return {
        "lastRunAt": iso(row.last_at) if row else None,
        "lastResult": json.loads(row.result) if row and row.result else None,
        "nextRunAt": iso(row.next_at) if row else None,
    }
