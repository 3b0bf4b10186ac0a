"""Single events, which the hub stores itself while the pump rests."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from unittest.mock import Mock

import eventlet
import pytest
from eventlet import hubs
from nameko.containers import WorkerContext
from nameko.testing.utils import get_extension

from shared import database, native
from shared.database import Database, database_url
from shared.errors import DispatchError, DispatchUncertainError, HandlerTimeoutError
from shared.events import EventDispatcher, client, fate
from shared.events.client import QueueClient
from shared.events.dispatcher import Dispatch
from shared.observe.counts import PumpCounts
from shared.store import subscriptions
from shared.types import Delivery
from tests.faults.proxy import Proxy
from tests.flow.conftest import BACKENDS, Flow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"

BROKERS = ["redis", "rabbitmq"]


@pytest.fixture(params=BROKERS)
def brokered(request: pytest.FixtureRequest, tmp_path, mariadb_server) -> Iterator[Flow]:
    """A flow whose dispatcher, in this process, reaches its database through ``its_proxy``."""
    proxy = request.getfixturevalue("its_proxy")
    made = Flow(tmp_path, {**BACKENDS[request.param](request), "DB_PORT": str(proxy.port)})
    yield made
    made.close()


@pytest.fixture
def its_proxy(mariadb_server) -> Iterator[Proxy]:
    proxy = Proxy(mariadb_server.port)
    yield proxy
    proxy.close()


def client_of(flow: Flow) -> QueueClient:
    return get_extension(flow.container, QueueClient)


def dispatch_of(flow: Flow) -> Dispatch:
    """Return what a worker has: to dispatch in a greenthread of the test's own."""
    dispatcher = get_extension(flow.container, EventDispatcher)
    entrypoint = next(iter(flow.container.entrypoints))
    return dispatcher.get_dependency(WorkerContext(flow.container, None, entrypoint))


def events_in(counts: PumpCounts) -> int:
    return int(counts.flush_events.sum)


def stored_by(flow: Flow) -> dict[str, int]:
    """Return how many events the hub stored itself, and how many the pump did."""
    counts = client_of(flow).counts
    return {"hub": events_in(counts.shortcut), "pump": events_in(counts.pump)}


def begin(flow: Flow, **env: str) -> None:
    """Have a subscriber, and a dispatcher that knows it; its pump is at rest then."""
    flow.run(RECORDER, **env)
    flow.wait_for_status(flow.send("thing.happened", {"n": 0}), "completed")
    wait_until(lambda: is_open(flow), 5, "the pump's rest")


def is_open(flow: Flow) -> bool:
    before = stored_by(flow)["hub"]
    flow.send("thing.happened", {"n": 0})
    return stored_by(flow)["hub"] > before


@contextlib.contextmanager
def ending(flow: Flow) -> Iterator[None]:
    """Wait until the end of the connections to the database arrived, which is to begin within."""
    its_client = client_of(flow)
    both = [each._database._connection for each in (its_client._shortcut, its_client._pump)]
    drivers = [each.connection.dbapi_connection for each in both]
    yield
    # one that is closed was used meanwhile
    wait_until(
        lambda: all(not each.open or each._watched.poll(0) for each in drivers), 5, "the end"
    )


def runs(flow: Flow, n: int) -> int:
    return len(flow.effects.all(n=n, handler="first", what="ran"))


def test_a_single_event_is_stored_by_the_hub(brokered):
    begin(brokered)
    before = stored_by(brokered)

    ids = [brokered.send("thing.happened", {"n": n}) for n in range(1, 21)]

    for message_id in ids:
        brokered.wait_for_status(message_id, "completed")
    stored = stored_by(brokered)
    # the pump may have been noting what is published at that moment
    assert stored["hub"] - before["hub"] >= 5
    assert sum(stored.values()) - sum(before.values()) == 20
    assert [runs(brokered, n) for n in range(1, 21)] == [1] * 20


@pytest.mark.parametrize(
    "options", [{"delay": 0.1}, {"dedupe_key": "once"}], ids=["delayed", "with a key"]
)
def test_what_takes_more_than_one_statement_is_for_the_pump(brokered, options):
    begin(brokered)
    before = stored_by(brokered)
    message_id = brokered.send("thing.happened", {"n": 1}, **options)
    brokered.wait_for_status(message_id, "completed")
    assert stored_by(brokered) == {"hub": before["hub"], "pump": before["pump"] + 1}


def test_a_database_that_returns_nothing_from_an_insert_is_for_the_pump(brokered, monkeypatch):
    """As MySQL is: it takes several round trips, which a greenthread may be killed between."""
    begin(brokered)
    before = stored_by(brokered)
    dialect = client_of(brokered)._pump._database.engine.dialect
    monkeypatch.setattr(dialect, "insert_returning", False)
    brokered.wait_for_status(brokered.send("thing.happened", {"n": 1}), "completed")
    assert stored_by(brokered) == {"hub": before["hub"], "pump": before["pump"] + 1}


def test_each_dispatches_in_its_order_whoever_stores_it(brokered):
    """Many at once: one event is stored by the hub, what comes meanwhile by the pump."""
    begin(brokered, MAX_WORKERS="1")
    before = stored_by(brokered)
    dispatch = dispatch_of(brokered)
    pump = client_of(brokered)._pump
    publish, hub = pump.publish, native._thread.get_ident()

    def publish_late(new: list[Delivery], setbacks: int) -> None:
        if native._thread.get_ident() != hub:
            native.sleep(0.01)  # who dispatched it knows already that it is stored
        publish(new, setbacks)

    pump.publish = publish_late

    def send(who: int) -> None:
        for n in range(40):
            dispatch("thing.happened", {"n": [who, n]})
            eventlet.sleep(0.001 * (n % 3))

    pool = eventlet.GreenPool(5)
    for who in range(1, 6):
        pool.spawn(send, who)
    pool.waitall()

    brokered.wait_for_counts(completed=sum(stored_by(brokered).values()))
    ran = [each["n"] for each in brokered.effects.all(handler="first", what="ran") if each["n"]]
    for who in range(1, 6):
        assert [n for its, n in ran if its == who] == list(range(40))
    stored = stored_by(brokered)
    assert stored["hub"] > before["hub"]
    assert stored["pump"] > before["pump"]


CAUGHT = {"n": 1, "said": "what is caught"}


@pytest.mark.parametrize("held", ["to_server", "to_client"])
def test_a_commit_whose_answer_is_lost_is_found_out_by_the_pump(brokered, its_proxy, held):
    """P1: the server gets all of it late, or had it; nobody hears of a trouble."""
    begin(brokered)
    total = brokered.stats()["total"]
    with its_proxy.catching(b"what is caught", held):
        sending = eventlet.spawn(dispatch_of(brokered), "thing.happened", CAUGHT)
        wait_until(its_proxy.is_holding, 5, "the COMMIT")
    message_id = sending.wait()

    brokered.wait_for_status(message_id, "completed", 10)
    assert brokered.stats()["total"] == total + 1
    assert runs(brokered, 1) == 1
    wait_until(lambda: is_open(brokered), 5, "the way to be open again")


@contextlib.contextmanager
def asking_the_time(flow: Flow, proxy: Proxy) -> Iterator[None]:
    client_of(flow)._shortcut._database._asked_at = -math.inf
    with proxy.catching(b"UTC_TIMESTAMP", "to_client"):
        yield


@contextlib.contextmanager
def connecting(flow: Flow, proxy: Proxy) -> Iterator[None]:
    client_of(flow)._shortcut._database.drop_connection()
    with proxy.frozen(proxy.to_client):
        yield


@contextlib.contextmanager
def sending_the_commit(_flow: Flow, proxy: Proxy) -> Iterator[None]:
    with proxy.catching(b"what is caught", "to_server"):
        yield


@contextlib.contextmanager
def awaiting_the_commit(_flow: Flow, proxy: Proxy) -> Iterator[None]:
    with proxy.catching(b"what is caught", "to_client"):
        yield


MOMENTS = [asking_the_time, connecting, sending_the_commit, awaiting_the_commit]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("error", [HandlerTimeoutError, TimeoutError])
def test_who_is_interrupted_hears_of_that_and_of_nothing_else(brokered, its_proxy, error, moment):
    """As where the pump stores it: at once, once at most, and before what is dispatched next."""
    begin(brokered, MAX_WORKERS="1")
    total = brokered.stats()["total"]
    dispatch, taken = dispatch_of(brokered), client_of(brokered)._shortcut._turn
    with moment(brokered, its_proxy):
        began = time.monotonic()
        with pytest.raises(error, match="too late"), eventlet.Timeout(0.1, error("too late")):
            dispatch("thing.happened", CAUGHT)
        assert time.monotonic() - began < 5
        assert taken.locked()
        following = eventlet.spawn(dispatch, "thing.happened", {"n": 2})
        eventlet.sleep(0)

    brokered.wait_for_status(following.wait(), "completed")
    brokered.wait_for_status(dispatch("thing.happened", {"n": 3}), "completed")
    ran = [each["n"] for each in brokered.effects.all(handler="first", what="ran") if each["n"]]
    assert ran in ([1, 2, 3], [2, 3])
    assert brokered.stats()["total"] == total + len(ran)
    assert not taken.locked()


@pytest.mark.parametrize("end", [Proxy.cut, Proxy.half_close])
def test_a_connection_that_was_ended_meanwhile_is_made_anew(brokered, its_proxy, end):
    """P1: nothing is in doubt, since nothing was sent."""
    begin(brokered)
    fate = client_of(brokered)._pump._fate
    fate.resolve = doubted = Mock(wraps=fate.resolve)
    with ending(brokered):
        end(its_proxy)
    ids = [brokered.send("thing.happened", {"n": n}) for n in (1, 2, 3)]
    for message_id in ids:
        brokered.wait_for_status(message_id, "completed")
    wait_until(lambda: is_open(brokered), 5, "the way to be open again")
    assert [runs(brokered, n) for n in (1, 2, 3)] == [1, 1, 1]
    doubted.assert_not_called()


def test_a_database_that_is_away_is_said_as_ever(brokered, its_proxy):
    begin(brokered)
    with contextlib.ExitStack() as stack:
        with ending(brokered):
            stack.enter_context(its_proxy.refusing())
        for n in (1, 2):
            with pytest.raises(DispatchError, match="nothing was stored"):
                brokered.send("thing.happened", {"n": n})
    brokered.wait_for_status(brokered.send("thing.happened", {"n": 3}), "completed")
    wait_until(lambda: is_open(brokered), 5, "the way to be open again")
    assert runs(brokered, 1) == runs(brokered, 2) == 0


def test_a_database_that_does_not_answer_holds_up_a_dispatch_for_seconds_only(
    brokered, its_proxy, monkeypatch
):
    monkeypatch.setattr(database, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(fate, "UNCERTAIN_SECONDS", 0.5)
    its_proxy.cut()  # connections that are made from now on have that deadline
    begin(brokered)
    began = time.monotonic()
    with its_proxy.deaf(), pytest.raises(DispatchUncertainError):
        brokered.send("thing.happened", {"n": 1})
    assert time.monotonic() - began < 6


def test_whoever_holds_up_the_hub_for_long_is_not_taken_for_the_database(
    brokered, its_proxy, monkeypatch, caplog
):
    """P8: the answer came in time, and nobody looked."""
    monkeypatch.setattr(database, "ANSWER_SECONDS", 1)
    its_proxy.cut()  # connections that are made from now on have that deadline
    begin(brokered)
    caplog.clear()
    signal = native.Signal()

    def hold_up() -> None:
        # what a hub finds readable it looks after first, and then at deadlines
        hubs.trampoline(signal.fileno(), read=True)
        native.sleep(2)

    with its_proxy.delayed(0.1):
        holding_up = eventlet.spawn(hold_up)
        sending = eventlet.spawn(dispatch_of(brokered), "thing.happened", {"n": 1})
        taken = client_of(brokered)._shortcut._turn
        wait_until(lambda: taken.locked() or sending.dead, 5, "the event to be on its way")
        signal.ring()
        holding_up.wait()
        message_id = sending.wait()
    signal.close()
    brokered.wait_for_status(message_id, "completed")
    assert "unreachable" not in caplog.text


def test_what_no_subscription_wants_any_more_is_completed(brokered):
    begin(brokered)
    for process in brokered.processes:
        process.terminate()
    with brokered.reading() as connection:
        ids = [each.id for each in subscriptions.active(connection)]
    other = Database(database_url(brokered.settings), native.sleep)
    other.run(lambda tx: subscriptions.retire(tx, ids))
    other.close()
    message_id = brokered.send("thing.happened", {"n": 1})
    brokered.wait_for_status(message_id, "completed", 5)


def test_a_stop_waits_for_what_is_on_its_way(brokered, its_proxy):
    begin(brokered)
    with its_proxy.catching(b"what is caught", "to_client"):
        sending = eventlet.spawn(dispatch_of(brokered), "thing.happened", CAUGHT)
        wait_until(its_proxy.is_holding, 5, "the COMMIT")
        its_client = client_of(brokered)
        stopping = eventlet.spawn(brokered.stop_source)
        wait_until(lambda: its_client._is_stopped, 5, "the stop")
        with pytest.raises(eventlet.Timeout), eventlet.Timeout(0.3):
            stopping.wait()
    with eventlet.Timeout(10):
        message_id = sending.wait()
        stopping.wait()
    # its dispatcher published it: else others would do so after half a minute
    brokered.wait_for_status(message_id, "completed", 5)


def test_a_stop_does_not_wait_for_ever(brokered, its_proxy, monkeypatch):
    """Given a database that does not answer: whoever dispatched is told that nobody knows."""
    monkeypatch.setattr(client, "FINISH_SECONDS", 1)
    monkeypatch.setattr(database, "ANSWER_SECONDS", 3)
    its_proxy.cut()  # connections that are made from now on have that deadline
    begin(brokered)
    with its_proxy.catching(b"what is caught", "to_client"):
        sending = eventlet.spawn(dispatch_of(brokered), "thing.happened", CAUGHT)
        wait_until(its_proxy.is_holding, 5, "the COMMIT")
        began = time.monotonic()
        brokered.stop_source()
        assert time.monotonic() - began < 5
        with eventlet.Timeout(5), pytest.raises(DispatchUncertainError):
            sending.wait()
