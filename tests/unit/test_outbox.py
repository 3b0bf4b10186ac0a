"""What goes through an outbox: with which commit, in which order, and what cannot go."""

import logging
import uuid
from collections.abc import Callable

import eventlet
import pytest
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from sqlalchemy import String, func, inspect, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, scoped_session, sessionmaker

from shared.database import database_url, make_engine
from shared.errors import DispatchError, PayloadError
from shared.events import EventDispatcher, relay
from shared.events.client import QueueClient
from shared.settings import load_settings
from shared.store import DatabaseSession, log
from shared.store.outbox import outbox_table
from shared.tables import messages
from tests.support.waiting import wait_until


class Base(DeclarativeBase):
    pass


class Sale(Base):
    __tablename__ = "source_sales"

    id: Mapped[str] = mapped_column(String(36), primary_key=True)


outbox = outbox_table(Base.metadata, "source")


class Source:
    name = "source"

    db = DatabaseSession(Base)
    dispatch = EventDispatcher()

    @dummy
    def do(self, step: Callable):
        return step(self)

    def sell(self, n, **options):
        self.db.add(Sale(id=str(uuid.uuid4())))
        self.db.flush()
        return self.dispatch("thing.sold", {"n": n}, session=self.db, **options)


class Shop:
    """The service, its outbox and the message log."""

    def __init__(self, config):
        settings = load_settings(config)
        self.own = make_engine(database_url(settings, "source"), eventlet.sleep)
        self.log = make_engine(database_url(settings), eventlet.sleep)
        Base.metadata.create_all(self.own)
        self.container = ServiceContainer(Source, dict(config))

    def do(self, step):
        """Run a step in a worker of the service."""
        with entrypoint_hook(self.container, "do", timeout=20) as call:
            return call(step)

    def sent(self):
        """The events that reached the log, in the order in which they did."""
        with self.log.begin() as connection:
            rows = connection.execute(select(messages.c.payload, messages.c.id)).all()
        return [row.payload for row in rows]

    def numbers(self):
        return sorted(int(body.removeprefix('{"n":').removesuffix("}")) for body in self.sent())

    def waiting(self):
        with self.own.begin() as connection:
            return connection.execute(select(outbox).order_by(outbox.c.seq)).all()

    def wait_for(self, *numbers):
        wait_until(lambda: self.numbers() == sorted(numbers), 10, lambda: str(self.sent()))

    def wait_for_nothing_left(self):
        wait_until(lambda: not self.waiting(), 10, lambda: str(self.waiting()))

    def sweep(self):
        """Relay what is there, as another process of the service would."""
        [dispatcher] = [d for d in self.container.dependencies if d.attr_name == "dispatch"]
        return dispatcher._relay.sweep()

    def close(self):
        self.container.stop()
        self.own.dispose()
        self.log.dispose()


@pytest.fixture
def new_shop(log_settings, monkeypatch):
    # what is relayed is relayed since it was rung for
    monkeypatch.setattr(relay, "SWEEP_SECONDS", 3600)
    made = Shop(log_settings)
    yield made
    made.close()


@pytest.fixture
def shop(new_shop):
    new_shop.container.start()
    return new_shop


@pytest.fixture
def idle_shop(new_shop, monkeypatch):
    """A shop where only the tests relay."""
    monkeypatch.setattr(relay.Relay, "run", lambda self: eventlet.sleep(3600))
    new_shop.container.start()
    return new_shop


def reports(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "shared.events.relay"]


def test_each_commit_of_a_session_sends_what_is_in_it(shop):
    def step(source):
        for n in range(3):
            ids.append(source.sell(n))
            source.db.commit()
            shop.wait_for(*range(n + 1))

    ids = []
    shop.do(step)

    shop.wait_for_nothing_left()
    with shop.log.begin() as connection:
        assert set(connection.execute(select(messages.c.id)).scalars()) == set(ids)


def test_what_is_rolled_back_is_gone_and_a_savepoint_alone_too(shop):
    def step(source):
        source.sell(1)
        source.db.rollback()
        source.sell(2)
        savepoint = source.db.begin_nested()
        source.sell(3)
        savepoint.rollback()
        with source.db.begin_nested():
            source.sell(4)
        assert shop.sent() == []
        source.db.commit()
        source.sell(5)  # and nothing follows

    shop.do(step)

    shop.wait_for(2, 4)
    shop.wait_for_nothing_left()


def test_what_is_no_session_is_refused_by_name_and_a_scoped_one_is_a_session(shop):
    def refused(source):
        for each in ("db", shop.own, object):
            with pytest.raises(PayloadError, match="session: must be a Session of SQLAlchemy"):
                source.dispatch("thing.sold", {"n": 1}, session=each)

    shop.do(refused)
    assert shop.waiting() == []

    def scoped(source):
        session = scoped_session(sessionmaker(source.db.get_bind()))
        source.dispatch("thing.sold", {"n": 2}, session=session)
        session.commit()
        session.remove()

    shop.do(scoped)
    wait_until(lambda: shop.numbers() == [2], 10, lambda: str(shop.numbers()))


def test_events_leave_in_the_order_of_the_commits(idle_shop, log_settings):
    [provider] = [d for d in idle_shop.container.dependencies if d.attr_name == "db"]

    def step(source):
        if "DB_HOST" not in log_settings:
            # one writer at a time: it is the order of the transactions, too
            source.sell(1)
            source.db.commit()
            source.sell(2)
            source.db.commit()
            return
        with provider.Session() as other:
            source.sell(2)
            source.dispatch("thing.sold", {"n": 1}, session=other)
            with source.db.begin_nested():
                source.sell(3)
            other.commit()
            source.db.commit()

    idle_shop.do(step)

    bodies = [row.envelope for row in idle_shop.waiting()]
    found = [next(n for n in (1, 2, 3) if f'{{\\"n\\":{n}}}' in body) for body in bodies]
    assert found == ([1, 2, 3] if "DB_HOST" in log_settings else [1, 2])
    assert idle_shop.sweep() == len(found)
    assert idle_shop.waiting() == []
    assert idle_shop.numbers() == found


def test_one_that_cannot_be_read_is_set_aside_and_the_rest_goes_on(idle_shop, caplog):
    def step(source):
        source.sell(1)
        for broken in ("{", "[]", '{"id": "x"}', '"{}"'):
            source.db.execute(outbox.insert(), [{"envelope": broken}])
        source.sell(2)
        source.db.commit()

    idle_shop.do(step)
    with caplog.at_level(logging.ERROR, "shared.events.relay"):
        idle_shop.sweep()
        idle_shop.sweep()

    assert idle_shop.numbers() == [1, 2]
    left = idle_shop.waiting()
    assert [row.envelope for row in left] == ["{", "[]", '{"id": "x"}', '"{}"']
    assert all(row.failed_at and row.error.startswith("it cannot be read: ") for row in left)
    assert [said.split(":")[0] for said in reports(caplog)] == [
        f"set aside in source_outbox seq={row.seq}" for row in left
    ]


def test_one_that_the_log_refuses_is_set_aside_until_it_is_given_back(
    idle_shop, caplog, monkeypatch
):
    real = log.append

    def append(tx, envelopes, *args, **kwargs):
        if any(envelope.body == '{"n":3}' for envelope in envelopes):
            raise ValueError("cannot be stored")
        return real(tx, envelopes, *args, **kwargs)

    def step(source):
        for n in range(8):
            source.sell(n)
        source.db.commit()

    idle_shop.do(step)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "shared.events.relay"):
        patch.setattr(log, "append", append)
        idle_shop.sweep()
        idle_shop.sweep()

    assert idle_shop.numbers() == [0, 1, 2, 4, 5, 6, 7]
    [row] = idle_shop.waiting()
    assert "cannot be stored" in row.error
    assert len(reports(caplog)) == 1
    with idle_shop.own.begin() as connection:
        connection.execute(update(outbox).values(failed_at=None, error=None))
    idle_shop.sweep()
    assert idle_shop.numbers() == list(range(8))


def test_many_that_are_long_go_together_though_no_server_takes_them_at_once(shop):
    """MariaDB closes the connection of who sends it a statement of more than 16 MB."""
    n, length = 20, 1_000_000

    def step(source):
        long = [("thing.sold", "x" * length) for _ in range(n)]
        ids = source.dispatch.many(long, session=source.db)
        source.db.commit()
        return ids

    ids = shop.do(step)
    shop.wait_for_nothing_left()
    assert len(set(ids)) == n
    assert [len(body) for body in shop.sent()] == [length + 2] * n


def test_one_with_a_value_that_the_log_refuses_is_set_aside(idle_shop):
    """PyMySQL has the same exception for it as for a server that does not answer."""

    def step(source):
        for n in range(3):
            source.sell(n)
        source.db.commit()

    idle_shop.do(step)
    if idle_shop.log.dialect.name == "sqlite":
        pytest.skip("SQLite takes any value")
    at = '"scheduled_at": '
    with idle_shop.own.begin() as connection:
        ancient = func.replace(outbox.c.envelope, f"{at}null", f'{at}"0001-01-01T00:00:00"')
        its = outbox.c.seq == select(func.min(outbox.c.seq)).scalar_subquery()
        connection.execute(update(outbox).where(its).values(envelope=ancient))
    idle_shop.sweep()

    assert idle_shop.numbers() == [1, 2]
    [row] = idle_shop.waiting()
    assert "Incorrect datetime value" in row.error


def test_a_log_that_is_not_as_it_should_be_sets_nothing_aside(idle_shop):
    def step(source):
        source.sell(1)
        source.db.commit()

    idle_shop.do(step)
    with idle_shop.log.begin() as connection:
        connection.execute(text("ALTER TABLE queue_messages RENAME TO queue_elsewhere"))
    try:
        with pytest.raises(DispatchError):
            idle_shop.sweep()
    finally:
        with idle_shop.log.begin() as connection:
            connection.execute(text("ALTER TABLE queue_elsewhere RENAME TO queue_messages"))

    assert [row.failed_at for row in idle_shop.waiting()] == [None]


def test_who_relayed_the_same_removes_nothing_that_was_committed_since(idle_shop, monkeypatch):
    def sell(n):
        def step(source):
            source.sell(n)
            source.db.commit()

        idle_shop.do(step)

    def append(client, envelopes, **options):
        """Relay what another process has read already; and meanwhile that one ends, and sells."""
        monkeypatch.undo()
        client.append(envelopes, **options)
        idle_shop.sweep()
        sell(2)
        return [envelope.id for envelope in envelopes]

    sell(1)
    monkeypatch.setattr(QueueClient, "append", append)
    idle_shop.sweep()

    assert idle_shop.numbers() == [1]
    assert len(idle_shop.waiting()) == 1
    idle_shop.sweep()
    assert idle_shop.numbers() == [1, 2]


def test_a_key_is_looked_for_when_the_event_is_relayed(idle_shop):
    ids = []

    def step(source):
        ids.append(source.sell(1, dedupe_key="a"))
        ids.append(source.sell(2, dedupe_key="a"))
        source.db.commit()

    idle_shop.do(step)
    idle_shop.sweep()

    assert len(set(ids)) == 2
    assert idle_shop.numbers() == [1]
    assert idle_shop.waiting() == []


def test_the_services_own_migration_makes_this_table(tmp_path):
    from services.auth_events.models import Base as AuthBase
    from shared.store.migrate import service_migrations, upgrade_sqlite

    engine = make_engine(
        database_url(load_settings({"QUEUE_DATA_DIR": str(tmp_path)}), "auth_events"),
        eventlet.sleep,
    )
    upgrade_sqlite(engine, service_migrations("auth_events", AuthBase))
    made = {column["name"] for column in inspect(engine).get_columns("auth_events_outbox")}
    engine.dispose()

    assert made == {column.name for column in outbox.c}
