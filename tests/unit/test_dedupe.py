"""What is dispatched with the same key is stored once."""

from datetime import timedelta

import eventlet
import pytest
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from sqlalchemy import Connection, select, update

from shared.database import CommitUncertainError, Database, database_url, make_engine, utc_now
from shared.errors import DedupeConflictError, PayloadError
from shared.events import EventDispatcher
from shared.events.dispatcher import make_envelope
from shared.settings import load_settings
from shared.store import dedupe
from shared.tables import dedupe_keys, messages
from shared.types import Dedupe


class Source:
    name = "source"
    dispatch = EventDispatcher()

    @dummy
    def send(self, payload, **options):
        return self.dispatch("thing.happened", payload, **options)

    @dummy
    def send_many(self, events, **options):
        return self.dispatch.many(events, **options)


class Log:
    """A message log, and services that dispatch into it."""

    def __init__(self, config):
        self.engine = make_engine(database_url(load_settings(config)), eventlet.sleep)
        self.config = config
        self.containers = []

    def service(self):
        """Start one more service, which has a pump and a connection of its own."""
        container = ServiceContainer(Source, dict(self.config))
        container.start()
        self.containers.append(container)

        def call(method, *args, **kwargs):
            with entrypoint_hook(container, method, timeout=20) as hook:
                return hook(*args, **kwargs)

        return call

    def stored(self):
        with self.engine.begin() as connection:
            return set(connection.execute(select(messages.c.id)).scalars())

    def keys(self):
        with self.engine.begin() as connection:
            return set(connection.execute(select(dedupe_keys.c.dedupe_key)).scalars())

    def expire(self):
        with self.engine.begin() as connection:
            ago = utc_now(connection) - timedelta(milliseconds=1)
            connection.execute(update(dedupe_keys).values(expires_at=ago))

    def close(self):
        for container in self.containers:
            container.stop()
        self.engine.dispose()


@pytest.fixture
def log(log_settings):
    made = Log(log_settings)
    yield made
    made.close()


@pytest.fixture
def call(log):
    return log.service()


def test_the_second_has_the_id_of_the_first_and_is_not_stored(log, call):
    first = call("send", {"n": 1}, dedupe_key="order 1")

    assert call("send", {"n": 2}, dedupe_key="order 1") == first
    other = call("send", {"n": 3}, dedupe_key="Order 1")
    plain = call("send", {"n": 4})

    assert log.stored() == {first, other, plain}


def test_a_key_holds_for_a_day_from_the_first_on(log, call):
    first = call("send", {}, dedupe_key="a")
    with log.engine.begin() as connection:
        rows = connection.execute(select(dedupe_keys.c.expires_at)).scalars().all()
        assert timedelta(hours=23) < rows[0] - utc_now(connection) <= timedelta(hours=24)
    log.expire()

    second = call("send", {}, dedupe_key="a")

    assert second != first
    assert call("send", {}, dedupe_key="a") == second
    assert log.stored() == {first, second}


def test_among_many_each_has_its_own(log, call):
    known = call("send", {}, dedupe_key="a")
    events = [
        ("thing.happened", {"n": n}, {"dedupe_key": key} if key else {})
        for n, key in enumerate(["a", None, "b", "b", "c"])
    ]

    a, plain, b, again, c = call("send_many", events)

    assert (a, b) == (known, again)
    assert log.stored() == {known, plain, b, c}
    with pytest.raises(PayloadError, match="dedupe_key: must be given for each event"):
        call("send_many", events[:2], dedupe_key="d")


def test_of_several_services_at_once_one_stores_it(log):
    services = [log.service() for _ in range(3)]
    keys = [f"k{n}" for n in range(20)]

    def send(call):
        events = [("thing.happened", {}, {"dedupe_key": key}) for key in keys]
        return [
            *call("send_many", events[:10]),
            *(call("send", {}, dedupe_key=key) for key in keys[10:]),
        ]

    threads = [eventlet.spawn(send, call) for call in services]
    first, *others = [thread.wait() for thread in threads]

    assert others == [first, first]
    assert log.stored() == set(first)


def test_keys_that_are_over_are_removed(log, call):
    for n in range(5):
        call("send", {}, dedupe_key=f"old{n}")
    log.expire()

    for n in range(3):
        call("send", {}, dedupe_key=f"new{n}")

    assert log.keys() == {"new0", "new1", "new2"}


def test_keys_are_looked_for_once_for_all_and_not_where_there_are_none(log, call, monkeypatch):
    fetched = []
    real = dedupe.Prepared.fetch

    def fetch(self, *args, **options):
        fetched.append(self)
        return real(self, *args, **options)

    monkeypatch.setattr(dedupe.Prepared, "fetch", fetch)
    call("send_many", [("thing.happened", {}, {"dedupe_key": f"{n}"}) for n in range(50)])
    assert fetched.count(dedupe._FOUND) == 1
    fetched.clear()
    call("send", {})

    assert dedupe._FOUND not in fetched
    assert dedupe._EXPIRED not in fetched


@pytest.mark.parametrize("took_place", [True, False])
def test_a_commit_of_unknown_fate(log, call, monkeypatch, took_place):
    first = call("send", {}, dedupe_key="a")
    real, broken = Database._commit, []

    def commit(self, connection: Connection):
        if broken:
            real(self, connection)
            return
        broken.append(True)
        if took_place:
            real(self, connection)
        self.drop_connection()
        raise CommitUncertainError("the connection broke")

    monkeypatch.setattr(Database, "_commit", commit)
    # what came before is stored, whatever became of this commit
    assert call("send", {}, dedupe_key="a") == first
    assert broken


def test_what_comes_with_a_key_of_a_fingerprint_must_be_the_same(log, call):
    first = call("send", {}, dedupe_key=Dedupe("", "a", "print"))

    assert call("send", {}, dedupe_key=Dedupe("", "a", "print")) == first
    with pytest.raises(DedupeConflictError):
        call("send", {}, dedupe_key=Dedupe("", "a", "other"))
    in_the_queue = call("send", {}, dedupe_key="a")

    assert log.stored() == {first, in_the_queue}


@pytest.mark.parametrize("key", ["", "x" * 201, 7, "a\0", "\ud800", " a", "a "])
def test_a_key_is_a_text_of_1_to_200_characters(key):
    with pytest.raises(PayloadError, match="dedupe_key: must"):
        make_envelope(load_settings({}), "things", "thing.happened", {}, dedupe_key=key)


def test_there_are_none_without_the_log():
    settings = load_settings({"QUEUE_PROVIDER": "rabbitmq", "QUEUE_LOG": "off"})
    with pytest.raises(PayloadError, match="dedupe_key: needs the message log"):
        make_envelope(settings, "things", "thing.happened", {}, dedupe_key="a")
    assert make_envelope(settings, "things", "thing.happened", {}).dedupe is None
