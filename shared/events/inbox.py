"""Handlers whose effects in their database happen once, however often a message comes.

The session of the handler's worker is watched. The first statement of each transaction
notes the messages as handled, until a commit has made that true; so what the handler wrote
and the note are there together, or neither is, whatever it commits or rolls back. Where the
note cannot be made, somebody has handled the message, and the handler ends there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any
from weakref import WeakSet

import eventlet
from nameko_sqlalchemy import Database, DatabaseSession
from sqlalchemy import Connection, ExceptionContext, event
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from shared.database import reading
from shared.errors import InboxError, Retry
from shared.settings import refuse_start
from shared.store import inbox as rows

_log = logging.getLogger(__name__)

REMOVE_SECONDS = 600.0
"""How often old rows are removed; and how long after the start for the first time, when what
a process left unsettled that died long ago has come again, and met its row."""


class HandledBefore(BaseException):
    """Raised in a handler at its first statement: another worker has handled the message.

    No ``Exception``, so that handlers do not catch it.
    """


class Inbox:
    """The inbox of one subscriber.

    :param provider: the dependency of whose sessions one is the handler's.
    :param days: how long a row is kept.
    """

    def __init__(self, provider: Any, service: str, subscriber: str, days: float) -> None:
        self._provider = provider
        self.table = provider.declarative_base.metadata.tables[rows.inbox_name(service)]
        self.subscriber = subscriber
        self._days = days
        # where a statement failed: it may have taken the whole transaction along
        self.spoilt: WeakSet[Connection] = WeakSet()
        self._remove_at = monotonic() + REMOVE_SECONDS

    @classmethod
    def of(cls, container: Any, name: Any, handler: str, subscriber: str, days: float) -> Inbox:
        """Return the inbox of a handler; end the start when there can be none.

        :param name: of the dependency.
        """
        service = container.service_name
        found = {
            each.attr_name: each
            for each in container.dependencies
            if isinstance(each, DatabaseSession | Database)
        }
        if name not in found:
            has = ", ".join(sorted(found)) or "none"
            refuse_start(
                f"{handler}: inbox must name a DatabaseSession of the service ({has}), not {name!r}"
            )
        if rows.inbox_name(service) not in found[name].declarative_base.metadata.tables:
            refuse_start(
                f"{handler}: there is no table {rows.inbox_name(service)} among those of "
                f"{name}: see inbox_table()"
            )
        return cls(found[name], service, subscriber, days)

    def handled(self, message_ids: Sequence[str]) -> set[str]:
        """Return which of these messages are handled."""
        with reading(self._provider.engine) as connection:
            return rows.handled(connection, self.table, self.subscriber, message_ids)

    def run(self, service: Any, message_ids: Sequence[str], handler: Callable[[], Any]) -> Any:
        """Return what ``handler`` returns, with its effects and the note of it committed.

        :param service: the instance that the worker has, with its session.
        :raises HandledBefore: when another worker was faster; nothing was changed.
        :raises InboxError: when it failed after its commit.
        :raises Retry: when the database had rolled back what it did, and it went on.
        """
        if not event.contains(self._provider.engine, "handle_error", self._note_spoilt):
            event.listen(self._provider.engine, "handle_error", self._note_spoilt)
        guard = _Guard(self, self._session(service), message_ids)
        try:
            result = handler()
            guard.commit()
            return result
        except HandledBefore:
            guard.roll_back()
            raise
        except Exception as exc:
            if guard.is_recorded and not isinstance(exc, InboxError):
                raise InboxError(
                    f"the handler failed after its commit, and is not run again: {exc!r}"
                ) from exc
            raise
        finally:
            self._remove_old_when_due()

    def _note_spoilt(self, context: ExceptionContext) -> None:
        if context.connection is not None:
            self.spoilt.add(context.connection)

    def _session(self, service: Any) -> Session:
        injected = getattr(service, self._provider.attr_name)
        session: Session = injected if isinstance(injected, Session) else injected.session
        return session

    def _remove_old_when_due(self) -> None:
        if monotonic() >= self._remove_at:
            self._remove_at = monotonic() + REMOVE_SECONDS
            eventlet.spawn_n(self.remove_old)

    def remove_old(self) -> None:
        """Remove what is older than it is kept."""
        removed = rows.REMOVED_AT_ONCE
        try:
            while removed >= rows.REMOVED_AT_ONCE:
                with self._provider.engine.begin() as connection:
                    removed = rows.remove_old(connection, self.table, self._days)
        except (SQLAlchemyError, AttributeError) as exc:  # the latter where it stops just now
            _log.warning("old rows of %s stay for now: %s", self.table.name, exc)


class _Guard:
    """Watches the session of one worker."""

    def __init__(self, inbox: Inbox, session: Session, message_ids: Sequence[str]) -> None:
        self._inbox = inbox
        self._session = session
        self._message_ids = message_ids
        self.is_recorded = False
        self._noted_in: Any = None
        self._was_handled = False
        self._has_begun_again = False
        event.listen(session, "after_begin", self._begin)
        event.listen(session, "before_commit", self._before_commit)
        event.listen(session, "after_commit", self._after_commit)

    def commit(self) -> None:
        """Commit what the handler left, and the note, where it did not do so itself."""
        if self.is_recorded:
            return
        if not self._session.in_transaction():
            self._session.begin()
        self._session.connection()
        self._session.commit()

    def roll_back(self) -> None:
        """Let go of what the session holds."""
        self._session.rollback()

    def _begin(self, _session: Session, transaction: Any, connection: Connection) -> None:
        if transaction.nested:
            return
        if self.is_recorded:
            self._has_begun_again = True
            return
        inbox = self._inbox
        try:
            rows.record(connection, inbox.table, inbox.subscriber, self._message_ids)
        except IntegrityError as exc:
            self._was_handled = True
            raise HandledBefore from exc
        self._noted_in = transaction

    def _before_commit(self, session: Session) -> None:
        if self._was_handled:
            raise HandledBefore  # should the handler have caught it before
        if session.in_nested_transaction():
            return
        if not self.is_recorded:
            self._check_that_it_is_noted(session)
            return
        if self._has_begun_again or session.new or session.dirty or session.deleted:
            raise InboxError(
                "a handler with an inbox commits once: what it commits later would be lost if "
                "it failed in between"
            )

    def _check_that_it_is_noted(self, session: Session) -> None:
        """See that the note is still there, should a handler have caught that a statement failed.

        Whose transaction loses a deadlock is in none afterwards, and goes on in the next.
        """
        inbox = self._inbox
        if self._noted_in is None or session.get_transaction() is not self._noted_in:
            return
        connection = session.connection()
        if connection not in inbox.spoilt:
            return
        noted = rows.handled(connection, inbox.table, inbox.subscriber, self._message_ids)
        if not noted.issuperset(self._message_ids):
            raise Retry("the database rolled back what the handler did before a statement failed")

    def _after_commit(self, session: Session) -> None:
        # a commit may come before the first statement, or be that of a savepoint
        if not session.in_nested_transaction() and self._noted_in is not None:
            self.is_recorded |= session.get_transaction() is self._noted_in
