"""The audit log: who did what through ``queue_admin``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Connection, insert, select

from shared.database import Transaction
from shared.store.queries import iso
from shared.tables import audit_log

a = audit_log.c


class Deed(NamedTuple):
    """What somebody did.

    :param actor: who, such as the name of a token.
    :param action: such as ``retry``.
    :param target: to what, such as ``message 01a2…``.
    """

    actor: str
    action: str
    target: str
    detail: Mapping[str, Any] | None = None


def note(tx: Transaction, deed: Deed) -> None:
    """Store what somebody did."""
    tx.connection.execute(
        insert(audit_log).values(
            at=tx.now,
            actor=deed.actor[:255],
            action=deed.action,
            target=deed.target[:255],
            detail=json.dumps(deed.detail, ensure_ascii=False) if deed.detail else None,
        )
    )


def entries(connection: Connection, before: int | None, limit: int) -> dict[str, Any]:
    """Return what was done, the newest first, and where to go on.

    :param before: the id of the entry that the page before ended with.
    """
    wanted = select(audit_log).order_by(a.id.desc()).limit(limit + 1)
    if before is not None:
        wanted = wanted.where(a.id < before)
    rows = connection.execute(wanted).all()
    return {
        "entries": [
            {
                "id": row.id,
                "at": iso(row.at),
                "actor": row.actor,
                "action": row.action,
                "target": row.target,
                "detail": json.loads(row.detail) if row.detail else None,
            }
            for row in rows[:limit]
        ],
        "nextBefore": rows[limit - 1].id if len(rows) > limit else None,
    }
