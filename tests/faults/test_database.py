"""A database server, and the network before it, at their worst moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic

import eventlet
import pymysql
import pytest
from sqlalchemy import text

from shared import database
from shared.database import Database, database_url, make_reader
from shared.errors import DispatchError, DispatchUncertainError, StoreUnavailableError
from shared.events import fate
from shared.native import sleep
from shared.settings import load_settings
from shared.store.backlog import PUBLISH_SECONDS
from shared.testing.servers import MariaDBServer
from tests.conftest import migrate
from tests.faults import faults
from tests.faults.proxy import Proxy
from tests.flow.conftest import BACKENDS, Flow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"

PEM = Path(__file__).parents[1] / "services/localhost.pem"
"""A key, and a certificate by itself."""


@pytest.fixture
def proxied(mariadb_log, mariadb_server, tmp_path) -> Iterator[tuple[Flow, Proxy]]:
    """A flow whose dispatcher, in this process, reaches its database through a proxy."""
    proxy = Proxy(mariadb_server.port)
    flow = Flow(tmp_path, {**mariadb_log, "DB_PORT": str(proxy.port)})
    flow.send("thing.happened", {"n": 1})
    yield flow, proxy
    flow.close()
    proxy.close()


@contextlib.contextmanager
def frozen(server: MariaDBServer) -> Iterator[None]:
    assert server.process is not None
    with faults.frozen(server.process.pid):
        yield


@pytest.fixture(scope="module")
def tls_server() -> Iterator[MariaDBServer]:
    """One that offers TLS, as MySQL 8 and MariaDB 11.4 do by themselves."""
    server = MariaDBServer(f"--ssl-cert={PEM}", f"--ssl-key={PEM}")
    server.start()
    yield server
    server.close()


def total(flow: Flow) -> int:
    return int(flow.stats()["total"])


def test_a_commit_on_its_way_is_not_taken_for_none(proxied):
    """P1: its client has gone, the server gets it later, and meanwhile it is looked for."""
    flow, proxy = proxied
    with proxy.catching(b"COMMIT", "to_server"):
        second = eventlet.spawn(flow.send, "thing.happened", {"n": 2})
        wait_until(proxy.is_holding, 5, "the COMMIT")
    message_id = second.wait()

    assert flow.message(message_id)["status"] == "completed"
    assert total(flow) == 2


@pytest.mark.parametrize("held", ["to_server", "to_client"])
@pytest.mark.parametrize("provider", ["redis", "rabbitmq"])
def test_a_transaction_on_its_way_with_its_commit_is_stored_once(
    request, tmp_path, provider, held, mariadb_server
):
    """P1: the server gets all of it late, or had it; in any case it is handled soon."""
    proxy = Proxy(mariadb_server.port)
    request.addfinalizer(proxy.close)
    flow = Flow(tmp_path, {**BACKENDS[provider](request), "DB_PORT": str(proxy.port)})
    request.addfinalizer(flow.close)
    flow.run(RECORDER, DB_PORT=str(mariadb_server.port))
    flow.wait_for_status(flow.send("thing.happened", {"n": 1}), "completed")
    with proxy.catching(b"COMMIT", held):
        second = eventlet.spawn(flow.send, "thing.happened", {"n": 2})
        wait_until(proxy.is_holding, 5, "the COMMIT")
    message_id = second.wait()

    flow.wait_for_status(message_id, "completed", PUBLISH_SECONDS / 3)
    assert total(flow) == 2
    assert len(flow.effects.all(n=2, handler="first", what="ran")) == 1


def test_a_commit_that_stays_on_its_way_is_uncertain(proxied, monkeypatch):
    monkeypatch.setattr(fate, "UNCERTAIN_SECONDS", 0.5)
    flow, proxy = proxied
    with proxy.catching(b"COMMIT", "to_server"):
        second = eventlet.spawn(flow.send, "thing.happened", {"n": 2})
        wait_until(proxy.is_holding, 5, "the COMMIT")
        proxy.reset_clients()
        with pytest.raises(DispatchUncertainError) as raised:
            second.wait()

    wait_until(lambda: total(flow) == 2, 5, "the COMMIT to arrive")
    assert flow.message(raised.value.message_ids[0])["payload"] == {"n": 2}


def test_what_has_a_time_does_not_come_sooner_for_a_slow_network(
    mariadb_log, mariadb_server: MariaDBServer
):
    """P6, given a database's time that is old when it is heard, and reckoned on."""
    proxy = Proxy(mariadb_server.port)
    its = Database(database_url(load_settings({**mariadb_log, "DB_PORT": str(proxy.port)})), sleep)
    with proxy.delayed(0.1), its.transaction():
        pass
    [[now]] = mariadb_server.execute("SELECT UTC_TIMESTAMP(3)")

    with its.transaction(reckons=True) as tx:
        assert tx.later(10) >= now + timedelta(seconds=10)
        assert tx.now <= tx.later(0) - timedelta(seconds=0.1)
    its.close()
    proxy.close()


def test_a_frozen_server_holds_up_a_dispatch_for_seconds_only(
    proxied, monkeypatch, mariadb_server: MariaDBServer
):
    flow, proxy = proxied
    monkeypatch.setattr(database, "ANSWER_SECONDS", 1)
    proxy.cut()
    flow.send("thing.happened", {"n": 2})

    with frozen(mariadb_server):
        began = monotonic()
        with pytest.raises(DispatchError):
            flow.send("thing.happened", {"n": 3})
        assert monotonic() - began < 2

    flow.send("thing.happened", {"n": 4})
    assert total(flow) == 3


def test_a_frozen_server_holds_up_a_look_for_seconds_only(
    mariadb_log, monkeypatch, mariadb_server: MariaDBServer
):
    monkeypatch.setattr(database, "ANSWER_SECONDS", 1)
    its = Database(database_url(load_settings(mariadb_log)), sleep)
    query = text("SELECT 1")
    its.read(lambda tx: tx.connection.execute(query).scalar())

    with frozen(mariadb_server):
        began = monotonic()
        with pytest.raises(StoreUnavailableError):
            its.read(lambda tx: tx.connection.execute(query).scalar())
        assert monotonic() - began < 2

    assert its.read(lambda tx: tx.connection.execute(query).scalar()) == 1
    its.close()


@pytest.mark.parametrize("is_on_hub", [False, True])
def test_whose_server_offers_tls_gets_it_and_the_same_deadlines(tls_server, monkeypatch, is_on_hub):
    monkeypatch.setattr(database, "ANSWER_SECONDS", 1)
    proxy = Proxy(tls_server.port)
    of_proxy = {**tls_server.create_database().environment, "DB_PORT": str(proxy.port)}
    url = database_url(load_settings(of_proxy))
    its, cipher = (
        Database(url, sleep, is_on_hub=is_on_hub),
        text("SHOW SESSION STATUS LIKE 'Ssl_cipher'"),
    )

    def look(tx: database.Transaction) -> str:
        return str(tx.connection.execute(cipher).one()[1])

    def looks_in_vain() -> bool:
        began = monotonic()
        with pytest.raises(StoreUnavailableError):
            its.read(look)
        return monotonic() - began < 2

    assert "AES" in its.read(look)
    with frozen(tls_server):
        assert looks_in_vain()
    with proxy.catching(b"\x16\x03", "to_server"):  # what a handshake begins with
        assert looks_in_vain()
    assert "AES" in its.read(look)
    its.close()
    # the same for who only reads
    reader = make_reader(url, eventlet.sleep)
    with reader.connect() as connection:
        assert "AES" in connection.execute(cipher).one()[1]
    reader.dispose()
    proxy.close()


@pytest.mark.parametrize("provider", ["embedded", "redis"])
def test_events_are_delivered_over_tls(request, tls_server, tmp_path, provider):
    env = {**BACKENDS[provider](request), **tls_server.create_database().environment}
    migrate(env)
    with contextlib.closing(Flow(tmp_path, env)) as flow:
        worker = flow.run(RECORDER)
        ids = flow.send_many([("thing.happened", {"n": n}) for n in range(50)])
        tls_server.restart()
        ids += [flow.send("thing.happened", {"n": n}) for n in range(50, 100)]
        flow.wait_for_counts(completed=100)
        assert len(set(ids)) == 100
        assert worker.process.poll() is None


def test_who_looks_through_all_there_is_may_take_longer(mariadb_log, monkeypatch):
    monkeypatch.setattr(database, "ANSWER_SECONDS", 0.3)
    url = database_url(load_settings(mariadb_log))
    hasty, patient = Database(url, sleep), Database(url, sleep, is_patient=True)

    def look(tx: database.Transaction) -> object:
        return tx.connection.execute(text("SELECT SLEEP(1)")).scalar()

    with pytest.raises(StoreUnavailableError):
        hasty.read(look)
    assert patient.read(look) == 0
    for each in (hasty, patient):
        each.close()


def test_a_connection_that_is_lost_as_it_is_made_is_said_in_one_way(mariadb_log, monkeypatch):
    """Not by what the driver raises, which nobody expects."""
    lose_at_autocommit(monkeypatch, True)
    its = Database(database_url(load_settings(mariadb_log)), sleep)
    with pytest.raises(StoreUnavailableError):
        its.read(lambda tx: tx.connection.execute(text("SELECT 1")).scalar())
    its.close()


@pytest.mark.parametrize("value", [True, False])
def test_who_only_reads_of_a_service_does_not_change_the_connection(
    mariadb_log, monkeypatch, value
):
    """Lost as that is done or undone, it is said by the driver: a service that starts ends."""
    engine = database.make_engine(database_url(load_settings(mariadb_log)), sleep)
    number = text("SELECT connection_id()")
    with database.reading(engine) as connection:
        first = connection.execute(number).scalar_one()
    lose_at_autocommit(monkeypatch, value)

    with database.reading(engine) as connection:
        assert connection.execute(number).scalar_one() == first

    assert engine.pool.checkedout() == 0
    engine.dispose()


def lose_at_autocommit(monkeypatch, lost):
    def set_autocommit(_connection, value):
        if value is lost:
            raise pymysql.err.OperationalError(2013, "Lost connection")

    monkeypatch.setattr(pymysql.connections.Connection, "autocommit", set_autocommit)


def test_who_froze_in_a_transaction_keeps_its_locks_for_seconds_only(mariadb_log, monkeypatch):
    """P8: others take over what a host had that lost its power, or its network."""
    monkeypatch.setattr(database, "ORPHANED_SECONDS", 1)
    stuck, other = (Database(database_url(load_settings(mariadb_log)), sleep) for _ in range(2))
    change = text("UPDATE queue_version SET version_num = version_num")
    tx = stuck._begin(durable=True, reckons=False)
    tx.connection.execute(change)

    began = monotonic()
    other.run(lambda tx: tx.connection.execute(change))

    assert 0.5 < monotonic() - began < 3
    # and the one that comes to again finds another connection
    stuck._roll_back()
    stuck.run(lambda tx: tx.connection.execute(change))
    for each in (stuck, other):
        each.close()


def test_a_server_that_takes_nothing_is_said_to_be_back_once_it_does(
    proxied, mariadb_server, caplog
):
    """As a replica is, to which the others were failed over."""
    flow, _ = proxied
    mariadb_server.execute("SET GLOBAL read_only = 1")
    try:
        for n in range(2, 7):
            with pytest.raises(DispatchError, match="read-only"):
                flow.send("thing.happened", {"n": n})
    finally:
        mariadb_server.execute("SET GLOBAL read_only = 0")
    assert "reachable again" not in caplog.text

    flow.send("thing.happened", {"n": 7})

    wait_until(lambda: "reachable again" in caplog.text, 5, "the line")
    assert caplog.text.count("log or provider unreachable") == 1
