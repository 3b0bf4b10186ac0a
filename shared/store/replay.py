"""Replay: new deliveries of old messages, for one subscription alone.

Messages are looked through by the index of queue, status and time, oldest first, a bounded
number at once. Which of them the subscription lacks is seen from its deliveries, and once more
when they are locked: so whatever is done again, and by however many, doubles nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, insert, literal, or_, select, union_all

from shared.database import Transaction
from shared.lifecycle import MessageStatus
from shared.store import consumers, totals
from shared.store.consumers import OPEN
from shared.store.listing import FIRST, LAST, Place
from shared.store.log import seconds_until
from shared.store.repair import ORIGIN, envelopes_of
from shared.store.summary import lock, refresh
from shared.tables import OWN_METADATA, deliveries, messages
from shared.types import Delivery, Envelope, Priority, Subscription

m = messages.c
d = deliveries.c

MOST_SEARCHED = 500
"""Messages of the queue that one search looks through: most may be of other types."""

RANK = Priority.LOW.rank
"""What is replayed goes after all that is new, unless that is of low priority itself."""


class Stretch(NamedTuple):
    """Which messages are meant: those stored in this time.

    :param since: naive UTC, itself included.
    :param until: naive UTC, itself not included.
    :param mark: deliveries up to this number do not count: what the subscription had by them is
        delivered once more. 0 leaves out whatever it had.
    """

    since: datetime | None = None
    until: datetime | None = None
    mark: int = 0


class Page(NamedTuple):
    """Messages that the subscription lacks, the oldest first, and where to go on.

    :param searched: how many messages of its type there were.
    """

    ids: list[str]
    next: Place | None
    searched: int


def newest(connection: Connection) -> int:
    """Return the number of the newest delivery, a mark for what is delivered once more."""
    return int(connection.execute(select(func.max(d.seq))).scalar() or 0)


def look(
    connection: Connection,
    its: Subscription,
    stretch: Stretch,
    after: Place | None,
    limit: int = MOST_SEARCHED,
) -> Page:
    """Look for messages that a subscription lacks, after a place."""
    rows = connection.execute(_next(its.queue, stretch, after, limit)).all()
    ids = [row.id for row in rows if row.message_type == its.event_type]
    place = Place(rows[-1].created_at, rows[-1].id) if len(rows) == limit else None
    return Page(lacking(connection, its.id, ids, stretch.mark), place, len(ids))


def lacking(
    connection: Connection, subscription_id: int, ids: Sequence[str], mark: int
) -> list[str]:
    """Return those of the messages that a subscription lacks, in their order."""
    if not ids:
        return []
    rows = connection.execute(select(m.id, m.status, m.metadata).where(m.id.in_(list(ids)))).all()
    origins = {row.id: origin for row in rows if (origin := _origin(row))}
    had: dict[str, list[Any]] = defaultdict(list)
    routed = set()
    known = d.message_id.in_(list({*ids, *origins.values()}))
    found = select(d.message_id, d.subscription_id, d.seq, d.status).where(known)
    for one in connection.execute(found):
        routed.add(one.message_id)
        if one.subscription_id == subscription_id:
            had[one.message_id].append(one)
    by_id = {row.id: row for row in rows}
    wanted: dict[str, None] = {}
    for each in ids:
        its = had.get(each, ())
        # one without any delivery is on its way to whoever listens at a broker
        is_on_its_way = by_id[each].status == MessageStatus.PENDING and each not in routed
        is_there = any(x.seq > mark or x.status in OPEN for x in its)
        # what was sent in place of one goes to those alone at whom that one failed
        origin = origins.get(each)
        is_repair = not its and (origin in had or origin in wanted)
        if not (is_on_its_way or is_there or is_repair):
            wanted[each] = None
    return list(wanted)


def replay(tx: Transaction, subscription_id: int, ids: Sequence[str], mark: int) -> list[Delivery]:
    """Add a delivery of each of these messages that a subscription still lacks, in their order.

    :raises SubscriptionNotFoundError: when it was retired meanwhile.
    """
    # until this is committed nobody retires it, and discards what it has
    its = consumers.find(tx.connection, subscription_id, locks=True)
    lock(tx, ids)
    wanted = lacking(tx.connection, subscription_id, ids, mark)
    if not wanted:
        return []
    envelopes = envelopes_of(tx, wanted)
    totals.route(tx, its.queue, wanted)
    rows = [_row(tx, subscription_id, envelopes[each]) for each in wanted]
    tx.connection.execute(insert(deliveries), rows)
    added = d.subscription_id == subscription_id, d.message_id.in_(wanted)
    newest_of = select(d.message_id, func.max(d.seq).label("seq")).where(*added)
    seqs = {x.message_id: x.seq for x in tx.connection.execute(newest_of.group_by(d.message_id))}
    refresh(tx, wanted)
    return [
        Delivery(
            seqs[each],
            subscription_id,
            envelopes[each],
            delay=seconds_until(tx, envelopes[each].scheduled_at),
            token=1,
        )
        for each in wanted
    ]


def _row(tx: Transaction, subscription_id: int, envelope: Envelope) -> dict[str, Any]:
    is_later = seconds_until(tx, envelope.scheduled_at) > 0
    return {
        "message_id": envelope.id,
        "subscription_id": subscription_id,
        "priority_rank": RANK,
        "available_at": envelope.scheduled_at if is_later else None,
        # it waits since now, and not since its message was stored
        "processed_at": tx.now,
        # as if it had been handed out before: what a broker sends to whoever listens
        # would reach others, too
        "lease_token": 1,
    }


def _origin(row: Any) -> str | None:
    return json.loads(row.metadata or "{}").get(OWN_METADATA, {}).get(ORIGIN)


def _next(queue: str, stretch: Stretch, after: Place | None, limit: int) -> Any:
    """Select what comes next of a queue: in one statement, for messages change their status."""
    place = max(after or Place(FIRST, ""), Place(stretch.since or FIRST, ""))
    until = stretch.until or LAST.created_at
    branches = []
    for status in MessageStatus:
        its = (
            select(m.id, m.created_at, m.message_type)
            .where(
                m.queue_name == queue,
                m.status == status,
                # spelled so that the index is entered at the right time
                m.created_at >= place.created_at,
                m.created_at < until,
                or_(m.created_at > place.created_at, m.id > literal(place.id)),
            )
            .order_by(m.created_at, m.id)
            .limit(limit)
            .subquery()
        )
        branches.append(select(its))
    merged = union_all(*branches).subquery()
    return select(merged).order_by(merged.c.created_at, merged.c.id).limit(limit)
