"""Alerts: looked at and set from a service or from the command line; and one look at the queues."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection

from shared.contracts.alert import ALERT, SOURCE
from shared.database import Transaction, utc_now
from shared.errors import QueueNotKnownError
from shared.events.dispatcher import make_envelope
from shared.events.operations import LogClient, Reader
from shared.settings import Settings
from shared.store import alerts, log, measures, timers
from shared.store.alerts import AlertStatus, News, Thresholds
from shared.store.measures import Measures, Rule
from shared.types import Delivery, Priority

_log = logging.getLogger(__name__)

TIMER = "alerts"

MAX_RETRIES = 20
"""Retries of what tells of an alert: a mail server may be away for a while."""


class Alerts:
    """Shows alerts and their thresholds, and sets these.

    ``actor`` says who does it, for the audit log.
    """

    client: LogClient
    reader: Reader

    def alerts(self) -> dict[str, Any]:
        """Return the episodes that go on, and the newest of those that are over."""
        return self.reader.read(alerts.list_alerts)

    def thresholds(self) -> dict[str, Any]:
        """Return the usual thresholds, and those of each queue."""
        queues, own = self.reader.read(_queues_and_own)
        usual = alerts.usual(self.client.settings.alerting)
        watched = [each for each in queues if each != alert_queue(self.client.settings)]
        return {
            "usual": _named(usual),
            "queues": [
                {"queueName": each, **_named({**usual, **own.get(each, {})}),
                 "own": [rule.value for rule in own.get(each, {})]}
                for each in watched
            ],
        }  # fmt: skip

    def set_thresholds(self, actor: str, queue: str, own: Thresholds) -> dict[str, Any]:
        """Have a queue have these thresholds, and the usual ones for what is not among them.

        :param own: 0 means never.
        :raises QueueNotKnownError: when nothing is known of the queue, or it is that of alerts.
        """

        def step(tx: Transaction) -> tuple[None, list[Delivery]]:
            alerts.set_thresholds(tx, actor, queue, own)
            return None, []

        known = {each["queueName"] for each in self.thresholds()["queues"]}
        if queue not in known:
            raise QueueNotKnownError(f"no queue {queue} that is watched")
        self.client.call(step)
        return next(x for x in self.thresholds()["queues"] if x["queueName"] == queue)


def alert_queue(settings: Settings) -> str:
    """Return the queue of the alerts. There are none of it.

    What could not be told would only be told of by what cannot be told either.
    """
    return settings.queue_of(SOURCE)


def _named(thresholds: Thresholds) -> dict[str, float]:
    names = {
        Rule.FAILURE_PERCENT: "failurePercent",
        Rule.OLDEST_SECONDS: "oldestSeconds",
        Rule.DEAD_LETTERS: "deadLetters",
        Rule.SILENT_CONSUMERS: "silentConsumers",
        Rule.FAILING_SCHEDULES: "failingSchedules",
    }
    return {name: alerts.as_given(rule, thresholds[rule]) for rule, name in names.items()}


def _queues_and_own(connection: Connection) -> tuple[list[str], dict[str, dict[Rule, float]]]:
    return measures.queues_of(connection), alerts.own_thresholds(connection)


# --- one look


def look(client: LogClient, reader: Reader) -> list[News]:
    """Look at all queues, and dispatch what is to be told; return that.

    Of several processes that do so at once, one does it.
    """
    measured, thresholds, is_quiet = reader.read(partial(_measured, settings=client.settings))
    # most looks find nothing, and write nothing
    if is_quiet:
        return []
    found: list[News] = client.call(partial(_step, client.settings, measured, thresholds))
    return found


def _measured(
    connection: Connection, settings: Settings
) -> tuple[Measures, Mapping[str, Thresholds], bool]:
    found = dict(measures.measure(connection, utc_now(connection)))
    found.pop(alert_queue(settings), None)
    usual, own = alerts.usual(settings.alerting), alerts.own_thresholds(connection)
    thresholds = {queue: {**usual, **own.get(queue, {})} for queue in found}
    are_over = [
        alerts.is_over(measure, thresholds[queue][rule])
        for queue, its in found.items()
        for rule, measure in its.items()
    ]
    return found, thresholds, not any(are_over) and not alerts.current(connection)


def _step(
    settings: Settings,
    measured: Measures,
    thresholds: Mapping[str, Thresholds],
    tx: Transaction,
) -> tuple[list[News], list[Delivery]]:
    if not timers.take(tx, TIMER, settings.alerting.every):
        return [], []
    news = alerts.move(tx, measured, thresholds)
    new: list[Delivery] = []
    for each in news:
        envelope = make_envelope(
            settings,
            alert_queue(settings),
            ALERT,
            each.payload(),
            priority=Priority.URGENT,
            max_retries=MAX_RETRIES,
        )
        new += log.append(tx, [envelope], settings.retries.limit)
        alerts.told(tx, each, envelope.id)
    return news, new


def say(news: News) -> None:
    """Write a line of it to the log of the service."""
    level = logging.WARNING if news.status is AlertStatus.FIRING else logging.INFO
    _log.log(level, "alert %s %s: %s", news.alert_id, news.status, news.summary)
