"""The outbox: events stored in a service's own transaction, to be relayed after its commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    MetaData,
    Table,
    Text,
    delete,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.mysql import LONGTEXT

from shared.tables import big_key
from shared.types import Envelope, Priority


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
    )


def add(session: Any, outbox: Table, envelopes: Sequence[Envelope]) -> None:
    """Store envelopes in the session's transaction."""
    session.execute(insert(outbox), [{"envelope": _to_text(envelope)} for envelope in envelopes])


def oldest(connection: Connection, outbox: Table, limit: int) -> list[tuple[int, Envelope]]:
    """Return what has to be relayed first, with its sequence numbers."""
    rows = connection.execute(
        select(outbox.c.seq, outbox.c.envelope).order_by(outbox.c.seq).limit(limit)
    )
    return [(row.seq, _from_text(row.envelope)) for row in rows]


def remove(connection: Connection, outbox: Table, seqs: Sequence[int]) -> None:
    """Remove what was handed over."""
    connection.execute(delete(outbox).where(outbox.c.seq.in_(seqs)))


def _to_text(envelope: Envelope) -> str:
    fields = asdict(envelope)
    if envelope.scheduled_at is not None:
        fields["scheduled_at"] = envelope.scheduled_at.isoformat()
    return json.dumps(fields, ensure_ascii=False)


def _from_text(stored: str) -> Envelope:
    fields = json.loads(stored)
    fields["priority"] = Priority(fields["priority"])
    if fields["scheduled_at"] is not None:
        fields["scheduled_at"] = datetime.fromisoformat(fields["scheduled_at"])
    return Envelope(**fields)
