"""The outbox: events stored in a service's own transaction, to be relayed after its commit.

They are relayed in the order of their numbers, which is the order of the commits: what was
committed before another commit began has the smaller number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    DateTime,
    MetaData,
    Table,
    Text,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects.mysql import LONGTEXT

from shared.tables import big_key
from shared.types import Dedupe, Envelope, Priority, check_name

LONGEST_ERROR = 2_000
"""Characters that are kept of why a row was set aside."""

MOST_CHARACTERS = 1_000_000
"""Characters of what is stored by one statement, but for one that is longer alone: a server takes
16 MB unless it is told otherwise, and closes the connection of who sends more."""


class Row(NamedTuple):
    """A row: its number, and what :func:`read` takes."""

    seq: int
    envelope: str


def outbox_name(service: str) -> str:
    """Return the name of a service's outbox table."""
    return f"{service}_outbox"


def outbox_table(metadata: MetaData, service: str) -> Table:
    """Define the outbox of ``service`` among its own tables; call it once, in its models."""
    return Table(
        outbox_name(service),
        metadata,
        Column("seq", big_key(), primary_key=True, autoincrement=True),
        Column("envelope", Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=False),
        Column("created_at", DateTime, nullable=False, server_default=text("CURRENT_TIMESTAMP")),
        # Set aside: it cannot be relayed as it is, and the rest goes on without it.
        Column("failed_at", DateTime, nullable=True),
        Column("error", Text, nullable=True),
    )


def add(session: Any, outbox: Table, envelopes: Sequence[Envelope]) -> list[int]:
    """Store envelopes in the session's transaction.

    :returns: their numbers, for :func:`renumber`; none on SQLite, which has one writer at a
        time: its numbers are in the order of the commits already.
    """
    rows = [{"envelope": _to_text(envelope)} for envelope in envelopes]
    dialect = session.get_bind().dialect
    if dialect.name == "sqlite":
        session.execute(insert(outbox), rows)
        return []
    if dialect.insert_returning:
        adding = insert(outbox).returning(outbox.c.seq)
        parts = _parts(rows)
        return [seq for part in parts for seq in session.execute(adding, part).scalars()]
    return [session.execute(insert(outbox), row).inserted_primary_key[0] for row in rows]


def _parts(rows: Sequence[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """Yield the rows in as many statements as a server takes them in."""
    part: list[dict[str, str]] = []
    size = 0
    for row in rows:
        if part and size + len(row["envelope"]) > MOST_CHARACTERS:
            yield part
            part, size = [], 0
        part.append(row)
        size += len(row["envelope"])
    yield part


def renumber(session: Any, outbox: Table, seqs: Sequence[int]) -> None:
    """Give rows of the session's transaction new numbers, last thing before its commit.

    Numbers are given when a row is inserted. Who inserted later and commits sooner would
    go behind.
    """
    its = outbox.c.seq.in_(seqs)
    again = select(outbox.c.envelope, outbox.c.created_at).where(its).order_by(outbox.c.seq)
    session.execute(insert(outbox).from_select(["envelope", "created_at"], again))
    session.execute(delete(outbox).where(its))


def oldest(connection: Connection, outbox: Table, limit: int) -> list[Row]:
    """Return what has to be relayed first."""
    rows = connection.execute(
        select(outbox.c.seq, outbox.c.envelope)
        .where(outbox.c.failed_at.is_(None))
        .order_by(outbox.c.seq)
        .limit(limit)
    )
    return [Row(row.seq, row.envelope) for row in rows]


def read(stored: str) -> Envelope:
    """Return the envelope that was stored.

    :raises ValueError: when it is none.
    """
    try:
        envelope = _from_text(stored)
    except (TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc
    return envelope


def remove(connection: Connection, outbox: Table, rows: Sequence[Row]) -> None:
    """Remove what was handed over."""
    connection.execute(delete(outbox).where(*_are(connection, outbox, rows)))


def set_aside(connection: Connection, outbox: Table, row: Row, error: str) -> bool:
    """Leave a row out from now on; say whether nobody had done so before."""
    done = connection.execute(
        update(outbox)
        .where(*_are(connection, outbox, [row]), outbox.c.failed_at.is_(None))
        .values(failed_at=func.current_timestamp(), error=error[:LONGEST_ERROR])
    )
    return done.rowcount > 0


def _are(
    connection: Connection, outbox: Table, rows: Sequence[Row]
) -> Sequence[ColumnElement[bool]]:
    its_number = outbox.c.seq.in_([row.seq for row in rows])
    if connection.dialect.name != "sqlite":
        return [its_number]
    # SQLite begins again with 1 when a table is empty: another process may have removed what
    # is meant, and the number be that of what was committed since
    return [its_number, outbox.c.envelope.in_([row.envelope for row in rows])]


def _to_text(envelope: Envelope) -> str:
    fields = asdict(envelope)
    if envelope.scheduled_at is not None:
        fields["scheduled_at"] = envelope.scheduled_at.isoformat()
    # the version before does not know it, and may be what relays this
    if envelope.dedupe is None:
        del fields["dedupe"]
    return json.dumps(fields, ensure_ascii=False)


def _from_text(stored: str) -> Envelope:
    fields = json.loads(stored)
    fields["priority"] = Priority(fields["priority"])
    if fields["scheduled_at"] is not None:
        fields["scheduled_at"] = datetime.fromisoformat(fields["scheduled_at"])
    if "dedupe" in fields:
        fields["dedupe"] = Dedupe(*fields["dedupe"])
    envelope = Envelope(**fields)
    check_name(envelope.queue, "queue")
    check_name(envelope.type, "type")
    json.loads(envelope.body)
    for name, kinds in _KINDS.items():
        if not isinstance(getattr(envelope, name), kinds):
            raise ValueError(f"{name} must not be {getattr(envelope, name)!r}")
    return envelope


_KINDS: dict[str, Any] = {
    "id": str,
    "metadata": dict,
    "max_retries": int | None,
    "delay": int | float | None,
}
