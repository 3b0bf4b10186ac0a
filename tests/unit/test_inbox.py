"""A handler with an inbox: its effects happen once, whatever it does with its session."""

import contextlib
from datetime import timedelta

import eventlet
import pytest
from eventlet.event import Event
from nameko.containers import ServiceContainer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import String, create_engine, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.database import database_url, make_engine, make_reader
from shared.errors import Retry
from shared.events import EventDispatcher, EventHandler, MessageContext, event_handler
from shared.events import inbox as inbox_module
from shared.lifecycle import DeliveryStatus
from shared.observe import traces
from shared.settings import load_settings
from shared.store import DatabaseSession, queries
from shared.store.inbox import REMOVED_AT_ONCE, inbox_table, remove_old
from tests.support.waiting import wait_until


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "ledger_entries"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    message_id: Mapped[str] = mapped_column(String(36))
    what: Mapped[str] = mapped_column(String(20))


inbox = inbox_table(Base.metadata, "ledger")
runs = []
GATES = {}


class Ledger:
    name = "ledger"

    db = DatabaseSession(Base)
    other = DatabaseSession(Base)
    message = MessageContext()
    dispatch = EventDispatcher()

    @event_handler("ledger", "entry.made", inbox="db", max_retries=0)
    def book(self, payload):
        runs.append(self.message.id)
        getattr(self, payload)()

    @event_handler("ledger", "entries.made", inbox="db", batch_size=4, batch_timeout=0.2)
    def book_many(self, payloads):
        runs.append([message.id for message in self.message])
        for message, payload in zip(self.message, payloads, strict=True):
            self.db.add(Entry(message_id=message.id, what=payload))
        self.db.commit()

    @event_handler("ledger", "mail.wanted", inbox="other", max_retries=0)
    def send(self, payload):
        runs.append(self.message.id)
        self.add("claimed")
        self.db.commit()
        self.add("sent")
        self.db.commit()
        if payload == "fail":
            raise ValueError("told to fail")

    def add(self, what="booked"):
        self.db.add(Entry(message_id=self.message.id, what=what))

    def commits(self):
        self.add()
        self.db.commit()

    def commits_not(self):
        self.add()

    def does_nothing(self):
        pass

    def rolls_back_first(self):
        self.add("rolled back")
        self.db.flush()
        self.db.rollback()
        self.commits()

    def uses_savepoints(self):
        savepoint = self.db.begin_nested()
        self.add("rolled back")
        self.db.flush()
        savepoint.rollback()
        with self.db.begin_nested():
            self.add()
        self.db.commit()

    def reads_afterwards(self):
        self.commits()
        self.db.scalars(select(Entry)).all()

    def commits_nothing_first(self):
        self.db.commit()
        with self.db.begin_nested():
            pass
        self.db.rollback()
        self.commits()

    def commits_twice(self):
        self.commits()
        self.add("too late")
        self.db.commit()

    def raises_before(self):
        self.add()
        self.db.flush()
        raise ValueError("before the commit")

    def raises_after(self):
        self.commits()
        raise Retry("after the commit")

    def catches_all(self):
        GATES["begun"].send(None)
        GATES["go"].wait()
        for _ in range(3):
            try:
                self.commits()
                return
            except BaseException:
                self.db.rollback()

    def catches_without_rollback(self):
        GATES["begun"].send(None)
        GATES["go"].wait()
        try:
            self.db.execute(select(Entry)).all()
        except BaseException:
            self.add("wrong")
            self.db.commit()

    def catches_a_deadlock(self):
        self.db.execute(update(Entry).where(Entry.id == 1).values(what="mine"))
        GATES["begun"].send(None)
        GATES["go"].wait()
        with contextlib.suppress(OperationalError):
            self.db.execute(update(Entry).where(Entry.id == 2).values(what="mine"))
        self.commits()

    def catches_another_error(self):
        with contextlib.suppress(DBAPIError):
            self.db.execute(text("SELECT nothing FROM nowhere"))
        self.commits()

    def waits_before(self):
        GATES["begun"].send(None)
        GATES["go"].wait()
        self.commits()


class Books:
    """The service, and what became of its messages."""

    def __init__(self, config, monkeypatch):
        settings = load_settings(config)
        self.engine = make_engine(database_url(settings, "ledger"), eventlet.sleep)
        self.log = make_reader(database_url(settings), eventlet.sleep)
        Base.metadata.create_all(self.engine)
        runs.clear()
        GATES.update(begun=Event(), go=Event())
        self.leases = {}
        real = EventHandler.handle

        def handle(handler, lease):
            self.leases[lease.delivery.message.id] = (handler, lease)
            real(handler, lease)

        monkeypatch.setattr(EventHandler, "handle", handle)
        self.handle = real
        self.container = ServiceContainer(Ledger, dict(config))
        self.container.start()

    def send(self, payload, event_type="entry.made"):
        [dispatcher] = [d for d in self.container.dependencies if d.attr_name == "dispatch"]
        worker = type("Worker", (), {"context_data": {}})
        return dispatcher.get_dependency(worker)(event_type, payload)

    def status(self, message_id):
        with self.log.connect() as connection:
            return queries.message(connection, message_id)["status"]

    def ends(self, message_id, status):
        wait_until(lambda: self.status(message_id) == status, 10, lambda: self.status(message_id))

    def error(self, message_id):
        with self.log.connect() as connection:
            [delivery] = queries.message(connection, message_id)["deliveries"]
        return delivery["errorType"]

    def comes_again(self, *message_ids):
        """Have the handler given what it was given before, as after a lost outcome."""
        for message_id in message_ids:
            self.handle(*self.leases[message_id])

    def entries(self, message_id):
        with self.engine.begin() as connection:
            query = select(Entry.what).where(Entry.message_id == message_id)
            return list(connection.execute(query).scalars())

    def handled(self):
        with self.engine.begin() as connection:
            return dict(connection.execute(select(inbox.c.message_id, inbox.c.subscriber)).all())

    def idle(self):
        wait_until(lambda: not self.container._worker_threads, 10, "the workers")

    def close(self):
        self.container.stop()
        self.engine.dispose()
        self.log.dispose()


@pytest.fixture
def books(log_settings, monkeypatch):
    """Once on each database: what these decide."""
    made = Books(log_settings, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def mariadb_books(mariadb_log, monkeypatch):
    made = Books(mariadb_log, monkeypatch)
    yield made
    made.close()


@pytest.fixture
def sqlite_books(sqlite_log, monkeypatch):
    """For what a handler does, which is the same on all."""
    made = Books(sqlite_log, monkeypatch)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("what", "entries"),
    [
        ("commits", ["booked"]),
        ("commits_not", ["booked"]),
        ("does_nothing", []),
        ("rolls_back_first", ["booked"]),
        ("uses_savepoints", ["booked"]),
        ("reads_afterwards", ["booked"]),
        ("commits_nothing_first", ["booked"]),
        ("catches_another_error", ["booked"]),
    ],
)
def test_what_was_handled_does_not_run_again(sqlite_books, what, entries):
    books = sqlite_books
    message_id = books.send(what)
    books.ends(message_id, "completed")

    books.comes_again(message_id)
    books.idle()

    assert runs == [message_id]
    assert books.entries(message_id) == entries
    assert books.handled() == {message_id: "ledger.book"}


def test_what_was_handled_is_no_run_in_metrics_and_traces(sqlite_books, monkeypatch):
    books = sqlite_books
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(traces, "_tracer", lambda: provider.get_tracer("test"))
    message_id = books.send("commits")
    books.ends(message_id, "completed")
    books.comes_again(message_id)
    books.idle()

    handler, _ = books.leases[message_id]
    counts = handler.queue_consumer.counts
    wait_until(lambda: counts.handled.total() == 2, 10, lambda: counts.handled)
    assert {status for _, status in counts.handled} == {DeliveryStatus.COMPLETED}
    its_runs = [h for s, h in counts.handler_seconds if s == handler.subscription]
    assert [sum(each.counts) for each in its_runs] == [1]
    names = [span.name for span in exporter.get_finished_spans()]
    assert sorted(names) == ["dispatch ledger", "handle ledger"]


def test_one_that_fails_before_its_commit_left_nothing_behind(sqlite_books):
    books = sqlite_books
    message_id = books.send("raises_before")

    books.ends(message_id, "failed")

    assert books.error(message_id) == "ValueError"
    assert (books.entries(message_id), books.handled()) == ([], {})
    books.comes_again(message_id)
    books.idle()
    assert runs == [message_id, message_id]


@pytest.mark.parametrize("what", ["raises_after", "commits_twice"])
def test_one_that_fails_after_its_commit_is_a_dead_letter_at_once(sqlite_books, what):
    books = sqlite_books
    message_id = books.send(what)

    books.ends(message_id, "failed")
    books.comes_again(message_id)
    books.idle()

    assert books.error(message_id) == "InboxError"
    assert runs == [message_id]
    assert books.entries(message_id) == ["booked"]


@pytest.mark.parametrize("what", ["waits_before", "catches_all", "catches_without_rollback"])
def test_of_two_workers_with_one_message_one_has_its_effects(books, what):
    message_id = books.send(what)
    GATES["begun"].wait()
    GATES["begun"] = Event()
    books.comes_again(message_id)
    GATES["begun"].wait()
    with books.engine.begin() as connection:
        # what one of them is to find: it looked for it, and there was nothing
        row = {"message_id": message_id, "subscriber": "ledger.book"}
        if what == "catches_without_rollback":
            connection.execute(insert(inbox), [row])

    GATES["go"].send(None)
    books.ends(message_id, "completed")
    books.idle()

    assert runs == [message_id, message_id]
    assert books.entries(message_id) == ([] if what == "catches_without_rollback" else ["booked"])


def test_who_goes_on_after_a_deadlock_is_not_committed_without_its_note(
    mariadb_books, mariadb_server
):
    """Given a handler that catches what the database says, which rolled back the note as well."""
    books = mariadb_books
    with books.engine.begin() as connection:
        both = [{"id": n, "message_id": "", "what": "old"} for n in (1, 2)]
        connection.execute(insert(Entry), both)
    message_id = books.send("catches_a_deadlock")
    GATES["begun"].wait()

    def do_more():
        # of two who wait for each other, the one that changed less is rolled back
        more = [{"message_id": "", "what": "more"}] * 300
        with books.engine.begin() as connection:
            connection.execute(insert(Entry), more)
            for n in (2, 1):
                connection.execute(update(Entry).where(Entry.id == n).values(what="theirs"))

    other = eventlet.spawn(do_more)
    waits = "SHOW STATUS LIKE 'Innodb_row_lock_current_waits'"
    wait_until(lambda: int(mariadb_server.execute(waits)[0][1]), 10, "the lock")
    GATES["go"].send(None)
    other.wait()

    books.ends(message_id, "failed")
    assert books.error(message_id) == "Retry"
    assert books.entries(message_id) == []
    assert books.handled() == {}


@pytest.mark.parametrize("commits", [True, False])
def test_who_meets_another_that_has_not_committed_yet_waits_for_it(
    mariadb_books, mariadb_server, commits
):
    books = mariadb_books
    message_id = books.send("waits_before")
    GATES["begun"].wait()
    with books.engine.connect() as first:
        transaction = first.begin()
        first.execute(insert(inbox), [{"message_id": message_id, "subscriber": "ledger.book"}])
        GATES["go"].send(None)
        waits = "SHOW STATUS LIKE 'Innodb_row_lock_current_waits'"
        wait_until(lambda: int(mariadb_server.execute(waits)[0][1]), 10, "the lock")
        (transaction.commit if commits else transaction.rollback)()

    books.ends(message_id, "completed")
    assert books.entries(message_id) == ([] if commits else ["booked"])


def test_a_batch_runs_with_those_that_were_not_handled(sqlite_books):
    books = sqlite_books
    ids = [books.send(str(n), "entries.made") for n in range(4)]
    for message_id in ids:
        books.ends(message_id, "completed")
    with books.engine.begin() as connection:
        connection.execute(delete(inbox).where(inbox.c.message_id == ids[1]))
        connection.execute(delete(Entry).where(Entry.message_id == ids[1]))
    runs.clear()

    books.comes_again(*ids)
    books.idle()
    wait_until(lambda: runs, 5, "the batch")
    books.idle()

    assert runs == [[ids[1]]]
    assert [books.entries(each) for each in ids] == [["0"], ["1"], ["2"], ["3"]]
    assert set(books.handled()) == set(ids)


def test_with_a_session_of_its_own_a_message_is_handled_when_its_handler_returns(sqlite_books):
    books = sqlite_books
    sent, failed = books.send("go", "mail.wanted"), books.send("fail", "mail.wanted")
    books.ends(sent, "completed")
    books.ends(failed, "failed")

    assert books.error(failed) == "ValueError"
    assert books.handled() == {sent: "ledger.send"}


def test_rows_are_removed_when_they_are_old(books, monkeypatch):
    kept = books.send("commits")
    books.ends(kept, "completed")
    many = REMOVED_AT_ONCE + 10
    with books.engine.begin() as connection:
        old = connection.execute(select(inbox.c.handled_at)).scalar_one() - timedelta(days=31)
        row = {"subscriber": "ledger.book", "handled_at": old}
        connection.execute(insert(inbox), [{"message_id": f"old-{n}", **row} for n in range(many)])
    monkeypatch.setattr(inbox_module, "REMOVE_SECONDS", 0.0)
    for handler in books.container.entrypoints:
        handler._inbox._remove_at = 0.0

    books.ends(books.send("commits"), "completed")

    wait_until(lambda: len(books.handled()) == 2, 10, lambda: len(books.handled()))
    assert kept in books.handled()


def test_a_message_is_noted_once_for_each_subscriber(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for subscriber in ("a.b", "a.c"):
            connection.execute(insert(inbox), [{"message_id": "m", "subscriber": subscriber}])
        assert remove_old(connection, inbox, 1) == 0
        with pytest.raises(IntegrityError):
            connection.execute(insert(inbox), [{"message_id": "m", "subscriber": "a.b"}])
    engine.dispose()


class Without(DeclarativeBase):
    pass


@pytest.mark.parametrize(
    ("name", "base", "said"),
    [
        ("nope", Base, "ledger.book: inbox must name a DatabaseSession of the service (db), not"),
        ("message", Base, "ledger.book: inbox must name a DatabaseSession of the service (db), n"),
        ("db", Without, "ledger.book: there is no table ledger_inbox among those of db: see"),
    ],
)
def test_a_wrong_name_ends_the_start_with_one_line(sqlite_log, capsys, name, base, said):
    class Wrong:
        db = DatabaseSession(base)
        message = MessageContext()

        @event_handler("source", "thing.happened", inbox=name)
        def book(self, payload):
            pass

    Wrong.name = "ledger"
    container = ServiceContainer(Wrong, dict(sqlite_log))

    with pytest.raises(SystemExit) as ended:
        container.start()

    assert ended.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"Error: {said}")
    # a process would end here; in this one the others' setup goes on, and connects
    [db] = [each for each in container.dependencies if isinstance(each, DatabaseSession)]
    wait_until(lambda: hasattr(db, "Session"), 10, "the session to be set up")
    db.stop()
