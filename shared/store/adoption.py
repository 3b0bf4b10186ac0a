"""What others sent without the log: it is stored when it arrives.

A plain nameko dispatcher gives its events no id; each copy that arrives becomes a
message of its own. What was dispatched with an id, to a subscription that the log did
not know yet, becomes a further delivery of its message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import bindparam, select

from shared.database import Transaction
from shared.statements import Prepared
from shared.store import log
from shared.tables import deliveries
from shared.types import Envelope, Lease, new_message_id

_FOUND = Prepared(
    select(deliveries.c.seq, deliveries.c.message_id, deliveries.c.subscription_id)
    .where(deliveries.c.message_id.in_(bindparam("ids", expanding=True)))
    # of one that was put off the newest counts, which took the place of the others
    .order_by(deliveries.c.seq)
)


def adopt(tx: Transaction, leases: Sequence[Lease], max_retries: int) -> list[Lease]:
    """Return all leases, those without a number with one: their deliveries are stored.

    :param max_retries: as for :func:`shared.store.log.append`.
    """
    strangers = [lease for lease in leases if not lease.delivery.seq]
    if not strangers:
        return list(leases)
    named = {id(lease): _named(lease.delivery.message) for lease in strangers}
    log.store(tx, list({e.id: e for e in named.values()}.values()), max_retries)
    wanted = [(named[id(x)], x.delivery.subscription_id) for x in strangers]
    found = _seqs(tx, wanted)
    missing = [each for each in wanted if (each[0].id, each[1]) not in found]
    if missing:
        log.add_deliveries(tx, missing)
        found = _seqs(tx, wanted)
    return [_numbered(x, named.get(id(x)), found) for x in leases]


def _named(message: Envelope) -> Envelope:
    return message if message.id else replace(message, id=new_message_id())


def _seqs(tx: Transaction, wanted: Sequence[tuple[Envelope, int]]) -> dict[tuple[str, int], int]:
    rows: list[Any] = _FOUND.fetch(tx, {"ids": list({envelope.id for envelope, _ in wanted})})
    return {(row.message_id, row.subscription_id): row.seq for row in rows}


def _numbered(lease: Lease, message: Envelope | None, found: dict[tuple[str, int], int]) -> Lease:
    if message is None:
        return lease
    seq = found[message.id, lease.delivery.subscription_id]
    return replace(lease, delivery=replace(lease.delivery, seq=seq, message=message))
