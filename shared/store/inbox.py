"""The inbox: which messages the handlers of a service have handled.

A row is stored in the transaction of what its handler did, so that both are there or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import Column, Connection, MetaData, Table, delete, func, insert, select, text

from shared.tables import exact, millis

REMOVED_AT_ONCE = 1000
"""Old rows that are removed in one transaction."""


def inbox_name(service: str) -> str:
    """Return the name of a service's inbox table."""
    return f"{service}_inbox"


def inbox_table(metadata: MetaData, service: str) -> Table:
    """Define the inbox of ``service`` among its own tables; call it once, in its models."""
    return Table(
        inbox_name(service),
        metadata,
        # ids are in the order of dispatch: what is new is at the end
        Column("message_id", exact(36), primary_key=True),
        Column("subscriber", exact(255), primary_key=True),
        Column(
            "handled_at",
            millis(),
            nullable=False,
            index=True,
            server_default=text("CURRENT_TIMESTAMP"),
        ),
    )


def record(
    connection: Connection, inbox: Table, subscriber: str, message_ids: Sequence[str]
) -> None:
    """Note that messages are handled.

    :raises IntegrityError: when one of them was.
    """
    rows = [{"message_id": id_, "subscriber": subscriber} for id_ in message_ids]
    connection.execute(insert(inbox), rows)


def handled(
    connection: Connection, inbox: Table, subscriber: str, message_ids: Sequence[str]
) -> set[str]:
    """Return which of these messages are handled."""
    c = inbox.c
    query = select(c.message_id).where(c.message_id.in_(message_ids), c.subscriber == subscriber)
    return set(connection.execute(query).scalars())


def remove_old(connection: Connection, inbox: Table, days: float) -> int:
    """Remove the oldest of the rows that are older than that; return how many."""
    at = inbox.c.handled_at
    oldest = connection.execute(select(func.current_timestamp())).scalar_one()
    is_old = at < oldest - timedelta(days=days)
    # neither SQLite nor the others all take a DELETE with a LIMIT
    last = (
        select(at).where(is_old).order_by(at).limit(1).offset(REMOVED_AT_ONCE - 1).scalar_subquery()
    )
    until = connection.execute(select(last)).scalar_one()
    is_next = is_old if until is None else at <= until
    return connection.execute(delete(inbox).where(is_next)).rowcount
