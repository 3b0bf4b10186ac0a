"""Schedules: events that are dispatched at the times of a cron expression.

An occurrence is dispatched by whoever moves the schedule on from it, in one transaction, and
only while it is still due at that time. So any number of processes may try.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from shared.database import Transaction
from shared.errors import ScheduleNotFoundError
from shared.store.queries import iso
from shared.tables import schedules

s = schedules.c


def due(connection: Connection, now: datetime) -> tuple[list[Any], float | None]:
    """Return the schedules that are due, and in how many seconds the next one is."""
    rows = connection.execute(select(schedules).where(s.next_at <= now).order_by(s.next_at)).all()
    soonest = connection.execute(select(func.min(s.next_at)).where(s.next_at > now)).scalar()
    return list(rows), None if soonest is None else (soonest - now).total_seconds()


def take(tx: Transaction, seen: Any) -> bool:
    """Lock a schedule, if it is still as it was seen and nobody else has it."""
    its = s.name == seen.name, s.next_at == seen.next_at, s.updated_at == seen.updated_at
    found = select(s.name).where(*its).with_for_update(skip_locked=True)
    return tx.connection.execute(found).first() is not None


def move_on(
    tx: Transaction, name: str, next_at: datetime | None, skipped: int, **outcome: Any
) -> None:
    """Note what became of an occurrence, how many it stands for, and when the next one is."""
    set_values(tx, name, next_at=next_at, skipped=s.skipped + skipped, **outcome)


def dispatched(at: datetime, message_id: str) -> dict[str, Any]:
    """Return what is noted of a dispatch."""
    return {"last_at": at, "last_message_id": message_id, "error": None, "error_at": None}


def find(connection: Connection, name: str, *, locks: bool = False) -> Any:
    """Return the row of a schedule.

    :param locks: nobody else changes it in this transaction.
    :raises ScheduleNotFoundError: when there is none of that name.
    """
    wanted = select(schedules).where(s.name == name)
    row = connection.execute(wanted.with_for_update() if locks else wanted).first()
    if row is None:
        raise ScheduleNotFoundError(f"no schedule {name}")
    return row


def add(tx: Transaction, name: str, actor: str, **values: Any) -> None:
    """Make a schedule, or change the one that there is."""
    try:
        change(tx, name, actor, **values)
    except ScheduleNotFoundError:
        # a duplicate has all of this done again: somebody else was faster
        named = {"name": name, "updated_by": actor[:255], "updated_at": tx.now}
        tx.connection.execute(insert(schedules).values(**named, **values))


def change(tx: Transaction, name: str, actor: str, **values: Any) -> None:
    """Change what somebody says of a schedule.

    :raises ScheduleNotFoundError: when there is none of that name.
    """
    set_values(tx, name, **values, updated_by=actor[:255], updated_at=tx.now)


def set_values(tx: Transaction, name: str, **values: Any) -> None:
    """Note what became of a schedule.

    :raises ScheduleNotFoundError: when there is none of that name.
    """
    if not tx.connection.execute(update(schedules).where(s.name == name).values(**values)).rowcount:
        raise ScheduleNotFoundError(f"no schedule {name}")


def remove(tx: Transaction, name: str) -> None:
    """Remove a schedule.

    :raises ScheduleNotFoundError: when there is none of that name.
    """
    if not tx.connection.execute(delete(schedules).where(s.name == name)).rowcount:
        raise ScheduleNotFoundError(f"no schedule {name}")


def list_schedules(connection: Connection) -> list[Any]:
    """Return the rows of all schedules, by name."""
    return list(connection.execute(select(schedules).order_by(s.name)).all())


def shown(row: Any, sentence: str) -> dict[str, Any]:
    """Return what is told of a schedule.

    :param sentence: what its expression means.
    """
    return {
        "name": row.name,
        "queueName": row.queue_name,
        "messageType": row.message_type,
        "payload": json.loads(row.payload),
        "priority": row.priority,
        "metadata": json.loads(row.metadata or "{}"),
        "cron": row.cron,
        "timeZone": row.time_zone,
        "sentence": sentence,
        "enabled": bool(row.enabled),
        "nextAt": iso(row.next_at),
        "lastAt": iso(row.last_at),
        "lastMessageId": row.last_message_id,
        "skipped": row.skipped,
        "error": row.error,
        "errorAt": iso(row.error_at),
        "updatedBy": row.updated_by,
        "updatedAt": iso(row.updated_at),
    }
