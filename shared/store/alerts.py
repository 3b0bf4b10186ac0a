"""Alerts: episodes in which a queue has too much of something.

An episode begins when a value reached its threshold at two looks in a row, and is over when it
was well below that at three in a row. Each look is one transaction that first takes the timer:
whoever comes second finds that it is not due. What is told of an episode is dispatched in the
same transaction, so it is told once, whoever dies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from shared.database import Transaction
from shared.settings import Alerting
from shared.store import trail
from shared.store.measures import COUNTS, Measure, Measures, Rule
from shared.store.queries import iso
from shared.store.trail import Deed
from shared.tables import alert_thresholds, alerts

a = alerts.c
t = alert_thresholds.c

OPEN_LOOKS = 2
"""Looks in a row at which a value reached its threshold, until somebody is told."""

END_LOOKS = 3
"""Looks in a row at which it was well below, until it is over."""

WELL_BELOW = 0.8
"""Of the threshold: between this and all of it an episode neither begins nor ends."""

MOST_LISTED = 50
"""Past episodes of one answer, the newest."""

MOST_NAMED = 20
"""Subscribers that an alert names."""

Thresholds = Mapping[Rule, float]


class AlertStatus(StrEnum):
    """How an episode is."""

    SUSPECTED = "suspected"
    """The value reached the threshold once. Nobody was told."""
    FIRING = "firing"
    RESOLVED = "resolved"


class News(NamedTuple):
    """What is to be told of an episode.

    :param is_watched: whether it is looked after any more: somebody may have set 0 as threshold.
    """

    alert_id: int
    queue: str
    rule: Rule
    status: AlertStatus
    value: float | None
    threshold: float
    began_at: str
    subscribers: Sequence[str]
    ended_at: str | None = None
    is_watched: bool = True

    @property
    def summary(self) -> str:
        """One sentence of it, as it is now."""
        if not self.is_watched:
            return f"No longer watched: {_WATCHED[self.rule].format(queue=self.queue)}."
        if self.status is AlertStatus.RESOLVED:
            return f"Over: {_ABOUT[self.rule].format(queue=self.queue)}."
        return self._sentence(_NOW)

    @property
    def worst(self) -> str:
        """One sentence of the worst that there was, however it is by now."""
        return self._sentence(_WORST)

    def _sentence(self, sentences: Mapping[Rule, str]) -> str:
        names = f" ({', '.join(self.subscribers)})" if self.subscribers else ""
        number = _short(self.value or 0.0)
        many = "" if number == "1" else "s"
        said = sentences[self.rule].format(value=number, queue=self.queue, s=many)
        return f"{said}{names}; {self.threshold:.10g} is the threshold."

    def payload(self) -> dict[str, Any]:
        """Return the payload of the event that tells of it."""
        return {
            "alert_id": self.alert_id,
            "status": self.status.value,
            "queue_name": self.queue,
            "rule": self.rule.value,
            "value": self.value,
            "threshold": self.threshold,
            "began_at": self.began_at,
            "ended_at": self.ended_at,
            "subscribers": list(self.subscribers),
            "summary": self.summary,
        }


_NOW = {
    Rule.FAILURE_PERCENT: "{value} % of the newest messages of {queue} fail",
    Rule.OLDEST_SECONDS: "The oldest work of {queue} is due for {value} s",
    Rule.DEAD_LETTERS: "{queue} has {value} dead letter{s}",
    Rule.SILENT_CONSUMERS: "Work of {queue} waits, and nobody consumes {value} subscription{s}",
    Rule.FAILING_SCHEDULES: "{value} schedule{s} of {queue} could not dispatch the last time",
}

_WORST = {
    Rule.FAILURE_PERCENT: "Up to {value} % of the newest messages of {queue} failed",
    Rule.OLDEST_SECONDS: "The oldest work of {queue} was due for up to {value} s",
    Rule.DEAD_LETTERS: "{queue} had up to {value} dead letter{s}",
    Rule.SILENT_CONSUMERS: "Work of {queue} waited, and nobody consumed up to {value} "
    "subscription{s}",
    Rule.FAILING_SCHEDULES: "Up to {value} schedule{s} of {queue} could not dispatch",
}

_WATCHED = {
    Rule.FAILURE_PERCENT: "how many messages of {queue} fail",
    Rule.OLDEST_SECONDS: "how long work of {queue} waits",
    Rule.DEAD_LETTERS: "how many dead letters {queue} has",
    Rule.SILENT_CONSUMERS: "whether anybody consumes subscriptions of {queue}",
    Rule.FAILING_SCHEDULES: "whether schedules of {queue} can dispatch",
}

_ABOUT = {
    Rule.FAILURE_PERCENT: "too many messages of {queue} failed",
    Rule.OLDEST_SECONDS: "work of {queue} waited for too long",
    Rule.DEAD_LETTERS: "{queue} had too many dead letters",
    Rule.SILENT_CONSUMERS: "nobody consumed subscriptions of {queue}",
    Rule.FAILING_SCHEDULES: "schedules of {queue} could not dispatch",
}


def as_given(rule: Rule, threshold: float) -> float:
    """Return a threshold as it may be given: of a count, the tables make a float."""
    return int(threshold) if rule in COUNTS else threshold


def _short(value: float) -> str:
    return f"{round(value, 1):.10g}"


# --- thresholds


def usual(alerting: Alerting) -> Thresholds:
    """Return the thresholds of a queue that has none of its own; 0 means never."""
    return {
        Rule.FAILURE_PERCENT: alerting.failures,
        Rule.OLDEST_SECONDS: alerting.oldest,
        Rule.DEAD_LETTERS: alerting.dead,
        Rule.SILENT_CONSUMERS: alerting.silent,
        Rule.FAILING_SCHEDULES: alerting.schedules,
    }


def own_thresholds(connection: Connection) -> dict[str, dict[Rule, float]]:
    """Return what queues have of their own, by queue."""
    found: dict[str, dict[Rule, float]] = {}
    for row in connection.execute(select(alert_thresholds).order_by(t.queue_name, t.rule)):
        found.setdefault(row.queue_name, {})[Rule(row.rule)] = row.threshold
    return found


def set_thresholds(tx: Transaction, actor: str, queue: str, own: Thresholds) -> None:
    """Have a queue have these thresholds of its own, and no others."""
    tx.connection.execute(delete(alert_thresholds).where(t.queue_name == queue))
    rows = [{"queue_name": queue, "rule": rule, "threshold": x} for rule, x in own.items()]
    if rows:
        tx.connection.execute(insert(alert_thresholds), rows)
    detail = {rule.value: threshold for rule, threshold in own.items()}
    trail.note(tx, Deed(actor, "set thresholds", f"queue {queue}", detail))


# --- one look


def current(connection: Connection) -> list[Any]:
    """Return the episodes that are not over, and what may become one."""
    return list(connection.execute(select(alerts).where(a.current.is_not(None)).order_by(a.id)))


def is_over(measure: Measure, threshold: float) -> bool:
    """Say whether a value reached its threshold."""
    return threshold > 0 and measure.value is not None and measure.value >= threshold


def _is_well_below(measure: Measure, threshold: float) -> bool:
    return threshold <= 0 or measure.value is None or measure.value <= threshold * WELL_BELOW


def move(tx: Transaction, measures: Measures, thresholds: Mapping[str, Thresholds]) -> list[News]:
    """Move all episodes on by one look; return what is to be told.

    :param thresholds: of each queue that is measured.
    """
    rows = {(row.queue_name, Rule(row.rule)): row for row in current(tx.connection)}
    pairs = {(queue, rule) for queue in measures for rule in Rule}
    news = []
    for queue, rule in sorted(pairs | set(rows)):
        # of a queue that is gone there is nothing too much
        measure = measures.get(queue, {}).get(rule, Measure(None))
        threshold = thresholds.get(queue, {}).get(rule, 0.0)
        if told := _move(tx, rows.get((queue, rule)), queue, rule, measure, threshold):
            is_watched = threshold > 0 or queue not in thresholds
            news.append(told._replace(is_watched=is_watched))
    return news


def _move(
    tx: Transaction, row: Any, queue: str, rule: Rule, measure: Measure, threshold: float
) -> News | None:
    if row is None:
        if is_over(measure, threshold):
            _suspect(tx, queue, rule, measure, threshold)
        return None
    if row.status == AlertStatus.SUSPECTED:
        return _confirm(tx, row, measure, threshold)
    return _look_after(tx, row, measure, threshold)


def _suspect(tx: Transaction, queue: str, rule: Rule, measure: Measure, threshold: float) -> None:
    tx.connection.execute(
        insert(alerts).values(
            queue_name=queue,
            rule=rule,
            status=AlertStatus.SUSPECTED,
            current=f"{queue} {rule}",
            threshold=threshold,
            looks=1,
            began_at=tx.now,
            **_seen(measure),
        )
    )


def _confirm(tx: Transaction, row: Any, measure: Measure, threshold: float) -> News | None:
    if not is_over(measure, threshold):
        tx.connection.execute(delete(alerts).where(a.id == row.id))
        return None
    fires = row.looks + 1 >= OPEN_LOOKS
    status = AlertStatus.FIRING if fires else AlertStatus.SUSPECTED
    looks = 0 if fires else row.looks + 1
    _set(tx, row, status=status, looks=looks, threshold=threshold, **_seen(measure))
    return _news(row, status, measure, threshold) if fires else None


def _look_after(tx: Transaction, row: Any, measure: Measure, threshold: float) -> News | None:
    if not _is_well_below(measure, threshold):
        most = _seen(measure) if (measure.value or 0.0) >= (row.value or 0.0) else {}
        if row.looks or most:
            _set(tx, row, looks=0, **most)
        return None
    if row.looks + 1 < END_LOOKS:
        _set(tx, row, looks=row.looks + 1)
        return None
    status = AlertStatus.RESOLVED
    _set(tx, row, status=status, looks=0, current=None, ended_at=tx.now)
    return _news(row, status, measure, threshold)._replace(ended_at=iso(tx.now))


def _seen(measure: Measure) -> dict[str, Any]:
    names = list(measure.subscribers)[:MOST_NAMED]
    return {"value": measure.value, "detail": json.dumps(names) if names else None}


def _set(tx: Transaction, row: Any, **values: Any) -> None:
    tx.connection.execute(update(alerts).where(a.id == row.id).values(**values))


def _news(row: Any, status: AlertStatus, measure: Measure, threshold: float) -> News:
    return News(
        row.id,
        row.queue_name,
        Rule(row.rule),
        status,
        measure.value,
        threshold,
        str(iso(row.began_at)),
        list(measure.subscribers)[:MOST_NAMED],
    )


def told(tx: Transaction, news: News, message_id: str) -> None:
    """Note which message tells of it."""
    is_end = news.status is AlertStatus.RESOLVED
    values = {"end_message_id" if is_end else "message_id": message_id}
    tx.connection.execute(update(alerts).where(a.id == news.alert_id).values(**values))


# --- looking


def list_alerts(connection: Connection) -> dict[str, Any]:
    """Return the episodes that go on, and the newest of those that are over."""
    firing = [row for row in current(connection) if row.status == AlertStatus.FIRING]
    past = connection.execute(
        select(alerts)
        .where(a.status == AlertStatus.RESOLVED)
        .order_by(a.id.desc())
        .limit(MOST_LISTED)
    )
    return {"firing": [_shown(row) for row in firing], "resolved": [_shown(row) for row in past]}


def _shown(row: Any) -> dict[str, Any]:
    names = json.loads(row.detail) if row.detail else []
    rule, began_at = Rule(row.rule), str(iso(row.began_at))
    firing = AlertStatus.FIRING
    news = News(row.id, row.queue_name, rule, firing, row.value, row.threshold, began_at, names)
    return {
        "id": row.id,
        "queueName": row.queue_name,
        "rule": row.rule,
        "status": row.status,
        "value": row.value,
        "threshold": as_given(rule, row.threshold),
        "subscribers": names,
        "beganAt": began_at,
        "endedAt": iso(row.ended_at),
        "messageId": row.message_id,
        "endMessageId": row.end_message_id,
        "sentence": news.worst,
    }
