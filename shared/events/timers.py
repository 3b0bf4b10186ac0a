"""What queue_admin does now and then, in native threads: of several processes, one does it."""

from __future__ import annotations

import logging
from typing import Any

from nameko.extensions import DependencyProvider
from sqlalchemy.exc import SQLAlchemyError

from shared.contracts.alert import SOURCE
from shared.errors import QueueError
from shared.events import alerts
from shared.events.alerts import Alerts, alert_queue
from shared.events.client import QueueClient
from shared.events.direct import DirectClient
from shared.events.operations import LogReader
from shared.events.retention import Retention, prune_when_due
from shared.native import Mailbox, Thread
from shared.settings import Settings, refuse_start

_log = logging.getLogger(__name__)

FINISH_SECONDS = 3.0
"""How long a stop waits for what is being done."""


RETENTION_LOOK_SECONDS = 5.0
"""How often it is seen whether it is time to remove what is old, which is done once an hour."""


class TimerThread:
    """Does something every so many seconds, with a client and connections of its own.

    :param seconds: 0 means never.
    """

    def __init__(self, name: str, settings: Settings, seconds: float, once: Any) -> None:
        self._seconds = seconds
        self._once = once
        self._name = name
        self.is_stopping = False
        if seconds:
            self._client = DirectClient(settings)
            self._mailbox = Mailbox()
            self._thread = Thread(self._run, f"queue-{name}")

    def start(self) -> None:
        """Begin, with a wait."""
        if self._seconds:
            self._mailbox.open()
            self._thread.start()

    def stop(self) -> None:
        """End, after what is being done, if that does not take long."""
        self.is_stopping = True
        if self._seconds:
            self._mailbox.send(None)
            if self._thread.join(FINISH_SECONDS):
                self._mailbox.close()
            self._seconds = 0.0

    def say(self, function: Any, *args: Any) -> None:
        """Thread: have something called on the hub."""
        self._mailbox.answer(function, *args)

    def _run(self) -> None:
        inbox = self._mailbox.inbox
        inbox.wait(self._seconds)
        while not inbox.take():
            try:
                self._once(self._client)
            except (QueueError, SQLAlchemyError) as exc:
                self.say(_log.warning, "%s put off: %s", self._name, exc)
            # who keeps the log says what its servers are like
            self._client.notices.clear()
            inbox.wait(self._seconds)
        self._client.close()


class AlertTimer(DependencyProvider, Alerts):
    """Injects :class:`Alerts`, and looks every ``QUEUE_ALERT_SECONDS`` for what is too much."""

    client = QueueClient()
    reader = LogReader()

    def setup(self) -> None:
        settings = self.client.settings
        queue = alert_queue(settings)
        if settings.source_of(queue) != SOURCE:
            refuse_start(
                f"QUEUE_SOURCES: {SOURCE} and {settings.source_of(queue)} would share the queue "
                f"{queue}; must give each source a queue of its own"
            )
        every = settings.alerting.every if settings.log else 0.0
        self._timer = TimerThread("alerts", settings, every, self._look)

    def start(self) -> None:
        self._timer.start()

    def stop(self) -> None:
        self._timer.stop()

    def get_dependency(self, _worker_ctx: Any) -> AlertTimer:
        return self

    def _look(self, client: DirectClient) -> None:
        for news in alerts.look(client, client):
            self._timer.say(alerts.say, news)


class RetentionTimer(DependencyProvider, Retention):
    """Injects :class:`Retention`, and removes what is old enough, once an hour."""

    client = QueueClient()
    reader = LogReader()

    def setup(self) -> None:
        settings = self.client.settings
        every = RETENTION_LOOK_SECONDS if settings.log else 0.0
        self._timer = TimerThread("retention", settings, every, self._look)

    def start(self) -> None:
        self._timer.start()

    def stop(self) -> None:
        self._timer.stop()

    def get_dependency(self, _worker_ctx: Any) -> RetentionTimer:
        return self

    def _look(self, client: DirectClient) -> None:
        done = prune_when_due(client, client, SOURCE, lambda _: not self._timer.is_stopping)
        if done and done.messages:
            said = "removed %s messages with %s deliveries that had ended long ago"
            self._timer.say(_log.info, said, done.messages, done.deliveries)
