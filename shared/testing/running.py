"""A service that runs in the tests' own process, by a clock that they move."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import eventlet
from eventlet.event import Event as Promise
from nameko.containers import ServiceContainer
from nameko.extensions import Entrypoint, iter_extensions
from nameko.testing.services import replace_dependencies
from nameko.timer import Timer
from nameko_sqlalchemy import DB_URIS_KEY
from sqlalchemy import Connection, select
from sqlalchemy.orm import Session

from shared.database import database_url, make_engine, make_reader
from shared.events import EventHandler
from shared.events.client import QueueClient
from shared.events.dispatcher import make_envelope
from shared.lifecycle import DeliveryStatus
from shared.settings import NAMEKO_BROKER, load_settings
from shared.store import DatabaseSession, queries
from shared.store.migrate import LOG, Migrations, service_migrations, upgrade_sqlite
from shared.tables import MESSAGE_COLUMNS, deliveries, envelope_of, messages, subscriptions
from shared.testing.virtual import VirtualClock, VirtualProvider
from shared.types import Envelope

PROVIDER = f"{VirtualProvider.__module__}:{VirtualProvider.__qualname__}"

LONGEST_CALL_SECONDS = 86_400.0
"""How far the clock goes on for a method that is called."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of a handler at one message.

    :param subscriber: ``service.method``.
    :param number: 1 for the first.
    :param at: when it began: seconds on the clock.
    :param outcome: ``completed``, ``retry``, ``failed``, ``released`` or ``taken_over``.
    :param retry_in: seconds from its end to the next one, where there is to be one.
    """

    message_id: str
    subscriber: str
    number: int
    at: float
    outcome: str
    retry_in: float | None = None
    error_type: str | None = None
    error: str | None = None
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a handler is done with, without success; its last error with traceback."""

    message_id: str
    type: str
    payload: Any
    subscriber: str
    attempts: int
    error_type: str
    error: str
    traceback: str


class TableFiles:
    """SQLite files with the tables of the log and of services, to be copied: that is faster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, int], Path] = {}

    def put(self, target: Path, migrations: Migrations) -> None:
        """Put a file with empty tables at ``target``, unless there is one."""
        if target.exists():
            return
        key = (migrations.name, id(migrations.metadata))
        if key not in self._made:
            self._made[key] = self._make(self._folder / f"{len(self._made)}.db", migrations)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._made[key], target)

    def _make(self, path: Path, migrations: Migrations) -> Path:
        engine = make_engine(database_url_of(path), eventlet.sleep)
        upgrade_sqlite(engine, migrations)
        if not migrations.newest():
            migrations.metadata.create_all(engine)
        engine.dispose()
        return path


def database_url_of(path: Path) -> Any:
    """Return the URL of an SQLite file."""
    return database_url(load_settings({"QUEUE_DATA_DIR": str(path.parent)}), path.stem)


class RunningService:
    """A service in a container of nameko's, with its handlers and timers at work.

    Routes and methods of RPC do not listen; :meth:`call` runs them. Times are those of
    :attr:`clock`. What is asked of it is the state after all that could happen has.

    :param config: nameko's configuration, over the kit's own.
    :param dependencies: what to inject in the place of dependencies, by their attributes.
    """

    def __init__(
        self,
        service: type,
        folder: Path,
        clock: VirtualClock,
        tables: TableFiles,
        config: Mapping[str, Any],
        dependencies: Mapping[str, Any],
    ) -> None:
        self.clock = clock
        own = {
            "QUEUE_PROVIDER": PROVIDER,
            "QUEUE_DATA_DIR": str(folder),
            # nameko's own extensions ask for one, also where nobody connects
            "AMQP_URI": NAMEKO_BROKER,
        }
        self.container = ServiceContainer(service, {**own, **config})
        self.settings = load_settings(self.container.config)
        self._tables = tables
        if dependencies:
            replace_dependencies(self.container, **dependencies)
        self.keep(lambda entrypoint: isinstance(entrypoint, EventHandler | Timer))
        if not any(isinstance(each, QueueClient) for each in self.container.subextensions):
            raise ValueError(f"{service.__name__} neither handles events nor dispatches any")
        self._reader = make_reader(database_url(self.settings), eventlet.sleep)

    def keep(self, is_wanted: Callable[[Any], bool]) -> None:
        """Do without the other entrypoints, and what they alone would need."""
        container = self.container
        container.entrypoints = type(container.entrypoints)(
            filter(is_wanted, container.entrypoints)
        )
        used = [*container.dependencies, *container.entrypoints]
        needed = {sub for each in used for sub in iter_extensions(each)}
        container.subextensions = type(container.subextensions)(needed)

    def start(self) -> None:
        """Start it, and return once it is at work."""
        self.put_tables()
        self.clock.wait_for(self.container.start)
        self.clock.watch(self.container)
        self.clock.settle()

    def stop(self) -> None:
        """Stop it as SIGTERM would; a handler that waits is ended, and hands its event back."""
        if self.container in self.clock.containers:
            self.clock.forget(self.container)
            (self.container.kill if self.container._worker_threads else self.container.stop)()
        self._reader.dispose()

    # --- doing

    def dispatch(self, source: str, event_type: str, payload: Any, **options: Any) -> str:
        """Dispatch an event as ``source`` would, and let happen what follows from it at once.

        :param source: the service that such events come from, as ``event_handler`` names it.
        :param options: those of ``EventDispatcher``.
        :returns: the message id.
        :raises PayloadError: when the event cannot be dispatched.
        """
        queue = self.settings.queue_of(source)
        envelope = make_envelope(self.settings, queue, event_type, payload, **options)
        self.append([envelope])
        return envelope.id

    def append(self, envelopes: list[Envelope]) -> None:
        """Store events that were made before, and let happen what follows from it at once."""
        client = self.container.shared_extensions[QueueClient]
        self.clock.wait_for(partial(client.append, envelopes))
        self.clock.settle()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run a method of the service in a worker, and return what it does; or raise it.

        The clock goes on for as long as the method itself waits.
        """
        done: Any = Promise()

        def handle_result(_worker_ctx: Any, result: Any, exc_info: Any) -> tuple[Any, Any]:
            done.send_exception(*exc_info) if exc_info else done.send(result)
            return result, exc_info

        entrypoint = Entrypoint().bind(self.container, method)
        self.container.spawn_worker(entrypoint, args, kwargs, handle_result=handle_result)
        self.clock.settle()
        end = self.clock.monotonic() + LONGEST_CALL_SECONDS
        while not done.ready():
            if self.clock.next_due() > end:
                raise TimeoutError(f"{method} waits for what does not come")
            self.clock.go_to_next()
        return done.wait()

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """Open a session of the service's own database, to look into it or to fill it."""
        (dependency,) = self.sessions
        with dependency.Session() as session:
            yield session

    # --- asking

    @property
    def dispatched(self) -> list[Envelope]:
        """The events that this service dispatched, in their order; ``payload`` is decoded."""
        mine = messages.c.queue_name == self.settings.queue_of(self.container.service_name)
        query = select(*MESSAGE_COLUMNS).where(mine).order_by(messages.c.id)
        return self._read(lambda db: [envelope_of(row) for row in db.execute(query)])

    @property
    def attempts(self) -> list[Attempt]:
        """What this service's handlers tried, in its order."""
        found = [each for delivery in self.deliveries for each in self._attempts_of(*delivery)]
        return sorted(found, key=lambda each: each.at)

    @property
    def dead_letters(self) -> list[DeadLetter]:
        """The messages that this service's handlers are done with, without success."""
        return [
            DeadLetter(
                message["messageId"],
                message["messageType"],
                message["payload"],
                delivery["subscriber"],
                delivery["attempts"],
                delivery["errorType"],
                delivery["errorMessage"],
                delivery["history"][-1]["traceback"] or "",
            )
            for message, delivery in self.deliveries
            if delivery["status"] == DeliveryStatus.FAILED
        ]

    def message(self, message_id: str) -> dict[str, Any]:
        """Return a message with its deliveries, as ``GET /queue/messages`` shows it.

        :raises MessageNotFoundError: when there is none of that id.
        """
        return self._read(lambda db: queries.message(db, message_id))

    # --- within

    def put_tables(self) -> None:
        self._tables.put(self.settings.data_dir / "queue.db", LOG)
        if DB_URIS_KEY in self.container.config:
            return
        name = self.container.service_name
        for dependency in self.sessions:
            migrations = service_migrations(name, dependency.declarative_base)
            self._tables.put(self.settings.data_dir / f"{name}.db", migrations)

    @property
    def sessions(self) -> list[DatabaseSession]:
        return [each for each in self.container.dependencies if isinstance(each, DatabaseSession)]

    def _read(self, query: Callable[[Connection], Any]) -> Any:
        with self._reader.connect() as connection:
            return query(connection)

    @property
    def deliveries(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the deliveries to this service's handlers, each with its message."""
        mine = {
            each.subscription.subscriber
            for each in self.container.entrypoints
            if isinstance(each, EventHandler)
        }
        query = (
            select(deliveries.c.message_id)
            .join(subscriptions)
            .where(subscriptions.c.subscriber.in_(mine))
            .group_by(deliveries.c.message_id)
            .order_by(deliveries.c.message_id)
        )

        def read(db: Connection) -> list[tuple[dict[str, Any], dict[str, Any]]]:
            found = [queries.message(db, message_id) for message_id in db.scalars(query)]
            return [(m, d) for m in found for d in m["deliveries"] if d["subscriber"] in mine]

        return self._read(read)

    def _attempts_of(self, message: dict[str, Any], delivery: dict[str, Any]) -> Iterator[Attempt]:
        for row in delivery["history"]:
            ended, retry_at = self._seconds(row["endedAt"]), self._seconds(row["retryAt"])
            yield Attempt(
                message["messageId"],
                delivery["subscriber"],
                row["attempt"],
                self._seconds(row["startedAt"]),
                row["outcome"],
                round(retry_at - ended, 3) if row["retryAt"] else None,
                row["errorType"],
                row["errorMessage"],
                row["traceback"],
            )
        if delivery["status"] == DeliveryStatus.COMPLETED:
            yield Attempt(
                message["messageId"],
                delivery["subscriber"],
                delivery["attempts"],
                self._seconds(delivery["startedAt"]),
                "completed",
            )

    def _seconds(self, iso: str | None) -> float:
        return self.clock.seconds_at(datetime.fromisoformat(iso)) if iso else 0.0
