"""The relay: hands what is in a service's outbox to the message log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import eventlet
from eventlet.event import Event
from nameko_sqlalchemy import Database, DatabaseSession
from sqlalchemy import Engine, MetaData, event
from sqlalchemy.exc import SQLAlchemyError

from shared.database import reading
from shared.errors import DispatchError, DispatchRefusedError
from shared.events.client import QueueClient
from shared.store import outbox
from shared.types import Envelope

_log = logging.getLogger(__name__)

BATCH = 500
"""Events relayed at a time."""

SWEEP_SECONDS = 5.0
"""How often the outbox is looked through unasked: for what another process left there."""


class Relay:
    """Relays the outbox of one service; any number of processes may."""

    def __init__(self, client: QueueClient, engine: Engine, service: str) -> None:
        self._client = client
        self._engine = engine
        self._outbox = outbox.outbox_table(MetaData(), service)
        self._rung: Event = Event()
        # of each session: its transaction, and the numbers of its events
        self._numbers: WeakKeyDictionary[Any, tuple[Any, list[int]]] = WeakKeyDictionary()

    @classmethod
    def of(cls, container: Any, client: QueueClient) -> Relay | None:
        """Return the relay for a container whose service has an outbox among its tables."""
        name = outbox.outbox_name(container.service_name)
        for dependency in container.dependencies:
            is_session = isinstance(dependency, DatabaseSession | Database)
            if is_session and name in dependency.declarative_base.metadata.tables:
                return cls(client, dependency.engine, container.service_name)
        return None

    def add(self, session: Any, envelopes: Sequence[Envelope]) -> None:
        """Store events in the session's transaction, and relay them once it is committed."""
        seqs = outbox.add(session, self._outbox, envelopes)
        if not event.contains(session, "after_commit", self._ring):
            event.listen(session, "before_commit", self._renumber)
            event.listen(session, "after_commit", self._ring)
        if seqs:
            transaction, before = self._numbers.get(session, (None, []))
            now = session.get_transaction()
            self._numbers[session] = (now, [*(before if transaction is now else []), *seqs])

    def run(self) -> None:
        """Relay, for ever: when a commit rings, and now and then."""
        while True:
            try:
                moved = self.sweep()
            except (DispatchError, SQLAlchemyError) as exc:
                # the driver's own words: SQLAlchemy adds the statement and all its parameters
                _log.warning("the outbox waits: %s", getattr(exc, "orig", None) or exc)
                moved = 0
            except Exception:
                # raised from a managed thread, it would end the service
                _log.exception("the outbox waits")
                moved = 0
            if moved < BATCH:
                self._wait()

    def finish(self) -> None:
        """Relay what is committed, before the service ends; the next one would do it too."""
        with contextlib.suppress(DispatchError, SQLAlchemyError):
            self.sweep()
        # the session's dependency may have stopped before, and closed its connections
        self._engine.dispose()

    def sweep(self) -> int:
        """Hand over the oldest events, and remove them; return how many there were."""
        with reading(self._engine) as connection:
            found = outbox.oldest(connection, self._outbox, BATCH)
        self._client.counts.note_outbox(bool(found))
        readable = [(row, envelope) for row in found for envelope in self._read(row)]
        if readable:
            self._hand_over(readable)
        self._client.counts.note_outbox(False)
        return len(found)

    def _read(self, row: outbox.Row) -> list[Envelope]:
        try:
            return [outbox.read(row.envelope)]
        except ValueError as exc:
            self._set_aside(row, f"it cannot be read: {exc}")
            return []

    def _hand_over(self, rows: Sequence[tuple[outbox.Row, Envelope]]) -> None:
        envelopes = [envelope for _, envelope in rows]
        try:
            # another process, or a crash after the hand-over, may have stored some already
            ids = self._client.append(envelopes, again=True)
        except DispatchRefusedError as exc:
            self._hand_over_parts(rows, exc)
            return
        for envelope, first in zip(envelopes, ids, strict=True):
            if first != envelope.id:
                _log.info("dispatched before message_id=%s first=%s", envelope.id, first)
        with self._engine.begin() as connection:
            outbox.remove(connection, self._outbox, [row for row, _ in rows])

    def _hand_over_parts(
        self, rows: Sequence[tuple[outbox.Row, Envelope]], error: DispatchRefusedError
    ) -> None:
        """Find what the log refuses, by halves: it is left out, and the rest keeps its order."""
        if len(rows) == 1:
            self._set_aside(rows[0][0], str(error))
            return
        middle = len(rows) // 2
        self._hand_over(rows[:middle])
        self._hand_over(rows[middle:])

    def _set_aside(self, row: outbox.Row, reason: str) -> None:
        with self._engine.begin() as connection:
            is_news = outbox.set_aside(connection, self._outbox, row, reason)
        if is_news:
            _log.error("set aside in %s seq=%d: %s", self._outbox.name, row.seq, reason)

    def _wait(self) -> None:
        with eventlet.Timeout(SWEEP_SECONDS, False):
            self._rung.wait()
        self._rung = Event()

    def _renumber(self, session: Any) -> None:
        if session.in_nested_transaction():
            return  # a savepoint, which may still be rolled back with the rest
        transaction, seqs = self._numbers.pop(session, (None, []))
        if seqs and transaction is session.get_transaction():
            outbox.renumber(session, self._outbox, seqs)

    def _ring(self, _session: Any) -> None:
        if not self._rung.ready():
            self._rung.send(None)
