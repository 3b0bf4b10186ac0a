"""The relay: hands what is in a service's outbox to the message log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import eventlet
from eventlet.event import Event
from nameko_sqlalchemy import DatabaseSession
from sqlalchemy import Engine, MetaData, event
from sqlalchemy.exc import SQLAlchemyError

from shared.errors import DispatchError
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

    @classmethod
    def of(cls, container: Any, client: QueueClient) -> Relay | None:
        """Return the relay for a container whose service has an outbox among its tables."""
        name = outbox.outbox_name(container.service_name)
        for dependency in container.dependencies:
            is_session = isinstance(dependency, DatabaseSession)
            if is_session and name in dependency.declarative_base.metadata.tables:
                return cls(client, dependency.engine, container.service_name)
        return None

    def add(self, session: Any, envelopes: Sequence[Envelope]) -> None:
        """Store events in the session's transaction, and relay them once it is committed."""
        outbox.add(session, self._outbox, envelopes)
        if not event.contains(session, "after_commit", self._ring):
            event.listen(session, "after_commit", self._ring)

    def run(self) -> None:
        """Relay, for ever: when a commit rings, and now and then."""
        while True:
            try:
                moved = self.sweep()
            except (DispatchError, SQLAlchemyError) as exc:
                _log.warning("the outbox waits: %s", exc)
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
        """Hand over the oldest events, and remove them; return how many."""
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")
            found = outbox.oldest(connection, self._outbox, BATCH)
        if not found:
            return 0
        # another process, or a crash after the hand-over, may have stored some already
        self._client.append([envelope for _, envelope in found], again=True)
        with self._engine.begin() as connection:
            outbox.remove(connection, self._outbox, [seq for seq, _ in found])
        return len(found)

    def _wait(self) -> None:
        with eventlet.Timeout(SWEEP_SECONDS, False):
            self._rung.wait()
        self._rung = Event()

    def _ring(self, _session: Any) -> None:
        if not self._rung.ready():
            self._rung.send(None)
