"""What the message log holds, in numbers that metrics are made of. Nothing here changes anything.

A scrape comes every few seconds and may find millions of rows. So all is counted in a few
statements that indices answer: completed deliveries are not counted; completed messages are once,
and kept; and how long something waits is asked of the first delivery by number alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, and_, func, literal_column, or_, select, true

from shared.database import seconds_between, utc_now
from shared.lifecycle import WAITING, DeliveryStatus
from shared.store import limits, totals
from shared.store.listing import queues_with_messages
from shared.store.stats import message_counts
from shared.store.subscriptions import SILENT_AFTER_SECONDS
from shared.tables import (
    SUBSCRIPTION_COLUMNS,
    attempts,
    deliveries,
    messages,
    ramps,
    schedules,
    subscription_of,
    subscriptions,
)
from shared.types import Subscription

d = deliveries.c
m = messages.c
s = subscriptions.c

_IS_OPEN = d.status != literal_column("'completed'")
"""Written out: what is completed is most, and SQLite's indices are of the others alone."""

_OPEN = [status for status in DeliveryStatus if status != DeliveryStatus.COMPLETED]
"""Named, they let MariaDB go into its index for each, and past what is completed."""


@dataclass(frozen=True, slots=True)
class SubscriptionGauges:
    """One subscription.

    :param deliveries: how many there are that are not completed, by status.
    :param waiting: how many of them are due and in nobody's hands.
    :param oldest_waiting: seconds for which the oldest of these is due.
    :param is_live: whether a consumer signed for it lately.
    :param is_limited: whether its limits let nothing more begin at this moment.
    """

    subscription: Subscription
    deliveries: Mapping[str, int]
    waiting: int
    oldest_waiting: float
    is_live: bool
    is_paused: bool
    is_limited: bool = False

    @property
    def held_back(self) -> int:
        """How many wait for nothing but a limit."""
        return self.waiting if self.is_limited and not self.is_paused else 0

    @property
    def is_silent(self) -> bool:
        """Whether work is due, and nobody there who would do it."""
        return self.waiting > 0 and not self.is_live and not self.is_paused


@dataclass(frozen=True, slots=True)
class ScheduleGauges:
    """One schedule.

    :param is_failing: whether its last occurrence could not be dispatched; not while it is paused.
    """

    name: str
    queue: str
    event_type: str
    is_failing: bool


@dataclass(frozen=True, slots=True)
class LogGauges:
    """The message log.

    :param messages: how many there are, by queue and status.
    :param relay_lag: by queue, the seconds for which the oldest delivery waits to be
        published.
    :param ramps: how many there are, by status.
    """

    messages: Mapping[tuple[str, str], int]
    subscriptions: Sequence[SubscriptionGauges]
    relay_lag: Mapping[str, float]
    schedules: Sequence[ScheduleGauges] = field(default_factory=list)
    ramps: Mapping[str, int] = field(default_factory=dict)


class DrainGauges(NamedTuple):
    """The provider that is moved away from, where one is.

    :param left: how many deliveries it still has; ``None`` when it does not answer.
    """

    provider: str
    left: int | None


def log_gauges(connection: Connection, joins_log: bool) -> LogGauges:
    """Count what the log holds.

    :param joins_log: the provider works in the log's own tables: what is stored is published.
    """
    now = utc_now(connection)
    found = subscription_gauges(connection, now)
    lag = dict.fromkeys((each.subscription.queue for each in found), 0.0)
    if not joins_log:
        lag |= _relay_lag(connection, [each.subscription.id for each in found], now)
    return LogGauges(
        _messages(connection), found, lag, schedule_gauges(connection), _ramps(connection)
    )


def subscription_gauges(connection: Connection, now: datetime) -> list[SubscriptionGauges]:
    """Count what each subscription has that gets events."""
    rows = connection.execute(_subscriptions(connection, now)).all()
    ids = [row.id for row in rows]
    by_status = _by_status(connection, ids)
    waiting = _waiting(connection, ids, now)
    limited = limits.usages(connection, ids, now)
    reached = {each for each, its in limited.items() if its.is_full or its.is_spent}
    return [
        SubscriptionGauges(
            subscription_of(row),
            by_status.get(row.id, {}),
            *waiting.get(row.id, (0, 0.0)),
            is_live=row.silence is not None and row.silence <= SILENT_AFTER_SECONDS,
            is_paused=row.paused_at is not None,
            is_limited=row.id in reached,
        )
        for row in rows
    ]


def _subscriptions(connection: Connection, now: datetime) -> Select[Any]:
    silence = seconds_between(connection, s.seen_at, now).label("silence")
    columns = (*SUBSCRIPTION_COLUMNS, s.paused_at, silence)
    return select(*columns).where(s.retired_at.is_(None)).order_by(s.id)


def schedule_gauges(connection: Connection) -> list[ScheduleGauges]:
    """Tell of each schedule, by name, whether it fails."""
    x = schedules.c
    columns = x.name, x.queue_name, x.message_type, x.enabled, x.error_at
    return [
        ScheduleGauges(name, queue, event_type, bool(enabled) and error_at is not None)
        for name, queue, event_type, enabled, error_at in connection.execute(
            select(*columns).order_by(x.name)
        )
    ]


def _ramps(connection: Connection) -> dict[str, int]:
    counted = select(ramps.c.status, func.count().label("number")).group_by(ramps.c.status)
    return {row.status: row.number for row in connection.execute(counted)}


def _messages(connection: Connection) -> dict[tuple[str, str], int]:
    return {
        (queue, status): count
        for queue in queues_with_messages(connection)
        for status, count in message_counts(connection, queue, totals.of(connection, queue)).items()
        if count
    }


def _by_status(connection: Connection, ids: Sequence[int]) -> dict[int, dict[str, int]]:
    rows = connection.execute(
        select(d.subscription_id, d.status, func.count())
        .where(d.subscription_id.in_(ids), _IS_OPEN, d.status.in_(_OPEN))
        .group_by(d.subscription_id, d.status)
    )
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for subscription_id, status, count in rows:
        found[subscription_id][status] = count
    return found


def _waiting(
    connection: Connection, ids: Sequence[int], now: datetime
) -> dict[int, tuple[int, float]]:
    """Return how many deliveries of a subscription are due, and for how long the first is."""
    is_due = or_(d.available_at.is_(None), d.available_at <= now)
    counted = (
        select(func.min(d.seq).label("seq"), func.count().label("count"))
        .where(d.subscription_id.in_(ids), _IS_OPEN, d.status.in_(WAITING), is_due)
        # what waits for the first time, and what was tried before
        .group_by(d.subscription_id, d.status)
        .subquery()
    )
    last_end = (
        select(func.max(func.coalesce(attempts.c.retry_at, attempts.c.ended_at)))
        .where(attempts.c.delivery_seq == d.seq)
        .scalar_subquery()
    )
    # what is replayed ended before, and waits since then
    due_at = func.coalesce(d.available_at, last_end, d.processed_at, m.scheduled_at, m.created_at)
    rows = connection.execute(
        select(d.subscription_id, counted.c.count, seconds_between(connection, due_at, now))
        .select_from(counted)
        .join(deliveries, d.seq == counted.c.seq)
        .join(messages, m.id == d.message_id)
    )
    found: dict[int, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for subscription_id, count, age in rows:
        before, oldest = found[subscription_id]
        found[subscription_id] = (before + count, max(oldest, float(age)))
    return dict(found)


def _relay_lag(connection: Connection, ids: Sequence[int], now: datetime) -> dict[str, float]:
    """Return for how long the oldest delivery of a queue was stored and not published."""
    is_unpublished = and_(
        d.subscription_id.in_(ids),
        _IS_OPEN,
        or_(d.ready == true(), d.lease_expires_at.is_not(None)),
        d.status.in_(WAITING),
    )
    first = (
        select(func.min(d.seq).label("seq"))
        .where(is_unpublished)
        .group_by(d.subscription_id)
        .subquery()
    )
    rows = connection.execute(
        select(
            m.queue_name,
            seconds_between(connection, func.coalesce(d.processed_at, m.created_at), now),
        )
        .select_from(first)
        .join(deliveries, d.seq == first.c.seq)
        .join(messages, m.id == d.message_id)
    )
    found: dict[str, float] = {}
    for queue, age in rows:
        found[queue] = max(found.get(queue, 0.0), float(age))
    return found
