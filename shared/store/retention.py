"""What is kept, and for how long: finished messages are removed after some days.

A message goes as a whole, with its deliveries, attempts and cause, and only when all of its
deliveries have ended. Few go in each transaction, so that nobody waits for it. How many there
were is kept, so that the books of the audit go on to tell of all that was ever dispatched.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import (
    Connection,
    Select,
    bindparam,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from shared.database import Transaction
from shared.lifecycle import FINAL, DeliveryStatus, MessageStatus
from shared.statements import Prepared
from shared.store import failures, totals
from shared.store.listing import queues_with_messages
from shared.store.summary import lock
from shared.tables import alerts, attempts, audit_log, causes, deliveries, messages, removed

BATCH = 100
"""Messages that one transaction removes: who writes into the same SQLite file waits for it."""

d = deliveries.c
m = messages.c
r = removed.c

_IDS: Any = bindparam("ids", expanding=True)
_SEQS: Any = bindparam("seqs", expanding=True)

_NEXT = Prepared(
    select(m.id, m.created_at, m.processed_at, m.scheduled_at)
    .where(
        m.queue_name == bindparam("queue"),
        m.status == bindparam("status"),
        m.created_at < bindparam("before"),
        m.created_at >= bindparam("since"),
        # of those of one second, what comes after the last
        or_(m.created_at > bindparam("since"), m.id > bindparam("after")),
    )
    .order_by(m.created_at, m.id)
    .limit(BATCH)
)
_STATES = Prepared(select(m.id, m.status).where(m.id.in_(_IDS)))
_DELIVERIES = Prepared(
    select(d.seq, d.message_id, d.subscription_id, d.status, d.priority_rank)
    .where(d.message_id.in_(_IDS))
    .order_by(d.seq)
)
_REMOVE_ATTEMPTS = Prepared(delete(attempts).where(attempts.c.delivery_seq.in_(_SEQS)))
_REMOVE_DELIVERIES = Prepared(delete(deliveries).where(d.seq.in_(_SEQS)))
_REMOVE_CAUSES = Prepared(delete(causes).where(causes.c.message_id.in_(_IDS)))
_REMOVE_MESSAGES = Prepared(delete(messages).where(m.id.in_(_IDS)))
_COUNT = Prepared(
    update(removed)
    .where(r.subscription_id == bindparam("its_id"))
    .values(
        completed=r.completed + bindparam("more_completed"),
        dead=r.dead + bindparam("more_dead"),
        discarded=r.discarded + bindparam("more_discarded"),
    )
)

_ENDS = {
    DeliveryStatus.COMPLETED: "completed",
    DeliveryStatus.FAILED: "dead",
    DeliveryStatus.DISCARDED: "discarded",
}

REMOVED = {name: f"removed {name}" for name in _ENDS.values()}
"""What stands for the status of those that were removed, by how they ended."""


@dataclass(frozen=True, slots=True)
class Kept:
    """For how many days finished messages are kept; 0 is for ever."""

    completed: float
    dead: float

    def cutoffs(self, now: datetime) -> list[tuple[MessageStatus, datetime]]:
        """Return what is removed of which status: what ended before some time."""
        its = {MessageStatus.COMPLETED: self.completed, MessageStatus.FAILED: self.dead}
        return [(status, now - timedelta(days=days)) for status, days in its.items() if days]


class Stretch(NamedTuple):
    """Messages of one queue and status, to be looked through from the oldest on."""

    queue: str
    status: MessageStatus
    before: datetime


class Found(NamedTuple):
    """What there is next of a stretch.

    :param ids: of what may be removed.
    :param place: where to go on; ``None`` at the end.
    """

    ids: list[str]
    place: tuple[datetime, str] | None


class Removed(NamedTuple):
    """How many were removed."""

    messages: int = 0
    deliveries: int = 0

    def and_also(self, more: Removed) -> Removed:
        """Return how many both are."""
        return Removed(self.messages + more.messages, self.deliveries + more.deliveries)


BEGIN = (datetime(1970, 1, 1), "")


def stretches(connection: Connection, kept: Kept, now: datetime) -> list[Stretch]:
    """Return what is to be looked through."""
    return [
        Stretch(queue, status, before)
        for queue in queues_with_messages(connection)
        for status, before in kept.cutoffs(now)
    ]


def find(
    connection: Connection, stretch: Stretch, place: tuple[datetime, str], now: datetime
) -> Found:
    """Return the next messages that may be removed, out of a bounded number."""
    tx = Transaction(connection, now)
    since, after = place
    values = {**stretch._asdict(), "since": since, "after": after}
    rows = _NEXT.fetch(tx, values)
    old = [
        row.id
        for row in rows
        if row.processed_at is not None
        and row.processed_at < stretch.before
        # what was cancelled: a broker may yet bring its copy, which has to be known then
        and (row.scheduled_at is None or row.scheduled_at < stretch.before)
    ]
    ids = _finished(tx, old)[0] if old else []
    is_end = len(rows) < BATCH
    return Found(ids, None if is_end else (rows[-1].created_at, rows[-1].id))


def _finished(tx: Transaction, ids: Sequence[str]) -> tuple[list[str], list[Any]]:
    """Return those of these messages of which nothing waits or runs, and their deliveries.

    That of the newest delivery stays: SQLite would give its number again, and who knows a
    delivery by that, such as a broker or a ramp, would take another one for it.
    """
    by_message: dict[str, list[Any]] = defaultdict(list)
    for row in _DELIVERIES.fetch(tx, {"ids": list(ids)}):
        by_message[row.message_id].append(row)
    newest = tx.connection.execute(select(func.max(d.seq))).scalar()
    good = [
        each
        for each in ids
        if _has_ended(by_message[each]) and newest not in [row.seq for row in by_message[each]]
    ]
    return good, [row for each in good for row in by_message[each]]


def _has_ended(its: Sequence[Any]) -> bool:
    """Say whether all deliveries of a message have, for good.

    :param its: in the order of their numbers.
    """
    by_subscription: dict[int, list[Any]] = defaultdict(list)
    for row in its:
        by_subscription[row.subscription_id].append(row)
    return all(row.status in FINAL for row in its) and not any(
        _may_be_rescheduled(first, second)
        for each in by_subscription.values()
        for first, second in pairwise(each)
    )


def _may_be_rescheduled(first: Any, second: Any) -> bool:
    """Say whether a delivery may have been put off, and another of its subscription stored for it.

    A broker may bring the first one's copy at a time that nothing tells any more, and it has to
    be known then as discarded. A replay stores another one as well, but beside what was left
    discarded it tells itself only by a priority that differs.
    """
    is_discarded: bool = first.status == DeliveryStatus.DISCARDED
    return is_discarded and first.priority_rank == second.priority_rank


def remove(tx: Transaction, stretch: Stretch, ids: Sequence[str]) -> Removed:
    """Remove messages that may be, as they are by now; return how many."""
    lock(tx, ids)
    states = {row.id: row.status for row in _STATES.fetch(tx, {"ids": list(ids)})}
    still = [each for each in ids if states.get(each) == stretch.status]
    good, its = _finished(tx, still)
    if not good:
        return Removed()
    seqs = [row.seq for row in its]
    if seqs:
        failures.remove(tx, seqs)
        _REMOVE_ATTEMPTS.change(tx, {"seqs": seqs})
        _REMOVE_DELIVERIES.change(tx, {"seqs": seqs})
        _count(tx, its)
    totals.remove(tx, stretch.queue, good, {*good} - {row.message_id for row in its})
    _REMOVE_CAUSES.change(tx, {"ids": good})
    _REMOVE_MESSAGES.change(tx, {"ids": good})
    return Removed(len(good), len(seqs))


def _count(tx: Transaction, its: Collection[Any]) -> None:
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for row in its:
        counts[row.subscription_id][_ENDS[DeliveryStatus(row.status)]] += 1
    for subscription_id, count in sorted(counts.items()):
        more = {f"more_{name}": count[name] for name in _ENDS.values()}
        if not _COUNT.count_changed(tx, {"its_id": subscription_id, **more}):
            its_row = {name: count[name] for name in _ENDS.values()}
            tx.connection.execute(
                insert(removed).values(subscription_id=subscription_id, **its_row)
            )


def remove_alerts(tx: Transaction, before: datetime) -> None:
    """Remove alerts that were over by then."""
    tx.connection.execute(delete(alerts).where(alerts.c.ended_at < before))


def counts() -> list[Select[Any]]:
    """Return what selects how many were removed ever: subscription, :data:`REMOVED`, how many."""
    return [select(r.subscription_id, literal(word), r[name]) for name, word in REMOVED.items()]


# --- one entry of the audit log for all that one call removes


def begin_entry(tx: Transaction, actor: str, detail: Mapping[str, Any]) -> int:
    """Note who removes; return the entry's id."""
    added = tx.connection.execute(
        insert(audit_log).values(
            at=tx.now, actor=actor[:255], action="prune", target="finished messages",
            detail=json.dumps(detail),
        )
    )  # fmt: skip
    [entry_id] = added.inserted_primary_key or (0,)
    return int(entry_id)


def update_entry(tx: Transaction, entry_id: int, detail: Mapping[str, Any]) -> None:
    """Note how many were removed so far."""
    its = update(audit_log).where(audit_log.c.id == entry_id)
    tx.connection.execute(its.values(detail=json.dumps(detail)))
