"""Dependencies for services that look after the queue, or publish into any of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import eventlet
from nameko.extensions import DependencyProvider, SharedExtension
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from shared.database import Transaction, database_url, make_reader, utc_now
from shared.errors import ProviderError, QueueError, StoreUnavailableError
from shared.events.audit import Audit
from shared.events.client import QueueClient
from shared.events.dispatcher import make_envelope
from shared.events.draining import route_of
from shared.native import Mailbox, Thread
from shared.observe.counts import AuditCounts
from shared.observe.traces import Dispatching
from shared.providers import QueueProvider
from shared.settings import Settings, refuse_start, settings_or_exit
from shared.store import moving, queries, repair, stats
from shared.store.gauges import DrainGauges, LogGauges, log_gauges
from shared.store.log import Handover
from shared.types import Dedupe, Delivery, Envelope, Subscription

_log = logging.getLogger(__name__)

PUT_OFF_SECONDS = 1.0
"""How long it is waited for a database that does not answer."""

AGAIN_SECONDS = 5.0
"""How long it is waited after something failed that nobody expected."""

FINISH_SECONDS = 3.0
"""How long a stop waits for an audit that is being made."""


class LogReader(SharedExtension):
    """One engine a container for reading the message log, on the hub."""

    _engine: Engine

    def setup(self) -> None:
        settings = settings_or_exit(self.container.config)
        if not settings.log:
            refuse_start(f"QUEUE_LOG: must be on for {self.container.service_name}, which reads it")
        self._engine = make_reader(database_url(settings), eventlet.sleep)

    def stop(self) -> None:
        self._engine.dispose()

    def kill(self) -> None:
        self.stop()

    def read(self, query: Callable[..., Any], *args: Any) -> Any:
        """Return what ``query(connection, *args)`` returns.

        :raises StoreUnavailableError: when the database does not answer.
        """
        try:
            with self._engine.connect() as connection:
                return query(connection, *args)
        except SQLAlchemyError as exc:
            raise StoreUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc


class MessageLog(DependencyProvider):
    """Injects the message log, to be read: what was dispatched and what became of it."""

    reader = LogReader()

    def get_dependency(self, _worker_ctx: Any) -> MessageLog:
        return self

    def message(self, message_id: str) -> dict[str, Any]:
        """Return one message with its deliveries, and their attempts that failed.

        :raises MessageNotFoundError: when there is none of that id.
        """
        return self.reader.read(queries.message, message_id)

    def queue_stats(self, queue: str) -> dict[str, Any] | None:
        """Return the counts of a queue; ``None`` when nothing is known of it."""
        return self.reader.read(stats.queue_stats, queue)

    def silent_subscriptions(self) -> list[str]:
        """Return who has work waiting and no live consumer."""
        return self.reader.read(_silent)


class LogClient(Protocol):
    """What works on the log and its provider: a service's :class:`QueueClient`, or a command's."""

    settings: Settings

    @property
    def joins_log(self) -> bool:
        """See :attr:`QueueClient.joins_log`."""

    @property
    def handover(self) -> Handover:
        """See :attr:`QueueClient.handover`."""

    def append(self, envelopes: Sequence[Envelope]) -> list[str]:
        """See :meth:`QueueClient.append`."""

    def call(self, function: Callable[[Transaction], tuple[Any, list[Delivery]]]) -> Any:
        """See :meth:`QueueClient.call`."""

    def ask(self, function: Callable[[QueueProvider], Any]) -> Any:
        """See :meth:`QueueClient.ask`."""

    def ask_all(self, function: Callable[[QueueProvider], Any]) -> None:
        """See :meth:`QueueClient.ask_all`."""

    def health(self) -> bool:
        """See :meth:`QueueClient.health`."""

    def forget(self, gone: Sequence[Subscription]) -> None:
        """See :meth:`QueueClient.forget`."""


class Reader(Protocol):
    """What reads the message log."""

    def read(self, query: Callable[..., Any], *args: Any) -> Any:
        """See :meth:`LogReader.read`."""


class Publisher:
    """Publishes into any queue, on behalf of the service whose queue it is."""

    client: LogClient

    def publish(
        self,
        queue_name: str,
        message_type: str,
        payload: Any,
        *,
        priority: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        scheduled_at: datetime | None = None,
        delay: float | None = None,
        max_retries: int | None = None,
        dedupe_key: str | Dedupe | None = None,
    ) -> str:
        """Publish one message; return its id once it is stored.

        :param dedupe_key: what was published with it before is not stored again; its id is
            returned.
        :raises PayloadError: when it cannot be sent as it is; nothing was stored.
        :raises DispatchError: when it could not be stored; nothing was.
        :raises DedupeConflictError: when the key came before with another fingerprint.
        """
        origin = metadata if isinstance(metadata, Mapping) else {}
        with Dispatching(queue_name, origin) as dispatching:
            envelope = make_envelope(
                self.client.settings,
                queue_name,
                message_type,
                payload,
                priority=priority,
                metadata=metadata,
                scheduled_at=scheduled_at,
                delay=delay,
                max_retries=max_retries,
                dedupe_key=dedupe_key,
                context=dispatching.headers,
            )
            dispatching.note([envelope])
            return self.client.append([envelope])[0]


class QueueService(DependencyProvider, Publisher):
    """Injects publishing into any queue, its statistics, and retrying.

    Services dispatch their own events by ``EventDispatcher``; this is for who acts
    on behalf of others.
    """

    client = QueueClient()
    reader = LogReader()

    def get_dependency(self, _worker_ctx: Any) -> QueueService:
        return self

    def get_queue_stats(self, queue_name: str) -> dict[str, Any] | None:
        """Return the counts of a queue; ``None`` when nothing is known of it."""
        return self.reader.read(stats.queue_stats, queue_name)

    def retry_message(self, message_id: str) -> int:
        """Let the failed deliveries of a message run again; return how many there are.

        :raises MessageNotFoundError: when there is no such message.
        :raises NothingToRetryError: when none of its deliveries had failed.
        """

        def retry(tx: Any) -> tuple[int, Any]:
            failed = repair.retry_message(tx, message_id)
            return len(failed), failed

        retried: int = self.client.call(retry)
        return retried

    def gauges(self) -> tuple[bool, LogGauges | None, DrainGauges | None]:
        """Say whether the provider answers, and count what the message log holds.

        :returns: ``None`` for the counts when the database does not answer; and what the provider
            still has that is moved away from, if any is.
        """
        try:
            counted = self.reader.read(log_gauges, self.client.joins_log)
            draining = self._draining()
        except StoreUnavailableError:
            counted = draining = None
        return self.client.health(), counted, draining

    def health(self) -> dict[str, Any]:
        """Say what works: provider, database, and whether waiting work has consumers."""
        try:
            silent = self.reader.read(_silent)
            is_database_up = True
        except StoreUnavailableError:
            silent, is_database_up = [], False
        is_provider_up = self.client.health()
        draining = self._draining_shown() if is_database_up else None
        is_well = is_database_up and is_provider_up and not silent
        is_well = is_well and (draining is None or draining["status"] == "up")
        shown = {
            "status": "healthy" if is_well else "unhealthy",
            "provider": {
                "name": self.client.settings.provider,
                "status": "up" if is_provider_up else "down",
            },
            "database": {"status": "up" if is_database_up else "down"},
            "consumers": {"status": "silent" if silent else "live", "silent": silent},
        }
        return shown if draining is None else {**shown, "draining": draining}

    def _draining_shown(self) -> dict[str, Any] | None:
        found = self._draining()
        if found is None:
            return None
        status = "down" if found.left is None else "up"
        return {"name": found.provider, "status": status, "left": found.left}

    def _draining(self) -> DrainGauges | None:
        """Say what the provider still has that is moved away from, if any is."""
        settings = self.client.settings
        if not settings.drain:
            return None
        mine, in_log = self.reader.read(moving.seen, route_of(settings))
        left = self.client.left(mine)
        return DrainGauges(settings.drain, None if left is None else left + in_log)


class HubTimer(DependencyProvider):
    """Carries on, on the hub, what is due; injects itself. Of several processes any one does.

    ``carry_on`` is from the class that it is beside: it does what is due, and returns in how many
    seconds to come again.
    """

    carry_on: Callable[[], float]
    work: str
    """What that is, for the log."""

    def start(self) -> None:
        self._thread = self.container.spawn_managed_thread(self._run, identifier=self.work)

    def stop(self) -> None:
        self._thread.kill()

    def get_dependency(self, _worker_ctx: Any) -> Any:
        return self

    def _run(self) -> None:
        while True:
            eventlet.sleep(self._once())

    def _once(self) -> float:
        try:
            return self.carry_on()
        except QueueError:
            # who keeps the log says that it does not answer
            return PUT_OFF_SECONDS
        except SQLAlchemyError as exc:
            _log.warning("%s put off: %s", self.work, exc)
            return AGAIN_SECONDS


class AuditTimer(DependencyProvider):
    """Audits the queue every ``QUEUE_AUDIT_SECONDS``, and puts right what it finds.

    In a native thread, for it may wait for the broker. One process is enough; more do no harm.
    Injects what it counts, or ``None`` where there are no audits.
    """

    client = QueueClient()
    counts: AuditCounts | None = None

    def setup(self) -> None:
        settings = self.client.settings
        self._seconds = settings.audit if settings.log else 0.0
        if self._seconds:
            self.counts = AuditCounts()
            self._audit = Audit(settings)
            self._mailbox = Mailbox()
            self._thread = Thread(self._run, "queue-audit")

    def start(self) -> None:
        if self._seconds:
            self._mailbox.open()
            self._thread.start()

    def stop(self) -> None:
        if self._seconds:
            self._mailbox.send(None)
            if self._thread.join(FINISH_SECONDS):
                self._mailbox.close()
            self._seconds = 0.0

    def get_dependency(self, _worker_ctx: Any) -> AuditCounts | None:
        return self.counts

    def _run(self) -> None:
        inbox = self._mailbox.inbox
        inbox.wait(self._seconds)
        while not inbox.take():
            self._once()
            inbox.wait(self._seconds)

    def _once(self) -> None:
        counts: Any = self.counts
        try:
            found = self._audit.look()
            if not found.are_none:
                self._audit.repair(found)
                self._say(logging.WARNING, "audit: %s; repaired", found)
                self._mailbox.answer(self.client.relay)
            lacking = found.lack.counts.total() + found.orphaned.total()
            counts.ended(lacking, len(found.misdrawn), len(found.unpaused + found.withheld))
        except (ProviderError, StoreUnavailableError) as exc:
            counts.put_off()
            self._say(logging.WARNING, "audit put off: %s", exc)
        finally:
            self._audit.close()

    def _say(self, level: int, text: str, *args: Any) -> None:
        self._mailbox.answer(_log.log, level, text, *args)


def _silent(connection: Connection) -> list[str]:
    return queries.silent_subscriptions(connection, utc_now(connection))
