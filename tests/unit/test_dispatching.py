"""What a dispatcher refuses, and what it promises when the database wavers."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from sqlalchemy import Connection, select

from shared.database import CommitUncertainError, Database, database_url, make_reader
from shared.errors import DispatchError, PayloadError
from shared.events import EventDispatcher
from shared.events.dispatcher import make_envelope
from shared.settings import load_settings
from shared.store import log
from shared.tables import messages

SETTINGS = load_settings({})


class Source:
    name = "source"
    dispatch = EventDispatcher()

    @dummy
    def send(self, payload, **options):
        return self.dispatch("thing.happened", payload, **options)

    @dummy
    def send_many(self, events):
        return self.dispatch.many(events)

    @dummy
    def with_session(self, payload, session):
        return self.dispatch("thing.happened", payload, session=session)


@pytest.fixture
def call(sqlite_log):
    container = ServiceContainer(Source, dict(sqlite_log))
    container.start()

    def run(method, *args, context_data=None, **kwargs):
        with entrypoint_hook(container, method, context_data, timeout=20) as hook:
            return hook(*args, **kwargs)

    yield run
    container.stop()


def stored(config):
    engine = make_reader(database_url(load_settings(config)), lambda _: None)
    with engine.connect() as connection:
        ids = list(connection.execute(select(messages.c.id).order_by(messages.c.id)).scalars())
    engine.dispose()
    return ids


def test_of_the_context_what_is_no_json_stays_behind(call, sqlite_log):
    context = {"language": "de", "connection": object(), "half": "\ud800", "nothing": None}

    call("send", {}, context_data=context)
    call("send_many", [("thing.happened", {}), ("thing.happened", {})], context_data=context)

    engine = make_reader(database_url(load_settings(sqlite_log)), lambda _: None)
    with engine.connect() as connection:
        kept = [
            json.loads(each) for each in connection.execute(select(messages.c.metadata)).scalars()
        ]
    engine.dispose()
    assert [each["nameko"]["context"]["language"] for each in kept] == ["de"] * 3
    assert not {"connection", "half", "nothing"} & set().union(
        *[each["nameko"]["context"] for each in kept]
    )


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("priority", {"priority": "asap"}),
        ("max_retries", {"max_retries": 101}),
        ("max_retries", {"max_retries": True}),
        ("delay", {"delay": -1}),
        ("delay", {"delay": float("nan")}),
        ("delay", {"delay": "5"}),
        ("delay", {"delay": 5, "scheduled_at": datetime(2030, 1, 1, tzinfo=UTC)}),
        ("scheduled_at", {"scheduled_at": datetime(2030, 1, 1)}),
        ("scheduled_at", {"scheduled_at": datetime(2040, 1, 1, tzinfo=UTC)}),
        ("metadata", {"metadata": ["a"]}),
        ("metadata", {"metadata": {"a": float("inf")}}),
        ("metadata", {"metadata": {"a": "\ud800"}}),
        ("metadata.nameko", {"metadata": {"nameko": {}}}),
    ],
)
def test_names_the_option_that_cannot_be(field, options):
    with pytest.raises(PayloadError) as refused:
        make_envelope(SETTINGS, "things", "thing.happened", {}, **options)

    assert list(refused.value.errors) == [field]


@pytest.mark.parametrize("name", ["", "-x", "a b", "x" * 201, "ünter", None, 3])
def test_names_keep_to_their_grammar(name):
    with pytest.raises(PayloadError, match="queue: must match"):
        make_envelope(SETTINGS, name, "thing.happened", {})
    with pytest.raises(PayloadError, match="event_type: must match"):
        make_envelope(SETTINGS, "things", name, {})


@pytest.mark.parametrize("payload", ["\ud800", {"a": {1, 2}}, {1: 2}, float("nan"), b"x"])
def test_a_payload_is_json(payload):
    with pytest.raises(PayloadError, match="payload: "):
        make_envelope(SETTINGS, "things", "thing.happened", payload)


def test_a_time_is_kept_as_utc():
    at = datetime(2030, 1, 1, 12, tzinfo=UTC).astimezone(tz=None) + timedelta(hours=1)

    envelope = make_envelope(SETTINGS, "things", "thing.happened", {}, scheduled_at=at)

    assert envelope.scheduled_at == datetime(2030, 1, 1, 13)


def test_when_dispatch_returns_the_event_is_stored(call, sqlite_log):
    first = call("send", {"n": 1})
    more = call("send_many", [("thing.happened", {"n": n}) for n in range(2, 50)])

    assert stored(sqlite_log) == [first, *more]


def test_many_are_stored_together_or_not_at_all(call, sqlite_log):
    with pytest.raises(PayloadError):
        call("send_many", [("thing.happened", {}), ("thing happened", {})])

    assert stored(sqlite_log) == []


def test_a_session_without_an_outbox_is_an_error_that_says_what_is_missing(call):
    with pytest.raises(DispatchError, match="source_outbox"):
        call("with_session", {}, object())


def test_a_commit_that_took_place_though_its_answer_was_lost(call, sqlite_log, monkeypatch):
    fail_commits(monkeypatch, after=True)

    message_id = call("send", {})

    assert stored(sqlite_log) == [message_id]


def test_a_commit_that_did_not_take_place(call, sqlite_log, monkeypatch):
    fail_commits(monkeypatch, after=False)

    with pytest.raises(DispatchError, match="nothing was stored"):
        call("send", {})

    assert stored(sqlite_log) == []


def test_one_that_cannot_be_stored_does_not_take_others_with_it(call, sqlite_log, monkeypatch):
    real = log.append

    def append(tx, envelopes, *args, **kwargs):
        if any("poison" in envelope.body for envelope in envelopes):
            raise ValueError("cannot be stored")
        return real(tx, envelopes, *args, **kwargs)

    monkeypatch.setattr(log, "append", append)

    with pytest.raises(DispatchError, match="cannot be stored"):
        call("send", json.loads('{"poison": 1}'))
    message_id = call("send", {})

    assert stored(sqlite_log) == [message_id]


def fail_commits(monkeypatch, *, after):
    """Have the next commit of a dispatch break, before it took place or after."""
    real, broken = Database._commit, []

    def commit(self, connection: Connection):
        if broken:
            real(self, connection)
            return
        broken.append(True)
        if after:
            real(self, connection)
        self.drop_connection()
        raise CommitUncertainError("the connection broke")

    monkeypatch.setattr(Database, "_commit", commit)
