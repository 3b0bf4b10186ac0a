"""What alerts are about, measured for each queue. Nothing here changes anything.

It is asked every few seconds, of a log that may have millions of messages. So what is open is
counted, and of what was dispatched only the last minutes are, and no more messages of them than
a bounded number, by the index of queue, status and time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import Connection, func, literal, select

from shared.lifecycle import DeliveryStatus, MessageStatus
from shared.store.gauges import SubscriptionGauges, schedule_gauges, subscription_gauges
from shared.store.listing import queues
from shared.tables import messages, schedules

m = messages.c

WINDOW_SECONDS = 300.0
"""Of which messages the failures are counted: those stored in this time."""

MOST_COUNTED = 10_000
"""Messages of one status that are counted: of more, the newest."""

LEAST_COUNTED = 10
"""Of fewer messages there is no rate: one that failed alone would be all of them."""


class Rule(StrEnum):
    """What may be too much of a queue; the names are those of the settings."""

    FAILURE_PERCENT = "failure_percent"
    OLDEST_SECONDS = "oldest_seconds"
    DEAD_LETTERS = "dead_letters"
    SILENT_CONSUMERS = "silent_consumers"
    FAILING_SCHEDULES = "failing_schedules"


COUNTS = (Rule.DEAD_LETTERS, Rule.SILENT_CONSUMERS, Rule.FAILING_SCHEDULES)
"""Those of which there is a whole number."""


class Measure(NamedTuple):
    """How much of something there is.

    :param value: ``None`` where that cannot be said.
    :param subscribers: whom it is about; of schedules, their names.
    """

    value: float | None
    subscribers: Sequence[str] = ()


Measures = Mapping[str, Mapping[Rule, Measure]]
"""By queue and rule."""


def measure(connection: Connection, now: datetime) -> Measures:
    """Measure all queues that have a message, a subscription or a schedule."""
    by_queue: dict[str, list[SubscriptionGauges]] = defaultdict(list)
    for each in subscription_gauges(connection, now):
        by_queue[each.subscription.queue].append(each)
    failing: dict[str, list[str]] = defaultdict(list)
    for schedule in schedule_gauges(connection):
        failing[schedule.queue] += [schedule.name] if schedule.is_failing else []
    return {
        queue: {
            Rule.FAILURE_PERCENT: Measure(failure_percent(connection, queue, now)),
            Rule.OLDEST_SECONDS: _oldest(by_queue[queue]),
            Rule.DEAD_LETTERS: _dead(by_queue[queue]),
            Rule.SILENT_CONSUMERS: _silent(by_queue[queue]),
            Rule.FAILING_SCHEDULES: Measure(len(failing[queue]), failing[queue]),
        }
        for queue in queues_of(connection)
    }


def queues_of(connection: Connection) -> list[str]:
    """Return the queues that are measured."""
    scheduled = connection.execute(select(schedules.c.queue_name).distinct()).scalars()
    return sorted({*queues(connection), *scheduled})


def _oldest(its: Sequence[SubscriptionGauges]) -> Measure:
    # somebody wants it so while a subscription is paused
    waiting = [each for each in its if each.waiting and not each.is_paused]
    late = max(waiting, key=lambda each: each.oldest_waiting, default=None)
    if late is None:
        return Measure(0.0)
    return Measure(late.oldest_waiting, [late.subscription.subscriber])


def _dead(its: Sequence[SubscriptionGauges]) -> Measure:
    dead = {x.subscription.subscriber: x.deliveries.get(DeliveryStatus.FAILED, 0) for x in its}
    return Measure(sum(dead.values()), sorted(name for name, count in dead.items() if count))


def _silent(its: Sequence[SubscriptionGauges]) -> Measure:
    silent = sorted(each.subscription.subscriber for each in its if each.is_silent)
    return Measure(len(silent), silent)


def failure_percent(connection: Connection, queue: str, now: datetime) -> float | None:
    """Return how many percent of the newest messages have failed, or wait to be tried again.

    Of those that came to anything, in the last minutes; of very many, the newest.
    """
    since = now - timedelta(seconds=WINDOW_SECONDS)
    since = _begin_of_newest(connection, queue, since) or since
    bad = sum(
        _count(connection, queue, status, since)
        for status in (MessageStatus.FAILED, MessageStatus.RETRY)
    )
    all_ = bad + _count(connection, queue, MessageStatus.COMPLETED, since)
    return 100.0 * bad / all_ if all_ >= LEAST_COUNTED else None


def _begin_of_newest(connection: Connection, queue: str, since: datetime) -> datetime | None:
    """Return when the oldest of so many completed messages was stored, if there are so many."""
    return connection.execute(
        select(m.created_at)
        .where(m.queue_name == queue, m.status == MessageStatus.COMPLETED, m.created_at >= since)
        .order_by(m.created_at.desc())
        .limit(1)
        .offset(MOST_COUNTED - 1)
    ).scalar()


def _count(connection: Connection, queue: str, status: MessageStatus, since: datetime) -> int:
    its = m.queue_name == queue, m.status == status, m.created_at >= since
    some = select(literal(1)).where(*its).limit(MOST_COUNTED).subquery()
    return int(connection.execute(select(func.count()).select_from(some)).scalar_one())
