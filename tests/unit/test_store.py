"""The message log, on SQLite and on MariaDB: its tables, and each step of an event's way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import Mock

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from eventlet import patcher
from pymysql.err import OperationalError
from sqlalchemy import Engine, inspect, select, text, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from shared.database import (
    CommitUncertainError,
    Transaction,
    database_url,
    is_transient,
    make_engine,
)
from shared.errors import MessageNotFoundError, NothingToRetryError
from shared.lifecycle import MAX_TAKEOVERS, DeliveryStatus
from shared.mysql import NativeConnection
from shared.native import sleep
from shared.settings import load_settings
from shared.store import attempts, log, repair, subscriptions
from shared.store.migrate import LOG, upgrade
from shared.store.summary import refresh
from shared.tables import MESSAGE_COLUMNS, envelope_of, metadata
from shared.tables import deliveries as deliveries_table
from shared.tables import messages as messages_table
from shared.tables import subscriptions as subscriptions_table
from shared.testing.servers import MariaDBDatabase, MariaDBServer
from shared.types import (
    MAX_JSON_DEPTH,
    Delivery,
    Envelope,
    Failure,
    Lease,
    Outcome,
    Priority,
    SettleAction,
    Subscription,
)
from tests.support.monitoring import FAILED_MESSAGES, PERFORMANCE, QUEUE_STATISTICS
from tests.support.waiting import wait_until
from tests.unit.message_log import (
    BOOM,
    COMPLETED,
    FAILED,
    PENDING,
    PROCESSING,
    RETRY,
    Log,
    event,
)

native_threading = patcher.original("threading")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_mariadb(mariadb_log: Mapping[str, str], mariadb_server: MariaDBServer) -> Iterator[Log]:
    made = Log(mariadb_log, mariadb_server)
    yield made
    made.database.close()


@pytest.fixture
def delivery(store: Log) -> Delivery:
    """One delivery that waits."""
    store.subscribe()
    return store.append(event())[0]


def leases(deliveries: Sequence[Delivery], token: int = 1) -> list[Lease]:
    return [Lease(delivery, token) for delivery in deliveries]


class Meanwhile:
    """Does a step in a native thread, with a connection of its own."""

    def __init__(self, store: Log, step: Callable[[Log], Any]) -> None:
        self._outcome: list[Any] = []
        self._store = store
        self._step = step
        self._thread = native_threading.Thread(target=self._run)
        self._thread.start()

    def until_blocked(self) -> None:
        """Wait until it waits for somebody's lock, or is done."""
        # on SQLite nobody can tell; there it has to be right either way
        if not self._store.database.is_sqlite:
            wait_until(
                lambda: self._outcome or self._store.waits_for_a_lock, 10, "a transaction to wait"
            )

    def result(self) -> Any:
        """Wait for its end; return what it returned, or raise what it raised."""
        wait_until(lambda: not self._thread.is_alive(), 20, "the other thread to end")
        [outcome] = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _run(self) -> None:
        other = Log(self._store.config)
        try:
            self._outcome.append(self._step(other))
        except BaseException as exc:
            self._outcome.append(exc)
        finally:
            other.database.close()


# --- the tables


@pytest.fixture(params=["sqlite", "mariadb"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Engine]]:
    """Two empty databases."""
    if request.param == "sqlite":
        configs = [{"QUEUE_DATA_DIR": str(tmp_path / name)} for name in "ab"]
    else:
        server: MariaDBServer = request.getfixturevalue("mariadb_server")
        configs = [dict(server.create_database().environment) for _ in "ab"]
    made = [make_engine(database_url(load_settings(config)), sleep) for config in configs]
    yield made
    for engine in made:
        engine.dispose()


def ask(engine: Engine, query: str) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text(query)).all())


def definitions(engine: Engine) -> list[str]:
    """Return how each table of the log, and each index, is defined."""
    if engine.dialect.name == "sqlite":
        found = ask(engine, "SELECT tbl_name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        lines = [
            column
            for name, sql in found
            if name in metadata.tables
            for line in sql.splitlines()
            # one that was added later stands in the line of the one before
            for column in re.split(r", (?=\w+ [A-Z])", line)
        ]
    else:
        shown = [ask(engine, f"SHOW CREATE TABLE {name}")[0][1] for name in metadata.tables]
        lines = [line for sql in shown for line in sql.splitlines()]
    # the order of indices is of no account
    return sorted(line.strip().rstrip(",") for line in lines)


class TestMigration:
    def test_makes_what_the_code_expects(self, engines: list[Engine]) -> None:
        engine = engines[0]
        assert upgrade(engine, LOG) == LOG.newest()
        options = {"version_table": LOG.version_table, "compare_type": True}
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=options)
            assert compare_metadata(context, metadata) == []

    def test_defines_it_word_for_word_as_the_code_does(self, engines: list[Engine]) -> None:
        """Constraints, defaults and partial indices are not among what Alembic compares."""
        migrated, made = engines
        upgrade(migrated, LOG)
        metadata.create_all(made)
        assert len(definitions(migrated)) > 50
        on_update = " ON UPDATE current_timestamp()"
        assert [line.replace(on_update, "") for line in definitions(migrated)] == definitions(made)

    def test_twice_does_nothing(self, engines: list[Engine]) -> None:
        engine = engines[0]
        upgrade(engine, LOG)
        before = definitions(engine)
        assert upgrade(engine, LOG) is None
        assert definitions(engine) == before

    def test_leaves_a_newer_database_alone(self, engines: list[Engine]) -> None:
        engine = engines[0]
        upgrade(engine, LOG)
        with engine.begin() as connection:
            connection.execute(text(f"UPDATE {LOG.version_table} SET version_num = '9999'"))
        assert upgrade(engine, LOG) is None
        with engine.connect() as connection:
            assert LOG.current(connection) == "9999"

    def test_knows_where_a_database_is(self, engines: list[Engine]) -> None:
        engine = engines[0]
        with engine.connect() as connection:
            assert LOG.current(connection) is None
        upgrade(engine, LOG)
        with engine.connect() as connection:
            assert LOG.current(connection) == LOG.newest()

    def test_of_what_is_up_to_date_needs_no_lock(self, engines: list[Engine]) -> None:
        """Given somebody who writes for longer than others wait for the lock."""
        engine = engines[0]
        upgrade(engine, LOG)
        with engine.begin():
            assert upgrade(engine, LOG) is None

    def test_by_several_processes_on_one_file(self, tmp_path: Path) -> None:
        """Given processes that all start at once on a file that is not there yet."""
        script = (
            "import sys, time; from shared.database import *; from shared.settings import *;"
            "from shared.store.migrate import *; import alembic.command;"
            "engine = make_engine(database_url(load_settings({'QUEUE_DATA_DIR': sys.argv[1]})),"
            " time.sleep); print('ready', flush=True); sys.stdin.readline();"
            "upgrade_sqlite(engine, LOG); print('done')"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=60) for process in processes]
        assert said == [("done\n", "")] * 3
        engine = make_engine(database_url(load_settings({"QUEUE_DATA_DIR": str(tmp_path)})), sleep)
        assert set(inspect(engine).get_table_names()) == {*metadata.tables, LOG.version_table}
        assert upgrade(engine, LOG) is None
        engine.dispose()


SEED_TABLE = """
CREATE TABLE seed_messages (
    id VARCHAR(36) PRIMARY KEY,
    queue_name VARCHAR(255) NOT NULL,
    message_type VARCHAR(255) NOT NULL,
    payload JSON NOT NULL,
    status ENUM('pending', 'processing', 'completed', 'failed', 'retry') DEFAULT 'pending',
    priority ENUM('low', 'normal', 'high', 'urgent') DEFAULT 'normal',
    retry_count INT DEFAULT 0,
    max_retries INT DEFAULT 3,
    processed_at TIMESTAMP NULL,
    scheduled_at TIMESTAMP NULL,
    error_message TEXT NULL,
    metadata JSON NULL,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    updated_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP
);
"""
"""``queue_messages`` as the system had it that this one succeeds, but for the name."""


class TestSeedTable:
    def test_has_these_columns_and_no_others(
        self, mariadb_server: MariaDBServer, mariadb_database: MariaDBDatabase
    ) -> None:
        engine = make_engine(database_url(load_settings(mariadb_database.environment)), sleep)
        upgrade(engine, LOG)
        with engine.begin() as connection:
            connection.execute(text(SEED_TABLE))
        columns = """
            SELECT column_name, ordinal_position, column_type, is_nullable, column_default,
                   extra, column_key = 'PRI'
            FROM information_schema.columns
            WHERE table_schema = DATABASE() AND table_name = '{}' ORDER BY ordinal_position
        """
        ours, seeds = (
            ask(engine, columns.format(table)) for table in ("queue_messages", "seed_messages")
        )
        engine.dispose()
        assert len(seeds) == 14
        assert ours == seeds
        assert ours[-1].extra == "on update current_timestamp()"
        assert ours[4].column_type == "enum('pending','processing','completed','failed','retry')"


class TestSeedQueries:
    """The three monitoring queries, unchanged, against ten messages of known ages."""

    @pytest.fixture
    def monitored(self, on_mariadb: Log) -> Log:
        on_mariadb.subscribe("placed")
        on_mariadb.subscribe("paid")
        placed = on_mariadb.append(*[event("placed") for _ in range(4)])
        paid = on_mariadb.append(*[event("paid") for _ in range(2)])
        old = on_mariadb.append(event("placed"))
        for each in (*placed[:2], paid[0], *old):
            on_mariadb.attempt(each, COMPLETED)
        on_mariadb.attempt(placed[2], RETRY)
        on_mariadb.attempt(placed[2], FAILED, Failure("E", "first"), token=2)
        on_mariadb.attempt(paid[1], FAILED, Failure("E", "second"))
        for each, seconds in ((placed[0], 2), (placed[1], 4), (paid[0], 10)):
            age(on_mariadb, each, created=200, processed=200 - seconds)
        age(on_mariadb, placed[2], created=120, processed=100)
        age(on_mariadb, paid[1], created=60, processed=50)
        age(on_mariadb, old[0], created=3700, processed=3600)
        self.failed = [paid[1].message.id, placed[2].message.id]
        return on_mariadb

    def test_count_by_status(self, monitored: Log) -> None:
        rows = ask(monitored.database.engine, QUEUE_STATISTICS)
        # (2 + 4 + 10) / 3; the old one is not of this hour
        assert {row.status: (row.queue_name, row.count) for row in rows} == {
            "completed": ("orders", 3),
            "failed": ("orders", 2),
            "pending": ("orders", 1),
        }
        averages = {row.status: row.avg_processing_time for row in rows}
        assert float(averages["completed"]) == pytest.approx(16 / 3, abs=0.001)
        assert averages["failed"] == 15
        assert averages["pending"] is None

    def test_list_what_failed(self, monitored: Log) -> None:
        rows = ask(monitored.database.engine, FAILED_MESSAGES)
        assert [row.id for row in rows] == self.failed
        assert [row.message_type for row in rows] == ["paid", "placed"]
        assert [row.error_message for row in rows] == ["second", "first"]
        assert [row.retry_count for row in rows] == [0, 1]

    def test_analyse_how_long_it_took(self, monitored: Log) -> None:
        rows = ask(monitored.database.engine, PERFORMANCE)
        found = {row.message_type: (row.max_time, row.total_messages) for row in rows}
        assert found == {"placed": (100, 3), "paid": (10, 1)}
        averages = {row.message_type: float(row.avg_time) for row in rows}
        assert averages == {"placed": pytest.approx(106 / 3, abs=0.001), "paid": 10}

    def test_updates_say_when(self, on_mariadb: Log) -> None:
        """Whoever changes a row by hand leaves the time of it, as the table always did."""
        [waiting] = on_mariadb.subscribe() and on_mariadb.append(event())
        age(on_mariadb, waiting, created=100, processed=None)
        with on_mariadb.database.transaction() as tx:
            tx.connection.execute(text("UPDATE queue_messages SET max_retries = 5"))
        row = on_mariadb.message(waiting.message.id)
        assert (row.updated_at - row.created_at).total_seconds() == pytest.approx(100, abs=3)


def age(store: Log, delivery: Delivery, *, created: float, processed: float | None) -> None:
    """Pretend that a message was stored and processed so many seconds ago."""

    def step(tx: Transaction) -> None:
        tx.connection.execute(
            update(messages_table)
            .where(messages_table.c.id == delivery.message.id)
            .values(
                created_at=tx.later(-created),
                processed_at=None if processed is None else tx.later(-processed),
                updated_at=tx.later(-created),
            )
        )

    store.do(step)


# --- dispatch


class TestRead:
    def test_goes_on_when_the_server_ended_its_connection(self, on_mariadb: Log) -> None:
        def number_of_connection(tx: Any) -> int:
            return int(tx.connection.scalar(text("SELECT CONNECTION_ID()")))

        ended = on_mariadb.database.read(number_of_connection)
        assert on_mariadb.server is not None
        on_mariadb.server.execute(f"KILL {ended}")
        assert on_mariadb.database.read(number_of_connection) != ended


class TestAppend:
    @pytest.mark.parametrize("body", ["0", "1.0", "-0", "12345678901234567890", "1e5", "null"])
    def test_keeps_a_payload_that_is_a_mere_number_as_it_is(self, store: Log, body: str) -> None:
        sent = event(body=body)
        store.append(sent)
        assert store.message(sent.id).payload == body

    def test_stores_a_message_and_a_delivery_for_each_subscription(self, store: Log) -> None:
        ours, theirs = store.subscribe(), store.subscribe(subscriber="other.note")
        store.subscribe("paid")
        sent = event(body='{"name":"Zoë \\"🚲\\""}', priority=Priority.HIGH, metadata={"by": "Ü"})
        first, second = store.append(sent)
        assert (first.subscription_id, second.subscription_id) == (ours.id, theirs.id)
        assert 0 < first.seq < second.seq
        row = store.message(sent.id)
        assert row.queue_name == "orders"
        assert row.message_type == "placed"
        assert row.payload == sent.body
        assert (row.status, row.priority, row.retry_count, row.max_retries) == (
            "pending",
            "high",
            0,
            3,
        )
        assert json.loads(row.metadata) == {"by": "Ü"}
        assert (row.processed_at, row.scheduled_at, row.error_message) == (None, None, None)
        assert row.created_at == row.updated_at
        for each in (first, second):
            assert each.message.id == sent.id
            kept = store.delivery(each.seq)
            assert (kept.status, kept.attempts, kept.takeovers) == ("pending", 0, 0)
            assert (kept.priority_rank, kept.ready, kept.lease_token) == (1, False, 0)

    def test_numbers_deliveries_in_the_order_of_dispatch(self, store: Log) -> None:
        store.subscribe()
        sent = [event() for _ in range(50)]
        # ids that do not sort as they were dispatched
        shuffled = [*sent[25:], *sent[:25]]
        stored = store.append(*shuffled)
        assert [each.message.id for each in stored] == [each.id for each in shuffled]
        assert [each.seq for each in stored] == sorted(each.seq for each in stored)

    def test_takes_the_time_from_the_database(self, store: Log) -> None:
        store.subscribe()
        [stored] = store.append(event())
        now = store.do(lambda tx: tx.now)
        created_at = stored.message.created_at
        assert created_at is not None
        assert timedelta() <= now - created_at < timedelta(seconds=5)

    def test_completes_what_nobody_subscribes_to(self, store: Log) -> None:
        sent = event("unheard-of")
        assert store.append(sent) == []
        row = store.message(sent.id)
        assert row.status == "completed"
        assert row.processed_at is not None

    def test_keeps_a_schedule(self, store: Log) -> None:
        store.subscribe()
        now = store.do(lambda tx: tx.now)
        at = (now + timedelta(hours=1)).replace(microsecond=0)
        scheduled, delayed, past, none = store.append(
            event(scheduled_at=at),
            event(delay=60),
            event(scheduled_at=now - timedelta(hours=1)),
            event(delay=0),
        )
        assert scheduled.delay == pytest.approx(3600, abs=5)
        assert store.message(scheduled.message.id).scheduled_at == at
        assert store.delivery(scheduled.seq).available_at == at
        assert delayed.delay == pytest.approx(60, abs=0.001)
        due = store.message(delayed.message.id).scheduled_at
        assert due - now == pytest.approx(timedelta(seconds=60), abs=timedelta(seconds=5))
        assert [past.delay, none.delay] == [0, 0]
        assert [store.delivery(each.seq).available_at for each in (past, none)] == [None, None]

    def test_keeps_what_the_dispatch_said_of_retries(self, store: Log) -> None:
        store.subscribe()
        said, unsaid = store.append(event(max_retries=7, metadata={"a": 1}), event())
        assert store.message(said.message.id).max_retries == 7
        assert store.message(unsaid.message.id).max_retries == 3
        query = select(*MESSAGE_COLUMNS).order_by(messages_table.c.id)
        again = [
            envelope_of(row) for row in store.do(lambda tx: tx.connection.execute(query).all())
        ]
        assert [each.max_retries for each in again] == [7, None]
        assert again[0].metadata["a"] == 1
        assert again[1].metadata == {}

    def test_gives_back_the_envelope(self, store: Log) -> None:
        store.subscribe()
        [sent] = store.append(
            event(body='{"a":[1,2]}', priority=Priority.URGENT, metadata={"version": "1"}, delay=60)
        )
        row = store.do(lambda tx: tx.connection.execute(select(*MESSAGE_COLUMNS)).one())
        second = timedelta(seconds=1)
        again = envelope_of(row)
        assert sent.message.created_at is not None
        assert sent.message.scheduled_at is not None
        assert again.created_at == pytest.approx(sent.message.created_at, abs=second)
        assert again.scheduled_at == pytest.approx(sent.message.scheduled_at, abs=second)
        times = {"created_at": None, "scheduled_at": None}
        assert replace(again, **times) == replace(sent.message, **times)

    @pytest.mark.parametrize("size", [100_000, 1_048_574])
    def test_stores_the_largest_payload(self, store: Log, size: int) -> None:
        store.subscribe()
        sent = event(body=f'"{"x" * size}"')
        store.append(sent)
        assert store.message(sent.id).payload == sent.body

    @pytest.mark.parametrize("depth", [31, 32, 33, MAX_JSON_DEPTH])
    def test_stores_the_deepest_payload(self, store: Log, depth: int) -> None:
        store.subscribe()
        sent = event(body="[" * depth + "]" * depth)
        store.append(sent)
        assert store.message(sent.id).payload == sent.body

    @pytest.mark.parametrize(
        "body", ["5", "-0.0", "1.50", "1e400", "12345678901234567890", '"5"', "true", "null"]
    )
    def test_stores_a_payload_as_it_is_written(self, store: Log, body: str) -> None:
        store.subscribe()
        sent = event(body=body)
        store.append(sent)
        assert store.message(sent.id).payload == body

    def test_of_many_is_all_or_nothing(self, store: Log) -> None:
        store.subscribe()
        good, twice = event(), event()
        with pytest.raises(IntegrityError):
            store.append(good, twice, twice)
        assert store.rows(messages_table) == store.rows(deliveries_table) == []

    def test_again_leaves_alone_what_is_stored(self, store: Log) -> None:
        store.subscribe()
        old, new = event(), event()
        store.append(old)
        assert [each.message.id for each in store.append(old, new, again=True)] == [new.id]
        assert store.append(old, new, again=True) == []
        assert len(store.rows(messages_table)) == len(store.rows(deliveries_table)) == 2

    def test_again_sees_what_is_stored_at_the_same_time(self, store: Log) -> None:
        """Given a relay that is about to commit, when another hands the same over."""
        store.subscribe()
        sent = event()
        with store.database.transaction() as tx:
            assert len(log.append(tx, [sent], 3, again=True)) == 1
            other = Meanwhile(
                store, lambda each: persistently(lambda: each.append(sent, again=True))
            )
            other.until_blocked()
        assert other.result() == []
        assert len(store.rows(deliveries_table)) == 1

    def test_tells_names_apart_that_differ_in_case(self, store: Log) -> None:
        lower, upper = store.subscribe("placed"), store.subscribe("Placed")
        assert lower.id != upper.id
        assert [each.subscription_id for each in store.append(event("placed"))] == [lower.id]
        assert [each.subscription_id for each in store.append(event("Placed"))] == [upper.id]


T = TypeVar("T")


def persistently(step: Callable[[], T]) -> T:
    """Do what the pump does: again, what may succeed when it is done again."""
    while True:
        try:
            return step()
        except SQLAlchemyError as exc:
            if not is_transient(exc):
                raise


class TestAppendAsTheLast:
    """Given that nothing else comes in the transaction."""

    def last(self, store: Log, *envelopes: Envelope) -> list[Delivery]:
        return store.do(log.append, envelopes, 3, is_last=True)

    def test_is_stored_with_its_commit(self, store: Log) -> None:
        first, second = store.subscribe(), store.subscribe(subscriber="shop.count")
        sent = [event(), event()]
        ids = [each.subscription_id for each in self.last(store, *sent)]
        assert ids == [first.id, second.id] * 2
        assert [each.id for each in store.rows(messages_table)] == [each.id for each in sent]

    def test_takes_one_round_trip(self, on_mariadb: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        on_mariadb.subscribe()
        on_mariadb.database.ping()
        trips = Mock(wraps=NativeConnection._execute_command)
        monkeypatch.setattr(NativeConnection, "_execute_command", lambda *args: trips(*args))
        with on_mariadb.database.transaction(reckons=True) as tx:
            log.append(tx, [event()], 3, is_last=True)
        assert trips.call_count == 1

    def test_stores_nothing_where_the_server_refuses_any_of_it(self, store: Log) -> None:
        store.subscribe()
        good, twice = event(), event()
        with pytest.raises(IntegrityError):
            self.last(store, good, twice, twice)
        assert store.rows(messages_table) == []
        self.last(store, good)
        assert len(store.rows(messages_table)) == 1

    @pytest.mark.parametrize("are_rows_read", [True, False])
    def test_is_of_unknown_fate_when_the_connection_breaks(
        self, on_mariadb: Log, monkeypatch: pytest.MonkeyPatch, are_rows_read: bool
    ) -> None:
        on_mariadb.subscribe()
        read = NativeConnection._read_rows

        def broken(connection: Any) -> list[list[Any]]:
            rows = read(connection) if are_rows_read else []
            connection._force_close()
            # what follows had most likely come along
            connection._received, connection._place = b"", 0
            if not are_rows_read:
                raise OperationalError(2013, "it broke")
            return rows

        sent = event()
        with monkeypatch.context() as patch:
            patch.setattr(NativeConnection, "_read_rows", broken)
            with pytest.raises(CommitUncertainError):
                self.last(on_mariadb, sent)
        wait_until(lambda: on_mariadb.do(log.stored_ids, [sent.id]), 10, "its COMMIT")

    def test_is_stored_whatever_follows(self, on_mariadb: Log) -> None:
        on_mariadb.subscribe()
        sent = event()

        def step(tx: Transaction) -> None:
            log.append(tx, [sent], 3, is_last=True)
            log.stored_ids(tx, [sent.id])

        with pytest.raises(CommitUncertainError, match="its COMMIT went with"):
            on_mariadb.do(step)
        assert on_mariadb.do(log.stored_ids, [sent.id]) == {sent.id}


# --- attempts


class TestStart:
    def test_notes_who_began_when(self, store: Log, delivery: Delivery) -> None:
        [lease] = leases([delivery])
        started = store.start(lease, worker="host:42")
        assert (started.run, started.settled) == ([lease], [])
        row = store.delivery(delivery.seq)
        assert (row.status, row.worker, row.lease_token) == ("processing", "host:42", 1)
        assert row.started_at is not None
        assert row.available_at is None
        assert store.message(delivery.message.id).status == "processing"

    @pytest.mark.parametrize(
        ("status", "action"),
        [
            (COMPLETED, SettleAction.ACKNOWLEDGE),
            (FAILED, SettleAction.DEAD_LETTER),
        ],
    )
    def test_settles_as_stored_what_comes_again(
        self, store: Log, delivery: Delivery, status: DeliveryStatus, action: SettleAction
    ) -> None:
        """Given an outcome that was stored by somebody who then died."""
        store.attempt(delivery, status)
        before = store.delivery(delivery.seq)
        started = store.start(Lease(delivery, 2))
        assert started.run == []
        assert [(each.lease.token, each.action) for each in started.settled] == [(2, action)]
        assert store.delivery(delivery.seq) == before
        assert store.message(delivery.message.id).status == status

    def test_settles_what_was_discarded(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, RETRY)
        store.do(subscriptions.retire, [delivery.subscription_id])
        started = store.start(Lease(delivery, 2))
        assert [each.action for each in started.settled] == [SettleAction.ACKNOWLEDGE]
        assert store.delivery(delivery.seq).status == "discarded"

    def test_settles_what_nobody_knows(self, store: Log, delivery: Delivery) -> None:
        started = store.start(Lease(replace(delivery, seq=10**9), 2))
        assert [each.action for each in started.settled] == [SettleAction.ACKNOWLEDGE]

    def test_does_not_give_a_delivery_back_to_who_lost_it(
        self, store: Log, delivery: Delivery
    ) -> None:
        """Given a lease that ran out before its attempt began, and another that began."""
        lost, held = Lease(delivery, 1), Lease(delivery, 2)
        store.start(held, worker="new")
        store.start(lost, worker="old")
        stale, done = Outcome(lost, RETRY, BOOM), Outcome(held, COMPLETED)
        assert store.record(stale) == ([], [stale])
        assert store.record(done) == ([done], [])
        assert store.delivery(delivery.seq).status == "completed"


class TestTakeover:
    def test_burns_no_attempt(self, store: Log, delivery: Delivery) -> None:
        store.start(Lease(delivery, 1), worker="gone")
        started = store.start(Lease(delivery, 2), worker="new")
        assert [lease.token for lease in started.run] == [2]
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts, row.takeovers) == ("processing", 0, 1)
        assert (row.worker, row.lease_token) == ("new", 2)
        [lost] = store.history(delivery.seq)
        assert (lost.number, lost.outcome, lost.worker) == (1, "taken_over", "gone")
        assert lost.error_type == "WorkerLost"
        assert "gone" in lost.error_message

    def test_ten_times_makes_a_dead_letter(self, store: Log, delivery: Delivery) -> None:
        store.start(Lease(delivery, 1), worker="host:0")
        for number in range(1, MAX_TAKEOVERS):
            assert len(store.start(Lease(delivery, 1 + number), worker=f"host:{number}").run) == 1
        started = store.start(Lease(delivery, 11), worker="host:10")
        assert started.run == []
        assert [each.action for each in started.settled] == [SettleAction.DEAD_LETTER]
        row = store.delivery(delivery.seq)
        assert (row.status, row.takeovers, row.error_type) == ("failed", 10, "WorkerLost")
        assert "10 workers died with it" in row.error_message
        assert row.processed_at is not None
        message = store.message(delivery.message.id)
        assert message.status == "failed"
        assert message.error_message == row.error_message
        outcomes = [each.outcome for each in store.history(delivery.seq)]
        assert outcomes == ["taken_over"] * 9 + ["failed"]

    @pytest.mark.parametrize("is_apart", [False, True])
    def test_is_none_of_who_was_only_late(
        self, store: Log, delivery: Delivery, is_apart: bool
    ) -> None:
        """Given a broker that is lost again and again: each time living workers hand back late."""
        store.start(Lease(delivery, 1), worker="host:0")
        for token in range(2, 2 * MAX_TAKEOVERS):
            assert len(store.start(Lease(delivery, token), worker=f"host:{token}").run) == 1
            late = Outcome(Lease(delivery, token - 1), PENDING, Failure("Released", "lost"))
            if is_apart:
                refused = store.do(attempts.finish, [late], "host:1", 30.0)[1]
            else:
                refused = store.record(late)[1]
            assert refused == [late]
        row = store.delivery(delivery.seq)
        assert (row.status, row.takeovers) == ("processing", 0)

    def test_is_taken_back_once(self, store: Log, delivery: Delivery) -> None:
        """Given a worker that says again what was refused, and one that lost no lease."""
        for token in (1, 2, 4):  # nobody told of the third
            store.start(Lease(delivery, token))
        assert store.delivery(delivery.seq).takeovers == 2
        for token in (1, 3, 1):
            store.record(Outcome(Lease(delivery, token), COMPLETED))
            assert store.delivery(delivery.seq).takeovers == 1

    def test_that_makes_a_dead_letter_ends_its_lease(self, store: Log, delivery: Delivery) -> None:
        """Given a provider whose leases the log keeps."""
        for number in range(MAX_TAKEOVERS + 1):
            lease = Lease(delivery, 1 + number, redelivered=bool(number))
            started = store.do(attempts.start, [lease], f"host:{number}", held_for=30.0)
        assert [each.action for each in started.settled] == [SettleAction.DEAD_LETTER]
        row = store.delivery(delivery.seq)
        assert (row.status, row.lease_expires_at) == ("failed", None)

    def test_is_not_what_waits_for_its_retry(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, RETRY)
        store.start(Lease(delivery, 2))
        assert store.delivery(delivery.seq).takeovers == 0

    def test_is_not_what_was_handed_back(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, PENDING, Failure("Released", "the worker stopped"))
        store.start(Lease(delivery, 2))
        assert store.delivery(delivery.seq).takeovers == 0


class TestRecord:
    def test_completed(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, COMPLETED)
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts, row.error_message) == ("completed", 1, None)
        assert row.processed_at >= row.started_at
        message = store.message(delivery.message.id)
        assert (message.status, message.retry_count) == ("completed", 0)
        assert message.processed_at == pytest.approx(row.processed_at, abs=timedelta(seconds=1))
        assert store.history(delivery.seq) == []

    def test_retry(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, RETRY, BOOM, delay=60)
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts) == ("retry", 1)
        assert (row.error_type, row.error_message) == ("ValueError", "boom")
        assert row.processed_at is None
        [attempt] = store.history(delivery.seq)
        assert (attempt.number, attempt.outcome, attempt.worker) == (1, "retry", "host:1")
        assert (attempt.error_type, attempt.error_message) == ("ValueError", "boom")
        assert attempt.traceback == BOOM.traceback
        assert attempt.started_at == row.started_at
        assert attempt.retry_at == row.available_at
        # not before its time, though the database's own was heard some milliseconds late
        late = attempt.retry_at - attempt.ended_at - timedelta(seconds=60)
        assert timedelta() <= late < timedelta(seconds=1)
        message = store.message(delivery.message.id)
        assert (message.status, message.retry_count) == ("retry", 1)
        assert (message.processed_at, message.error_message) == (None, "boom")

    def test_failed(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, FAILED, BOOM)
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts, row.error_message) == ("failed", 1, "boom")
        assert row.processed_at is not None
        [attempt] = store.history(delivery.seq)
        assert (attempt.number, attempt.outcome, attempt.retry_at) == (1, "failed", None)
        message = store.message(delivery.message.id)
        assert (message.status, message.retry_count, message.error_message) == ("failed", 0, "boom")
        assert message.processed_at is not None

    def test_handed_back(self, store: Log, delivery: Delivery) -> None:
        released = Failure("Released", "the worker stopped")
        store.attempt(delivery, PENDING, released)
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts, row.processed_at) == ("pending", 0, None)
        [attempt] = store.history(delivery.seq)
        assert (attempt.number, attempt.outcome) == (1, "released")
        assert store.message(delivery.message.id).status == "pending"

    def test_handed_back_on_a_later_attempt(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, RETRY)
        store.attempt(delivery, PENDING, Failure("Released", "stopped"), token=2)
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts) == ("retry", 1)

    def test_writes_the_history_of_several_attempts(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, RETRY, Failure("A", "first"))
        store.attempt(delivery, RETRY, Failure("B", "second"), token=2)
        store.attempt(delivery, COMPLETED, token=3)
        rows = [(each.number, each.error_message) for each in store.history(delivery.seq)]
        assert rows == [(1, "first"), (2, "second")]
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts, row.error_message) == ("completed", 3, None)
        message = store.message(delivery.message.id)
        assert (message.retry_count, message.error_message) == (2, None)

    def test_refuses_who_lost_the_lease(self, store: Log, delivery: Delivery) -> None:
        lost, held = Lease(delivery, 1), Lease(delivery, 2)
        store.start(lost)
        store.start(held)
        before = store.delivery(delivery.seq)
        for status in (COMPLETED, RETRY, FAILED, PENDING):
            stale = Outcome(lost, status, BOOM)
            assert store.record(stale) == ([], [stale])
        # nothing but that it did not die
        unchanged = {**before._asdict(), "takeovers": 0}
        assert store.delivery(delivery.seq)._asdict() == unchanged
        assert len(store.history(delivery.seq)) == 1
        done = Outcome(held, COMPLETED)
        assert store.record(done) == ([done], [])

    @pytest.mark.parametrize("status", [COMPLETED, FAILED, RETRY, PENDING])
    def test_does_not_move_what_is_over(
        self, store: Log, delivery: Delivery, status: DeliveryStatus
    ) -> None:
        store.attempt(delivery, status, BOOM)
        before = store.delivery(delivery.seq), store.message(delivery.message.id)
        for again in (COMPLETED, RETRY, FAILED, PENDING):
            outcome = Outcome(Lease(delivery, 1), again, BOOM)
            assert store.record(outcome) == ([], [outcome])
        assert (store.delivery(delivery.seq), store.message(delivery.message.id)) == before

    @pytest.mark.parametrize("is_apart", [False, True])
    @pytest.mark.parametrize("status", [COMPLETED, FAILED, RETRY, PENDING])
    def test_of_two_outcomes_of_one_lease_stores_the_first(
        self, store: Log, delivery: Delivery, status: DeliveryStatus, is_apart: bool
    ) -> None:
        """A handler that lost its lease runs twice in a worker that got it again."""
        lease = Lease(delivery, 1)
        store.start(lease)
        first, second = Outcome(lease, status, BOOM), Outcome(lease, RETRY, BOOM)
        if is_apart:
            assert store.do(attempts.finish, [first, second], "w", 0.0)[:2] == ([first], [second])
        else:
            assert store.record(first, second) == ([first], [second])
        row = store.delivery(delivery.seq)
        assert (row.status, row.attempts) == (status, 0 if status == PENDING else 1)
        assert len(store.history(delivery.seq)) == (0 if status == COMPLETED else 1)

    def test_refuses_what_was_never_started(self, store: Log, delivery: Delivery) -> None:
        outcome = Outcome(Lease(delivery, 0), COMPLETED)
        assert store.record(outcome) == ([], [outcome])
        assert store.delivery(delivery.seq).status == "pending"

    def test_stores_many_at_once_each_in_its_own_way(self, store: Log) -> None:
        store.subscribe()
        held = leases(store.append(*[event() for _ in range(8)]))
        store.start(*held)
        statuses = [COMPLETED, RETRY, FAILED, PENDING] * 2
        outcomes = [
            Outcome(lease, status, Failure("E", str(lease.delivery.seq)), delay=1)
            for lease, status in zip(held, statuses, strict=True)
        ]
        stale = Outcome(Lease(held[0].delivery, 99), COMPLETED)
        stored, refused = store.record(*outcomes, stale)
        assert (stored, refused) == (outcomes, [stale])
        for lease, status in zip(held, statuses, strict=True):
            row = store.delivery(lease.delivery.seq)
            assert row.status == status
            if status in (RETRY, FAILED):
                assert row.error_message == str(row.seq)

    @pytest.mark.parametrize("status", [RETRY, FAILED])
    @pytest.mark.parametrize(
        "words",
        [
            "",
            "x" * 300_000,
            "é🚲" * 50_000,
            "a\x00b",
            "not UTF-8: \udcff",
            "line\r\nbreak 'quoted' \"twice\" %s {} \\",
        ],
        ids=["empty", "long", "long-wide", "nul", "surrogate", "special"],
    )
    def test_stores_whatever_an_exception_says(
        self, store: Log, delivery: Delivery, status: DeliveryStatus, words: str
    ) -> None:
        """A handler's words must not keep its outcome from being stored."""
        store.attempt(delivery, status, Failure("E" * 300, words, words))
        row = store.delivery(delivery.seq)
        assert row.status == status
        assert row.error_message[:3] == words[:3]
        assert store.message(delivery.message.id).error_message == row.error_message

    @pytest.mark.parametrize("status", [RETRY, FAILED])
    def test_stores_a_failure_that_nobody_described(
        self, store: Log, delivery: Delivery, status: DeliveryStatus
    ) -> None:
        lease = Lease(delivery, 1)
        store.start(lease)
        outcome = Outcome(lease, status)
        assert store.record(outcome) == ([outcome], [])


# --- what a message says of its deliveries


class TestSummary:
    @pytest.mark.parametrize(
        ("one", "other", "status"),
        [
            (PENDING, PENDING, "pending"),
            (COMPLETED, PENDING, "pending"),
            (PROCESSING, PENDING, "processing"),
            (PROCESSING, COMPLETED, "processing"),
            (RETRY, PROCESSING, "retry"),
            (RETRY, COMPLETED, "retry"),
            (FAILED, RETRY, "failed"),
            (FAILED, COMPLETED, "failed"),
            (COMPLETED, COMPLETED, "completed"),
        ],
    )
    def test_status_is_that_of_the_loudest(
        self, store: Log, one: DeliveryStatus, other: DeliveryStatus, status: str
    ) -> None:
        store.subscribe(), store.subscribe(subscriber="other.note")
        for order in ((one, other), (other, one)):
            both = store.append(event())
            for each, wanted in zip(both, order, strict=True):
                if wanted is PROCESSING:
                    store.start(Lease(each, 1))
                elif wanted is not PENDING:
                    store.attempt(each, wanted)
            assert store.message(both[0].message.id).status == status

    def test_counts_the_most_retries(self, store: Log) -> None:
        store.subscribe(), store.subscribe(subscriber="other.note")
        ours, theirs = store.append(event())
        store.attempt(ours, RETRY)
        store.attempt(theirs, RETRY)
        store.attempt(theirs, RETRY, token=2)
        store.attempt(ours, COMPLETED, token=2)
        assert store.message(ours.message.id).retry_count == 2
        store.attempt(theirs, COMPLETED, token=3)
        assert store.message(ours.message.id).retry_count == 2

    def test_takes_the_last_end(self, store: Log) -> None:
        store.subscribe(), store.subscribe(subscriber="other.note")
        ours, theirs = store.append(event())
        store.attempt(ours, COMPLETED)
        store.attempt(theirs, COMPLETED)
        for each, day in ((ours, 2), (theirs, 1)):
            change(store, each, processed_at=datetime(2031, 1, day))
        store.do(refresh, [ours.message.id])
        assert store.message(ours.message.id).processed_at == datetime(2031, 1, 2)

    def test_shows_the_newest_error(self, store: Log) -> None:
        """Of a delivery that is a dead letter, and of one that was tried after that."""
        store.subscribe(), store.subscribe(subscriber="other.note")
        ours, theirs = store.append(event())
        store.attempt(ours, FAILED, Failure("E", "older"))
        store.attempt(theirs, RETRY, Failure("E", "newer"))
        # both may be of one millisecond
        long_ago = datetime(2020, 1, 1)
        change(store, ours, started_at=long_ago, processed_at=long_ago)
        store.do(refresh, [ours.message.id])
        assert store.message(ours.message.id).error_message == "newer"

    def test_shows_no_error_once_all_is_well(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, RETRY)
        assert store.message(delivery.message.id).error_message == "boom"
        store.attempt(delivery, COMPLETED, token=2)
        assert store.message(delivery.message.id).error_message is None

    def test_says_when_it_changed(self, store: Log, delivery: Delivery) -> None:
        def backdate(tx: Transaction) -> None:
            tx.connection.execute(update(messages_table).values(updated_at=datetime(2020, 1, 1)))

        store.do(backdate)
        store.start(Lease(delivery, 1))
        assert store.message(delivery.message.id).updated_at > datetime(2026, 1, 1)

    def test_is_right_when_two_workers_end_at_once(self, on_mariadb: Log) -> None:
        """Given two workers with a delivery each of one message, whose commits overlap."""
        on_mariadb.subscribe(), on_mariadb.subscribe(subscriber="other.note")
        ours, theirs = leases(on_mariadb.append(event()))
        on_mariadb.start(ours, theirs)
        with on_mariadb.database.transaction() as tx:
            attempts.record(tx, [Outcome(ours, COMPLETED)])
            refresh(tx, [ours.delivery.message.id])
            other = Meanwhile(on_mariadb, lambda each: each.record(Outcome(theirs, COMPLETED)))
            other.until_blocked()
        assert len(other.result()[0]) == 1
        assert on_mariadb.message(ours.delivery.message.id).status == "completed"


def change(store: Log, delivery: Delivery, **values: Any) -> None:
    its = deliveries_table.c.seq == delivery.seq
    store.do(lambda tx: tx.connection.execute(update(deliveries_table).where(its).values(**values)))


# --- subscriptions


class TestRegister:
    def test_stores_what_is_new(self, store: Log) -> None:
        wanted = Subscription("orders", "shop", "placed", "singleton", "singleton", reliable=False)
        [made] = store.do(subscriptions.register, [wanted])
        assert made == replace(wanted, id=made.id)
        assert made.id > 0
        [row] = store.rows(subscriptions_table)
        assert (row.queue_name, row.source, row.message_type) == ("orders", "shop", "placed")
        assert (row.subscriber, row.handler_type, row.reliable) == ("singleton", "singleton", False)
        assert row.seen_at == row.created_at
        assert row.retired_at is row.paused_at is None

    def test_again_returns_the_same(self, store: Log) -> None:
        first, second = store.subscribe(), store.subscribe()
        assert first == second
        assert len(store.rows(subscriptions_table)) == 1

    def test_keeps_the_order(self, store: Log) -> None:
        wanted = [Subscription("orders", "shop", "placed", f"s.{n}") for n in (3, 1, 2)]
        store.do(subscriptions.register, [wanted[1]])
        made = store.do(subscriptions.register, wanted)
        assert [each.subscriber for each in made] == ["s.3", "s.1", "s.2"]

    def test_at_the_same_time_is_done_once(self, store: Log) -> None:
        """Given two processes of a service that start for the first time."""
        with store.database.transaction() as tx:
            wanted = Subscription("orders", "shop", "placed", "audit.note")
            [first] = subscriptions.register(tx, [wanted])
            other = Meanwhile(store, lambda each: each.subscribe())
            other.until_blocked()
        assert other.result() == first

    def test_takes_back_a_retirement(self, store: Log) -> None:
        subscription = store.subscribe()
        store.do(subscriptions.retire, [subscription.id])
        assert store.append(event()) == []
        assert store.subscribe() == subscription
        assert len(store.append(event())) == 1

    def test_does_not_take_back_a_pause(self, store: Log) -> None:
        subscription = store.subscribe()
        paused = update(subscriptions_table).values(paused_at=datetime(2026, 1, 1))
        store.do(lambda tx: tx.connection.execute(paused))
        assert store.subscribe() == subscription
        [row] = store.rows(subscriptions_table)
        assert row.paused_at is not None


class TestChanged:
    def test_are_those_of_another_reliability(self, store: Log) -> None:
        ours, others = store.subscribe(), store.subscribe(subscriber="other.note")
        wanted = [replace(ours, reliable=False), others, replace(ours, subscriber="new.note")]
        assert store.do(subscriptions.changed, wanted) == wanted[:1]
        assert store.do(subscriptions.changed, [replace(ours, queue="another")]) == []

    def test_are_none_of_the_retired(self, store: Log) -> None:
        ours = store.subscribe()
        store.do(subscriptions.retire, [ours.id])
        assert store.do(subscriptions.changed, [replace(ours, reliable=False)]) == []


class TestRetire:
    def test_discards_what_is_open(self, store: Log) -> None:
        ours, theirs = store.subscribe(), store.subscribe(subscriber="other.note")
        waiting, retried, running, done = (store.append(event()) for _ in range(4))
        store.attempt(retried[0], RETRY, delay=60)
        store.start(Lease(running[0], 1))
        store.attempt(done[0], COMPLETED)
        store.do(subscriptions.retire, [ours.id])
        found = [store.delivery(each[0].seq) for each in (waiting, retried, running, done)]
        assert [row.status for row in found] == ["discarded"] * 3 + ["completed"]
        assert all(row.processed_at for row in found)
        assert not any(row.ready or row.available_at or row.lease_expires_at for row in found)
        # what others have to do with it is left alone
        assert {store.delivery(each[1].seq).status for each in (waiting, retried)} == {"pending"}
        assert store.message(waiting[0].message.id).status == "pending"
        store.attempt(waiting[1], COMPLETED)
        assert store.message(waiting[0].message.id).status == "completed"
        assert [each.subscription_id for each in store.append(event())] == [theirs.id]

    def test_what_failed_for_it_is_not_retried(self, store: Log) -> None:
        ours, _ = store.subscribe(), store.subscribe(subscriber="other.note")
        first, second = store.append(event())
        store.attempt(first, FAILED)
        store.do(subscriptions.retire, [ours.id])
        with pytest.raises(NothingToRetryError):
            store.do(repair.retry_message, first.message.id)
        store.attempt(second, FAILED)
        again = store.do(repair.retry_message, first.message.id)
        assert [each.seq for each in again] == [second.seq]

    def test_ends_messages_that_waited_for_it_alone(self, store: Log, delivery: Delivery) -> None:
        store.do(subscriptions.retire, [delivery.subscription_id])
        message = store.message(delivery.message.id)
        assert message.status == "completed"
        assert message.processed_at is not None

    def test_while_another_delivery_ends_leaves_the_right_status(self, on_mariadb: Log) -> None:
        """Given a worker that is about to complete the other delivery of a message."""
        ours, theirs = on_mariadb.subscribe(), on_mariadb.subscribe(subscriber="other.note")
        done, waiting = on_mariadb.append(event())
        assert (done.subscription_id, waiting.subscription_id) == (ours.id, theirs.id)
        on_mariadb.start(Lease(done, 1))
        with on_mariadb.database.transaction() as tx:
            attempts.record(tx, [Outcome(Lease(done, 1), COMPLETED)])
            other = Meanwhile(on_mariadb, lambda each: each.do(subscriptions.retire, [theirs.id]))
            other.until_blocked()
            refresh(tx, [done.message.id])
        other.result()
        assert on_mariadb.delivery(waiting.seq).status == "discarded"
        assert on_mariadb.message(done.message.id).status == "completed"

    def test_discards_so_many_at_once(self, store: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(subscriptions, "MOST_AT_ONCE", 2)
        ours = store.subscribe()
        for _ in range(3):
            store.append(event())
        store.do(subscriptions.end, [ours.id])
        assert store.append(event()) == []
        assert store.do(subscriptions.discard, [ours.id]) is True
        assert [row.status for row in store.rows(deliveries_table)].count("pending") == 1
        assert store.do(subscriptions.discard, [ours.id]) is False
        assert {row.status for row in store.rows(deliveries_table)} == {"discarded"}

    def test_discards_nothing_of_what_goes_on(self, store: Log, delivery: Delivery) -> None:
        assert store.do(subscriptions.discard, [delivery.subscription_id]) is False
        assert store.delivery(delivery.seq).status == "pending"

    def test_discards_what_is_dispatched_meanwhile(self, on_mariadb: Log) -> None:
        """Given who saw the subscription before it was retired, and waits for its lock."""
        ours = on_mariadb.subscribe()
        with on_mariadb.database.transaction() as tx:
            subscriptions.end(tx, [ours.id])
            other = Meanwhile(on_mariadb, lambda each: each.append(event()))
            other.until_blocked()
        [late] = other.result()
        on_mariadb.do(subscriptions.discard, [ours.id])
        assert on_mariadb.delivery(late.seq).status == "discarded"
        assert on_mariadb.message(late.message.id).status == "completed"

    def test_waits_for_who_has_yet_to_commit(self, on_mariadb: Log) -> None:
        """Given who added a delivery after the subscription had ended."""
        ours, late = on_mariadb.subscribe(), event()
        on_mariadb.do(subscriptions.end, [ours.id])
        with on_mariadb.database.transaction() as tx:
            log.store(tx, [late], 3)
            log.add_deliveries(tx, [(late, ours.id)])
            assert log.stored_ids(tx, [late.id])  # what goes before it has been sent then
            other = Meanwhile(on_mariadb, lambda each: each.do(subscriptions.discard, [ours.id]))
            other.until_blocked()
        other.result()
        [row] = on_mariadb.rows(deliveries_table)
        assert row.status == "discarded"

    def test_twice_keeps_the_first_time(self, store: Log) -> None:
        subscription = store.subscribe()
        store.do(subscriptions.retire, [subscription.id])
        [before] = store.rows(subscriptions_table)
        store.do(subscriptions.retire, [subscription.id])
        assert store.rows(subscriptions_table) == [before]


class TestForgotten:
    def seen(self, store: Log, subscription: Subscription, seconds_ago: float) -> None:
        def step(tx: Transaction) -> None:
            its = subscriptions_table.c.id == subscription.id
            seen_at = tx.later(-seconds_ago)
            tx.connection.execute(update(subscriptions_table).where(its).values(seen_at=seen_at))

        store.do(step)

    def test_ends_unreliable_ones_whose_instance_is_gone(self, store: Log) -> None:
        reliable = store.subscribe(subscriber="a")
        gone = store.subscribe(subscriber="b", reliable=False)
        alive = store.subscribe(subscriber="c", reliable=False)
        store.append(event())
        for each, seconds in ((reliable, 10_000), (gone, 121), (alive, 60)):
            self.seen(store, each, seconds)
        # it gets nothing any more, also before somebody cleans up
        assert [x.subscription_id for x in store.append(event())] == [reliable.id, alive.id]
        store.do(subscriptions.retire_forgotten)
        retired = [row.id for row in store.rows(subscriptions_table) if row.retired_at]
        assert retired == [gone.id]
        its = store.rows(deliveries_table, deliveries_table.c.subscription_id == gone.id)
        assert [row.status for row in its] == ["discarded"]

    def test_signing_keeps_them(self, store: Log) -> None:
        subscription = store.subscribe(reliable=False)
        self.seen(store, subscription, 1000)
        store.do(subscriptions.sign, [subscription.id])
        store.do(subscriptions.retire_forgotten)
        [row] = store.rows(subscriptions_table)
        assert row.retired_at is None


# --- repair


class TestRetryFailed:
    def test_lets_what_failed_wait_again_and_nothing_else(self, store: Log) -> None:
        store.subscribe(), store.subscribe(subscriber="other.note")
        ours, theirs = store.append(event(max_retries=5))
        store.attempt(ours, RETRY)
        store.attempt(ours, FAILED, token=2)
        store.attempt(theirs, COMPLETED)
        [again] = store.do(repair.retry_message, ours.message.id)
        assert (again.seq, again.subscription_id) == (ours.seq, ours.subscription_id)
        assert (again.attempts, again.delay) == (0, 0)
        assert again.message.body == ours.message.body
        assert again.message.max_retries == 5
        row = store.delivery(ours.seq)
        assert (row.status, row.attempts, row.takeovers) == ("pending", 0, 0)
        assert (row.processed_at, row.error_type, row.error_message) == (None, None, None)
        assert store.delivery(theirs.seq).status == "completed"
        message = store.message(ours.message.id)
        assert (message.status, message.error_message) == ("pending", None)
        assert [each.outcome for each in store.history(ours.seq)] == ["retry", "failed"]

    def test_goes_on_to_completed(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, FAILED)
        [again] = store.do(repair.retry_message, delivery.message.id)
        store.attempt(again, RETRY, token=2)
        store.attempt(again, COMPLETED, token=3)
        assert store.message(delivery.message.id).status == "completed"
        assert [each.number for each in store.history(delivery.seq)] == [1, 1]

    def test_forgets_take_overs(self, store: Log, delivery: Delivery) -> None:
        for token in range(1, MAX_TAKEOVERS + 2):
            store.start(Lease(delivery, token))
        assert store.delivery(delivery.seq).status == "failed"
        [again] = store.do(repair.retry_message, delivery.message.id)
        store.start(Lease(again, 20))
        assert len(store.start(Lease(again, 21)).run) == 1

    @pytest.mark.parametrize("status", [PENDING, COMPLETED, RETRY])
    def test_wants_something_that_failed(
        self, store: Log, delivery: Delivery, status: DeliveryStatus
    ) -> None:
        if status is not PENDING:
            store.attempt(delivery, status)
        with pytest.raises(NothingToRetryError, match=delivery.message.id):
            store.do(repair.retry_message, delivery.message.id)

    def test_wants_a_message(self, store: Log) -> None:
        with pytest.raises(MessageNotFoundError, match="no message nobody"):
            store.do(repair.retry_message, "nobody")

    def test_by_two_people_at_once_happens_once(self, store: Log, delivery: Delivery) -> None:
        store.attempt(delivery, FAILED)
        message_id = delivery.message.id
        with store.database.transaction() as tx:
            assert len(repair.retry_message(tx, message_id)) == 1
            other = Meanwhile(store, lambda each: each.do(repair.retry_message, message_id))
            other.until_blocked()
        with pytest.raises(NothingToRetryError):
            other.result()
