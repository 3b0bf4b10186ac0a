"""How many messages a queue has, without counting them all each time.

Up to a mark, a time that lies a little back, they were counted once; what came since is counted
when somebody asks. A service moves the marks on in small steps. Whoever removes messages from
before a mark, or gives one of them its first delivery, takes that off the total in the same
transaction. Once a day all is counted anew, beside what is known, and then takes its place: so that
finds also what was stored before the mark belatedly, in a transaction that took longer than the
mark lies back, or by a clock set back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    delete,
    exists,
    false,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from shared.database import Transaction
from shared.lifecycle import MessageStatus
from shared.store.listing import FIRST, LAST, queues_with_messages
from shared.tables import deliveries, messages, totals

LAG_SECONDS = 60.0
"""How far marks lie back, at least: longer than a transaction takes that stores messages."""

STEP = 1000
"""Messages of one status by which a mark is moved on; to count fewer is no work."""

AGAIN_SECONDS = 86_400.0
"""After how long all is counted anew."""

d = deliveries.c
m = messages.c
t = totals.c

_IS_ALONE = ~exists().where(d.message_id == m.id)


class Total(NamedTuple):
    """What was counted of a queue.

    :param counted_to: messages that were stored before this time are.
    :param messages: how many these are.
    :param unrouted: how many of them have no delivery; they all are completed.
    """

    counted_to: datetime = FIRST
    messages: int = 0
    unrouted: int = 0


def of(connection: Connection, queue: str) -> Total:
    """Return what was counted of a queue; of most nothing is."""
    row = connection.execute(_rows(queue).where(t.is_anew == false())).first()
    return Total(row.counted_to, row.messages, row.unrouted) if row else Total()


def count_alone(
    connection: Connection, queue: str, since: datetime, before: datetime = LAST.created_at
) -> int:
    """Return how many completed messages have no delivery."""
    return _count(connection, *_stored(queue, [MessageStatus.COMPLETED], since, before), _IS_ALONE)


def queues_due(connection: Connection, now: datetime) -> list[str]:
    """Return the queues for which :func:`advance` would have something to do."""
    # also those of which all was removed: what was miscounted of them would else stay
    counted = connection.execute(select(t.queue_name).distinct()).scalars()
    names = sorted({*counted, *queues_with_messages(connection)})
    return [each for each in names if due(connection, each, now)]


def due(connection: Connection, queue: str, now: datetime) -> bool:
    """Say whether :func:`advance` would have something to do."""
    rows = connection.execute(_rows(queue)).all()
    if len(rows) > 1 or any(_is_old(row, now) for row in rows):
        return True
    mark = rows[0].counted_to if rows else FIRST
    return _end(connection, queue, mark, now) is not None


def advance(tx: Transaction, queue: str) -> None:
    """Count on by a step, if there is enough for one."""
    known, *anew = _lock(tx, queue)
    if not anew and _is_old(known, tx.now):
        _add(tx, queue, is_anew=True)
        known, *anew = _lock(tx, queue)
    row = anew[0] if anew else known
    end = _end(tx.connection, queue, row.counted_to, tx.now)
    if end is not None:
        # in one statement: between two, what comes to another status would count twice, or never
        count = _count(tx.connection, *_stored(queue, [*MessageStatus], row.counted_to, end))
        alone = count_alone(tx.connection, queue, row.counted_to, end)
        more = {"messages": t.messages + count, "unrouted": t.unrouted + alone}
        _change(tx, row, counted_to=end, **more)
    if anew and (end is None or end >= known.counted_to):
        tx.connection.execute(delete(totals).where(*_is(known)))
        _change(tx, row, is_anew=False)


def remove(tx: Transaction, queue: str, ids: Collection[str], alone: Collection[str]) -> None:
    """Take off messages that are about to be removed.

    :param alone: those of them that have no delivery.
    """

    def counted(is_counted: ColumnElement[bool]) -> tuple[int, int]:
        return (
            _count(tx.connection, m.id.in_(ids), is_counted),
            _count(tx.connection, m.id.in_(alone), is_counted) if alone else 0,
        )

    _take_off(tx, queue, counted)


def route(tx: Transaction, queue: str, ids: Collection[str]) -> None:
    """Take off what is unrouted of messages that are about to get a delivery."""
    _take_off(
        tx,
        queue,
        lambda is_counted: (0, _count(tx.connection, m.id.in_(ids), is_counted, _IS_ALONE)),
    )


def _take_off(
    tx: Transaction, queue: str, counted: Callable[[ColumnElement[bool]], tuple[int, int]]
) -> None:
    # until this is committed the marks stay where they are
    for row in _lock(tx, queue):
        its, alone = counted(m.created_at < row.counted_to)
        _change(tx, row, messages=t.messages - its, unrouted=t.unrouted - alone)


def _lock(tx: Transaction, queue: str) -> list[Any]:
    """Return what is known of a queue, and what is counted anew, which nobody changes meanwhile.

    What is not there cannot be locked: who begins to count would not wait for who removes.
    """
    its = _rows(queue).with_for_update()
    rows = list(tx.connection.execute(its))
    if rows:
        return rows
    # another one may make it just now
    with contextlib.suppress(IntegrityError), tx.connection.begin_nested():
        _add(tx, queue, is_anew=False)
    return list(tx.connection.execute(its))


def _add(tx: Transaction, queue: str, *, is_anew: bool) -> None:
    new = {"counted_to": FIRST, "messages": 0, "unrouted": 0, "begun_at": tx.now}
    tx.connection.execute(insert(totals).values(queue_name=queue, is_anew=is_anew, **new))


def _change(tx: Transaction, row: Any, **values: Any) -> None:
    tx.connection.execute(update(totals).where(*_is(row)).values(**values))


def _is(row: Any) -> tuple[ColumnElement[bool], ...]:
    return t.queue_name == row.queue_name, t.is_anew == row.is_anew


def _is_old(row: Any, now: datetime) -> bool:
    return bool((now - row.begun_at).total_seconds() >= AGAIN_SECONDS)


def _end(connection: Connection, queue: str, mark: datetime, now: datetime) -> datetime | None:
    """Return where the next step ends; ``None`` when there is not enough for one."""
    # messages are stored by the second: a step ends with one
    limit = (now - timedelta(seconds=LAG_SECONDS)).replace(microsecond=0)
    lasts = [
        connection.execute(
            select(m.created_at)
            .where(*_stored(queue, [status], mark, limit))
            .order_by(m.created_at)
            .limit(1)
            .offset(STEP - 1)
        ).scalar()
        for status in MessageStatus
    ]
    last = min((each for each in lasts if each is not None), default=None)
    if last is None:
        return None
    end: datetime = last + timedelta(seconds=1)
    # what is on its way to whoever listens at a broker may come to be unrouted, or not
    first = connection.execute(
        select(m.created_at)
        .where(*_stored(queue, [MessageStatus.PENDING], mark, end), _IS_ALONE)
        .order_by(m.created_at)
        .limit(1)
    ).scalar()
    end = end if first is None else first
    return end if end > mark else None


def _rows(queue: str) -> Select[Any]:
    return select(totals).where(t.queue_name == queue).order_by(t.is_anew)


def _stored(
    queue: str, statuses: Collection[MessageStatus], since: datetime, before: datetime
) -> tuple[ColumnElement[bool], ...]:
    its = m.queue_name == queue, m.status.in_(statuses)
    return *its, m.created_at >= since, m.created_at < before


def _count(connection: Connection, *conditions: ColumnElement[bool]) -> int:
    counted = select(func.count()).select_from(messages).where(*conditions)
    return connection.execute(counted).scalar_one()
