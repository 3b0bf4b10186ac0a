"""The books of the message log: what became of each delivery, and who has it meanwhile.

What is neither final, nor ready, nor in anybody's hands by the log, the provider should have.
In the tables of the ``embedded`` provider such a delivery has besides to wait for its time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    String,
    and_,
    bindparam,
    case,
    exists,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
    type_coerce,
    union_all,
    update,
)

from shared.database import Transaction
from shared.lifecycle import WAITING, DeliveryStatus, MessageStatus
from shared.statements import Prepared
from shared.store import retention
from shared.store.summary import lock, refresh
from shared.tables import SUBSCRIPTION_COLUMNS, deliveries, messages, subscription_of, subscriptions
from shared.types import Subscription

MOST_AT_ONCE = 1000
"""Deliveries that are given back in one transaction: others write meanwhile."""

d = deliveries.c
m = messages.c
s = subscriptions.c

OPEN = (*sorted(WAITING), DeliveryStatus.PROCESSING)

_SEQS: Any = bindparam("seqs", expanding=True)
_IS_WAITING = or_(*[d.status == status for status in sorted(WAITING)])
_IS_PROCESSING = d.status == DeliveryStatus.PROCESSING
# the first names what SQLite has in its index
_IS_OPEN = and_(d.status != literal_column("'completed'"), or_(_IS_WAITING, _IS_PROCESSING))
_IS_ELSEWHERE = and_(d.ready == false(), d.lease_expires_at.is_(None))

_GIVE_BACK = Prepared(
    update(deliveries)
    .where(d.seq.in_(_SEQS), _IS_WAITING, _IS_ELSEWHERE)
    .values(ready=True, provider=None)
)
_HOLD = Prepared(
    update(deliveries)
    .where(d.seq.in_(_SEQS), _IS_PROCESSING, _IS_ELSEWHERE)
    .values(lease_expires_at=bindparam("until"))
)


class Entry(NamedTuple):
    """A delivery that the provider should have; a move of it makes another entry."""

    seq: int
    subscription_id: int
    message_id: str
    status: str
    attempts: int
    lease_token: int
    available_at: datetime | None
    provider: str | None = None


def elsewhere(connection: Connection, *, is_joined: bool) -> list[Entry]:
    """Return what the log itself does not keep, of all subscriptions that get events.

    :param is_joined: the provider works in the log's tables: what waits for a time is there.
    """
    is_there = and_(_IS_ELSEWHERE, d.available_at.is_(None)) if is_joined else _IS_ELSEWHERE
    columns = [d[name] for name in Entry._fields]
    found = (
        select(*columns)
        .join(subscriptions, s.id == d.subscription_id)
        .where(_IS_OPEN, is_there, s.retired_at.is_(None))
    )
    return [Entry(*row) for row in connection.execute(found)]


def orphaned(connection: Connection) -> Counter[int]:
    """Count by subscription what is open of retired ones: dispatched as they were retired."""
    found = (
        select(d.subscription_id, func.count())
        .join(subscriptions, s.id == d.subscription_id)
        .where(_IS_OPEN, s.retired_at.is_not(None))
        .group_by(d.subscription_id)
    )
    return Counter({its: int(count) for its, count in connection.execute(found)})


class Account(NamedTuple):
    """What became of the deliveries of one subscription, those included that were removed."""

    subscription: Subscription
    is_retired: bool
    dispatched: int
    completed: int
    dead: int
    discarded: int
    waiting: int
    in_log: int
    """Of those that wait: what the log keeps, to be published or under a lease of its own."""
    removed: int
    """Of those that ended: what the retention removed, and the log tells no more of."""


def accounts(connection: Connection) -> list[Account]:
    """Count the deliveries of each subscription."""
    is_in_log = case((and_(_IS_OPEN, ~_IS_ELSEWHERE), 1), else_=0)
    counted = select(
        d.subscription_id,
        type_coerce(d.status, String).label("status"),
        func.count().label("all"),
        func.sum(is_in_log).label("kept"),
    ).group_by(d.subscription_id, d.status)
    # in one statement: some may be removed just now
    gone = [each.add_columns(literal(0)) for each in retention.counts()]
    counts: dict[int, dict[str, tuple[int, int]]] = {}
    for row in connection.execute(union_all(counted, *gone)):
        counts.setdefault(row.subscription_id, {})[row.status] = (int(row.all), int(row.kept))
    known = select(*SUBSCRIPTION_COLUMNS, s.retired_at).order_by(s.queue_name, s.message_type, s.id)
    return [_account(row, counts.get(row.id, {})) for row in connection.execute(known)]


def _account(row: Any, counts: dict[str, tuple[int, int]]) -> Account:
    def of(*statuses: str) -> int:
        return sum(counts.get(status, (0, 0))[0] for status in statuses)

    gone = retention.REMOVED
    return Account(
        subscription_of(row),
        is_retired=row.retired_at is not None,
        dispatched=of(*counts),
        completed=of(DeliveryStatus.COMPLETED, gone["completed"]),
        dead=of(DeliveryStatus.FAILED, gone["dead"]),
        discarded=of(DeliveryStatus.DISCARDED, gone["discarded"]),
        waiting=of(*OPEN),
        in_log=sum(kept for _, kept in counts.values()),
        removed=of(*gone.values()),
    )


# --- the statuses of messages

_LOUDNESS = case(
    (d.status == DeliveryStatus.FAILED, 4),
    (d.status == DeliveryStatus.RETRY, 3),
    (_IS_PROCESSING, 2),
    else_=1,
)
_IS_LOUD = and_(
    d.status != literal_column("'completed'"), or_(_IS_OPEN, d.status == DeliveryStatus.FAILED)
)
_BY_LOUDNESS = {
    4: MessageStatus.FAILED,
    3: MessageStatus.RETRY,
    2: MessageStatus.PROCESSING,
    1: MessageStatus.PENDING,
}


def misdrawn(connection: Connection) -> set[str]:
    """Return the messages whose status is not that of their deliveries."""
    drawn = (
        select(d.message_id, func.max(_LOUDNESS).label("loudness"))
        .where(_IS_LOUD)
        .group_by(d.message_id)
        .subquery()
    )
    differs = or_(
        *[
            and_(drawn.c.loudness == loudness, m.status != status)
            for loudness, status in _BY_LOUDNESS.items()
        ]
    )
    loud = select(m.id).join(drawn, drawn.c.message_id == m.id).where(differs)
    # of a message without any delivery it depends on the provider whether it is done with
    done = select(m.id).where(
        m.queue_name.in_(select(s.queue_name)),
        m.status.in_([each for each in MessageStatus if each != MessageStatus.COMPLETED]),
        exists().where(d.message_id == m.id),
        ~exists().where(d.message_id == m.id, _IS_LOUD),
    )
    found = [connection.execute(each).scalars() for each in (loud, done)]
    return {message_id for each in found for message_id in each}


# --- repair


def give_back(tx: Transaction, seqs: Sequence[int], lease: float) -> None:
    """Have the log keep what its provider lost: it is published, or taken over.

    What moved meanwhile is left alone. What a worker handles is leased to it in the log for
    ``lease`` seconds; one that lives renews that, and from one that died it is taken over.
    """
    _GIVE_BACK.change(tx, {"seqs": seqs})
    _HOLD.change(tx, {"seqs": seqs, "until": tx.later(lease)})


def draw_anew(tx: Transaction, message_ids: Collection[str]) -> None:
    """Draw the statuses of messages from their deliveries."""
    lock(tx, message_ids)
    refresh(tx, message_ids)
