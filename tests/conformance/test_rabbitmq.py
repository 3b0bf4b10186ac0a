"""What is peculiar to RabbitMQ; what it promises with the other providers is tested beside this."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import amqp
import pytest
from eventlet.event import Event
from nameko.containers import ServiceContainer
from nameko.events import BROADCAST, SINGLETON, event_handler
from nameko.standalone.events import event_dispatcher

from shared.errors import ProviderError, ProviderRefusedError, ProviderUnavailableError
from shared.native import Signal
from shared.providers.rabbitmq import RabbitMQProvider, driver
from shared.providers.rabbitmq.layout import (
    DELAY_LEVELS,
    LONGEST_NAME_BYTES,
    TICK_SECONDS,
    beside,
    delay_levels,
    queue_name,
)
from shared.settings import load_settings
from shared.tables import OWN_METADATA
from shared.testing.conformance.lab import QUEUE, SOURCE, Worker, elapsed, seqs
from shared.testing.servers import HOST, RabbitMQServer, free_port
from shared.types import (
    Delivery,
    Envelope,
    Lease,
    Priority,
    SettleAction,
    Settlement,
    Subscription,
    new_message_id,
)
from tests.conformance.labs import OnRabbitMQ
from tests.support.processes import freeze
from tests.support.waiting import PROMPTLY, wait_until

BY_RABBITMQ = {
    "QUEUE_PROVIDER": "shared.providers.rabbitmq:RabbitMQProvider",
    "QUEUE_SOURCES": f"{SOURCE}={QUEUE}",
}

PEM = str(Path(__file__).parents[1] / "services/localhost.pem")

PLACED = Subscription(QUEUE, SOURCE, "placed", "audit.note", id=1)
PAID = Subscription(QUEUE, SOURCE, "paid", "audit.note", id=2)
EVERYBODY = Subscription(QUEUE, SOURCE, "placed", "audit.note-1", "broadcast", reliable=False, id=3)
LOOSE = Subscription(QUEUE, SOURCE, "placed", "loose.note", reliable=False, id=4)

CONTEXT = {"call_id_stack": ["shop.sell.1", "audit.note.2"], "user_id": 7, "language": "ta"}

NewProvider = Callable[..., RabbitMQProvider]


@pytest.fixture
def channel(rabbitmq_server: RabbitMQServer) -> Iterator[Any]:
    """A channel of somebody else's, on a server that is emptied afterwards."""
    with rabbitmq_server.connect() as connection:
        yield connection.channel()
    known = (PLACED, PAID, EVERYBODY, LOOSE)
    names = [queue_name(each) for each in known]
    rabbitmq_server.delete_queues(
        *names,
        *[beside(name, end) for name in names for end in ("dead", "paused")],
        *[f"nameko.delay.{level}" for level in range(DELAY_LEVELS)],
    )


@pytest.fixture
def new_provider() -> Iterator[NewProvider]:
    made: list[RabbitMQProvider] = []

    def make(environment: Mapping[str, str], *declared: Subscription) -> RabbitMQProvider:
        provider = RabbitMQProvider(load_settings({**BY_RABBITMQ, **environment}))
        made.append(provider)
        provider.initialize()
        provider.declare(declared)
        return provider

    yield make
    for provider in made:
        provider.close()


@pytest.fixture
def provider(
    rabbitmq_server: RabbitMQServer, new_provider: NewProvider, channel: Any
) -> RabbitMQProvider:
    return new_provider(rabbitmq_server.environment, PLACED)


@pytest.fixture
def other(
    rabbitmq_server: RabbitMQServer, new_provider: NewProvider, provider: RabbitMQProvider
) -> RabbitMQProvider:
    """Another instance, which consumes the same."""
    return new_provider(rabbitmq_server.environment, PLACED)


@pytest.fixture
def worker(request: pytest.FixtureRequest, channel: Any) -> Iterator[Worker]:
    worker = Worker(OnRabbitMQ.from_fixtures(request))
    worker.open()
    yield worker
    worker.close()


@pytest.fixture
def interrupt() -> Iterator[int]:
    signal = Signal()
    yield signal.fileno()
    signal.close()


def make_deliveries(
    count: int, *, first: int = 1, to: Subscription = PLACED, body: str = "{}", **more: Any
) -> list[Delivery]:
    return [
        Delivery(seq, to.id, Envelope(new_message_id(), to.queue, to.event_type, body, **more))
        for seq in range(first, first + count)
    ]


def reserve(provider: RabbitMQProvider, limit: int = 100, to: Subscription = PLACED) -> list[Lease]:
    return provider.reserve({to.id: limit}, limit)


def reserve_within(
    provider: RabbitMQProvider, interrupt: int, count: int = 1, to: Subscription = PLACED
) -> list[Lease]:
    deadline = monotonic() + 10
    leases = reserve(provider, count, to)
    while len(leases) < count:
        left = deadline - monotonic()
        assert left > 0, f"{len(leases)} of {count} within 10 s"
        provider.wait(left, interrupt)
        leases += reserve(provider, count - len(leases), to)
    return leases


def settle(provider: RabbitMQProvider, action: str, *leases: Lease, delay: float = 0.0) -> None:
    ended = [Settlement(lease, SettleAction(action), delay) for lease in leases]
    assert provider.settle(ended) == []


def count(channel: Any, name: str) -> int:
    """Count what is ready in a queue that is there."""
    found: int = channel.queue_declare(name, passive=True).message_count
    return found


def is_there(server: RabbitMQServer, name: str) -> bool:
    with server.connect() as connection:
        try:
            connection.channel().queue_declare(name, passive=True)
        except amqp.NotFound:
            return False
    return True


# --- beside plain nameko


class Audit:
    """A service of plain nameko's."""

    name = "audit"
    seen: Event

    @event_handler(SOURCE, "placed")
    def note(self, payload: Any) -> None:
        self.seen.send(payload)


@pytest.fixture
def nameko_config(rabbitmq_server: RabbitMQServer) -> Mapping[str, Any]:
    uri = load_settings(rabbitmq_server.environment).rabbitmq_uri
    return {"AMQP_URI": uri.replace("amqp://", "pyamqp://")}


@contextlib.contextmanager
def running(service: type, config: Mapping[str, Any]) -> Iterator[Any]:
    container = ServiceContainer(service, config)
    container.start()
    try:
        yield container
    finally:
        container.stop()


def declared_as(server: RabbitMQServer, *names: str) -> dict[str, list[str]]:
    listed = server.control("list_queues", "name", "durable", "auto_delete", "exclusive")
    rows = [line.split("\t") for line in listed.splitlines()]
    return {name: rest for name, *rest in rows if name in names}


class TestBesideNameko:
    def test_queues_are_declared_alike(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider, nameko_config: Any
    ) -> None:
        class Handlers:
            name = "audit"

            @event_handler(SOURCE, "placed")
            def note(self, payload: Any) -> None: ...

            @event_handler(SOURCE, "paid", handler_type=SINGLETON)
            def once(self, payload: Any) -> None: ...

            @event_handler(SOURCE, "packed", reliable_delivery=False)
            def loose(self, payload: Any) -> None: ...

            @event_handler(SOURCE, "sent", handler_type=BROADCAST, reliable_delivery=False)
            def everywhere(self, payload: Any) -> None: ...

        with running(Handlers, nameko_config) as container:
            plain = [each.queue.name for each in container.entrypoints]
            theirs = declared_as(rabbitmq_server, *plain)
            instance = next(name for name in plain if "-sent-" in name).rpartition("-")[2]
        rabbitmq_server.delete_queues(*plain)
        ours = [
            Subscription(QUEUE, SOURCE, "placed", "audit.note", id=1),
            Subscription(QUEUE, SOURCE, "paid", "anybody", "singleton", id=2),
            Subscription(QUEUE, SOURCE, "packed", "audit.loose", reliable=False, id=3),
            Subscription(
                QUEUE,
                SOURCE,
                "sent",
                f"audit.everywhere-{instance}",
                "broadcast",
                reliable=False,
                id=4,
            ),
        ]
        provider = new_provider(rabbitmq_server.environment, *ours)
        assert len(theirs) == 4
        assert declared_as(rabbitmq_server, *plain) == theirs
        for subscription in ours:
            provider.forget(subscription)

    def test_a_plain_handler_gets_ours(
        self, provider: RabbitMQProvider, rabbitmq_server: RabbitMQServer, nameko_config: Any
    ) -> None:
        """Given a plain service that listens as well, what we publish reaches it."""
        stacks = Event()

        class Reader(Audit):
            name = "ledger"
            seen = Event()

        class Noting(ServiceContainer):
            def spawn_worker(self, entrypoint: Any, *args: Any, **options: Any) -> Any:
                stacks.send(dict(options["context_data"]))
                return super().spawn_worker(entrypoint, *args, **options)

        container = Noting(Reader, nameko_config)
        container.start()
        metadata = {OWN_METADATA: {"context": CONTEXT}, "version": "1"}
        [sent] = make_deliveries(1, body='{"item":"தேநீர்"}', metadata=metadata)
        # a delayed one goes the same way in the end
        assert provider.publish([replace(sent, delay=0.2)]) == []
        assert Reader.seen.wait(5) == {"item": "தேநீர்"}
        context = stacks.wait(5)
        assert {key: context[key] for key in CONTEXT} == CONTEXT
        container.stop()
        rabbitmq_server.delete_queues(f"evt-{SOURCE}-placed--ledger.note")

    def test_ours_gets_a_plain_dispatchers(
        self, provider: RabbitMQProvider, interrupt: int, nameko_config: Any
    ) -> None:
        headers = {f"nameko.{key}": value for key, value in CONTEXT.items()}
        dispatch = event_dispatcher(nameko_config, headers=headers)
        dispatch(SOURCE, "placed", {"item": "தேநீர்"})
        [lease] = reserve_within(provider, interrupt)
        message = lease.delivery.message
        assert (lease.token, lease.delivery.seq, message.id) == (0, 0, "")
        assert lease.delivery.subscription_id == PLACED.id
        assert (message.queue, message.type, message.priority) == (QUEUE, "placed", "normal")
        assert message.payload == {"item": "தேநீர்"}
        assert message.metadata == {OWN_METADATA: {"context": CONTEXT}}

    def test_a_plain_event_keeps_its_number_when_it_is_retried(
        self, provider: RabbitMQProvider, interrupt: int, nameko_config: Any
    ) -> None:
        """Given an event that the log took in and numbered, its retry bears the number."""
        dispatch = event_dispatcher(nameko_config, headers={"nameko.user_id": 7, "theirs": "x"})
        dispatch(SOURCE, "placed", [1, 2])
        [lease] = reserve_within(provider, interrupt)
        named = replace(lease.delivery.message, id=new_message_id())
        known = replace(lease, delivery=replace(lease.delivery, seq=12, message=named))
        settle(provider, "retry", known, delay=0.1)
        [again] = reserve_within(provider, interrupt)
        assert (again.delivery.seq, again.delivery.attempts) == (12, 1)
        assert again.delivery.message == replace(named, priority=Priority.LOW)

    def test_a_queue_of_plain_nameko_is_taken_over_with_what_it_has(
        self,
        rabbitmq_server: RabbitMQServer,
        new_provider: NewProvider,
        channel: Any,
        interrupt: int,
        nameko_config: Any,
    ) -> None:
        """Given a plain service that was stopped, and events that came meanwhile."""
        with running(Audit, nameko_config):
            pass
        dispatch = event_dispatcher(nameko_config)
        for number in range(3):
            dispatch(SOURCE, "placed", number)
        # when ours starts
        provider = new_provider(rabbitmq_server.environment, PLACED)
        # then it says how it is, and handles all of them, in every way
        name = queue_name(PLACED)
        assert [notice.split(":")[0] for notice in provider.notices] == [name]
        one, two, three = leases = reserve_within(provider, interrupt, 3)
        assert [lease.delivery.message.payload for lease in leases] == [0, 1, 2]
        settle(provider, "dead_letter", one)
        settle(provider, "retry", two)
        settle(provider, "acknowledge", three)
        assert [x.delivery.message.payload for x in reserve(provider)] == [1]
        dead = channel.basic_get(beside(name, "dead"), no_ack=True)
        assert dead.body == b"0" or dead.body == "0"
        [stats] = provider.get_queue_stats([PLACED])
        assert (stats.waiting, stats.dead) == (0, 0)

    def test_a_queue_of_plain_nameko_is_shared(
        self,
        rabbitmq_server: RabbitMQServer,
        new_provider: NewProvider,
        channel: Any,
        nameko_config: Any,
    ) -> None:
        """Given two queues, what is not in the plain one its workers may have handled."""
        with running(Audit, nameko_config):
            pass
        consuming = new_provider(rabbitmq_server.environment, PLACED, PAID)
        only_looking = new_provider(rabbitmq_server.environment)
        for each in (consuming, only_looking):
            assert [each.shares(its) for its in (PLACED, PAID, EVERYBODY)] == [True, False, False]

    def test_a_queue_of_another_kind_is_nobody_elses(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider, channel: Any
    ) -> None:
        """Given one that was declared when the setting was another, what is not there is lost."""
        kind = {"x-queue-type": "quorum"}
        channel.queue_declare(queue_name(PLACED), durable=True, auto_delete=False, arguments=kind)
        consuming = new_provider(rabbitmq_server.environment, PLACED)
        only_looking = new_provider(rabbitmq_server.environment)
        assert not consuming.shares(PLACED)
        assert not only_looking.shares(PLACED)
        [notice] = consuming.notices
        assert "declared before as another kind of queue" in notice

    def test_what_is_no_json_is_left_to_the_handler(
        self, provider: RabbitMQProvider, channel: Any
    ) -> None:
        foreign = {"queue-metadata": "[", "queue-seq": "x", "queue-deliveries": 5, "nameko.x": 1}
        channel.basic_publish(
            amqp.Message(b"\xff\x00", application_headers=foreign), f"{SOURCE}.events", "placed"
        )
        wait_until(lambda: count(channel, queue_name(PLACED)), 5, "the message to arrive")
        [lease] = reserve(provider)
        assert lease.delivery.message.body == "\ufffd\x00"
        assert lease.delivery.message.metadata == {OWN_METADATA: {"context": {"x": 1}}}
        assert lease.delivery.seq == 0


# --- messages


def headers(of: Mapping[str, Any]) -> bytes:
    """Return headers as a message's properties."""
    return amqp.Message(application_headers=of)._serialize_properties()  # type: ignore[no-any-return]


def table(key: bytes, value: bytes) -> bytes:
    """Return an AMQP table of one field, whose value begins with its type."""
    field = bytes([len(key)]) + key + value
    return len(field).to_bytes(4) + field


class TestMessages:
    def test_are_bare_payloads_with_headers(self, provider: RabbitMQProvider, channel: Any) -> None:
        [sent] = make_deliveries(
            1,
            body='{"item":"தேநீர்"}',
            priority=Priority.HIGH,
            max_retries=5,
            scheduled_at=datetime(2026, 2, 3, 4, 5, 6, 789000),
            created_at=datetime(2026, 2, 3, 4, 5),
            metadata={"version": "1", OWN_METADATA: {"context": CONTEXT, "max_retries": 5}},
        )
        provider.publish([sent, replace(sent, seq=2, subscription_id=PAID.id)])
        message = channel.basic_get(queue_name(PLACED))
        headers = message.properties.pop("application_headers")
        assert message.body == '{"item":"தேநீர்"}'
        assert message.properties == {
            "content_type": "application/json",
            "content_encoding": "utf-8",
            "delivery_mode": 2,
            "priority": 2,
            "message_id": sent.message.id,
            "type": "placed",
            "timestamp": 1770091500,
        }
        assert json.loads(headers.pop("queue-metadata")) == {
            "version": "1",
            OWN_METADATA: {"max_retries": 5},
        }
        assert headers == {
            "queue-name": QUEUE,
            "queue-deliveries": {"1": 1, "2": 2},
            "queue-max-retries": 5,
            "queue-scheduled-at": "2026-02-03T04:05:06.789000",
            "queue-created-at": "2026-02-03T04:05:00",
            **{f"nameko.{key}": value for key, value in CONTEXT.items()},
        }
        channel.basic_reject(message.delivery_tag, requeue=True)
        wait_until(lambda: count(channel, queue_name(PLACED)), 5, "it to be back")
        [lease] = reserve(provider)
        assert lease.delivery == sent

    @pytest.mark.parametrize(
        "value",
        [None, "", 2**63, -(2**63), 1.5, True, [1, [None]], {"a": {"b": [2**70]}}, "x" * 20_000],
    )
    def test_bring_back_whatever_a_context_holds(
        self, provider: RabbitMQProvider, value: Any
    ) -> None:
        metadata = {OWN_METADATA: {"context": {"key": value, "k" * 250: value}}}
        sent = make_deliveries(1, metadata=metadata)
        provider.publish(sent)
        [lease] = reserve(provider)
        assert lease.delivery.message.metadata == metadata

    def test_travel_without_metadata_that_no_frame_holds(self, provider: RabbitMQProvider) -> None:
        sent = make_deliveries(1, metadata={"long": "x" * 200_000})
        assert provider.publish(sent) == []
        [lease] = reserve(provider)
        assert lease.delivery.message.metadata == {}
        assert [notice.split(":")[0] for notice in provider.notices] == [sent[0].message.id]

    @pytest.mark.parametrize(
        "properties",
        [
            # flags, and what they say is there: headers (0x2000), or a message id (0x0080)
            b"\x20\x00" + table(b"sent", b"T" + (1_700_000_000_000).to_bytes(8)),
            b"\x20\x00" + table(b"caf\xe9", b"I" + (1).to_bytes(4)),
            b"\x00\x80\x04caf\xe9",
            headers({"queue-metadata": '{"nameko": 5}', "x": "1"}),
            headers({"queue-metadata": '{"nameko": {"context": [1]}}', "x": "1"}),
            headers({"queue-metadata": "[" * 50_000}),
            headers({"queue-name": 5, "queue-seq": "x", "queue-deliveries": [1]}),
        ],
        ids=["time", "key", "id", "metadata", "context", "deep", "ours"],
    )
    def test_of_strangers_arrive_whatever_their_properties(
        self, provider: RabbitMQProvider, channel: Any, interrupt: int, properties: bytes
    ) -> None:
        message = amqp.Message(b'{"n": 1}')
        message._serialize_properties = lambda: properties
        channel.basic_publish(message, routing_key=queue_name(PLACED))
        [sent] = make_deliveries(1)
        provider.publish([sent])
        found = reserve_within(provider, interrupt, 2)
        bodies = [lease.delivery.message.body for lease in found]
        assert sorted(bodies) == sorted(['{"n": 1}', sent.message.body])
        # once more, as a copy
        settle(provider, "retry", *found)
        again = reserve_within(provider, interrupt, 2)
        assert [lease.delivery.message.body for lease in again] == bodies
        settle(provider, "acknowledge", *again)

    def test_may_be_large(self, provider: RabbitMQProvider) -> None:
        body = json.dumps("தேநீர்" * 300_000, ensure_ascii=False)
        provider.publish(make_deliveries(3, body=body))
        assert [lease.delivery.message.body == body for lease in reserve(provider)] == [True] * 3

    def test_for_one_subscription_reach_no_other(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider, channel: Any
    ) -> None:
        twin = replace(PLACED, subscriber="twin.note", id=5)
        provider = new_provider(rabbitmq_server.environment, PLACED, twin)
        [sent] = make_deliveries(1)
        assert provider.publish([replace(sent, to=PLACED, attempts=2)]) == []
        [lease] = provider.reserve({PLACED.id: 10, twin.id: 10}, 10)
        assert (lease.delivery.subscription_id, lease.delivery.attempts) == (PLACED.id, 2)
        rabbitmq_server.delete_queues(queue_name(twin), beside(queue_name(twin), "dead"))

    def test_without_a_queue_are_returned(self, provider: RabbitMQProvider) -> None:
        lost = make_deliveries(2, first=10, to=PAID)
        [unwanted] = make_deliveries(1, first=0, to=replace(PAID, id=0))
        direct = [replace(each, to=PAID) for each in make_deliveries(1, first=20, to=PAID)]
        found = make_deliveries(2)
        returned = provider.publish([lost[0], *found, unwanted, lost[1], *direct])
        assert sorted(seqs(returned)) == [0, 10, 11, 20]
        assert seqs(reserve(provider)) == seqs(found)

    def test_that_a_full_queue_refuses_are_told_apart(
        self, provider: RabbitMQProvider, channel: Any
    ) -> None:
        """Given somebody's queue that refuses what is beyond two, when more is published, then
        it is said which ones were refused, and ours has all of them."""
        full = {"x-max-length": 2, "x-overflow": "reject-publish"}
        name = channel.queue_declare("", exclusive=True, arguments=full).queue
        channel.queue_bind(name, f"{SOURCE}.events", "placed")
        deliveries = make_deliveries(5)

        with pytest.raises(ProviderRefusedError, match="refused 3 messages") as caught:
            provider.publish(deliveries)

        assert caught.value.refused == deliveries[2:]
        assert caught.value.homeless == []
        assert count(channel, queue_name(PLACED)) == 5

    def test_that_are_too_large_hold_nobody_up(self, new_provider: NewProvider) -> None:
        """Given a RabbitMQ that ends the channel of who sends it something large, when that
        happened, then it is not sent again, and what is small is."""
        server = RabbitMQServer("max_message_size = 1000")
        with contextlib.closing(server):
            server.start()
            provider = new_provider(server.environment, PLACED)
            [large] = make_deliveries(1, body=f'"{"x" * 1000}"')
            [small] = make_deliveries(1, first=2)
            with pytest.raises(ProviderError, match="larger than"):
                provider.publish([large, small])

            with pytest.raises(ProviderRefusedError, match="no more than 1000 bytes") as caught:
                provider.publish([large, small])

            assert caught.value.refused == [large]
            assert seqs(reserve(provider)) == [2]

    def test_by_the_thousand_are_confirmed_together(self, provider: RabbitMQProvider) -> None:
        sent = make_deliveries(5000, body=json.dumps("x" * 300))
        with elapsed(at_most=5):
            assert provider.publish(sent) == []
        assert seqs(reserve(provider, 10_000)) == seqs(sent)


class TestNames:
    @pytest.mark.parametrize("length", [10, 200, 255])
    def test_beside_a_queue_fit(self, length: int) -> None:
        assert len(beside("q" * length, "paused")) <= LONGEST_NAME_BYTES

    def test_beside_a_long_queue_are_its_own(self) -> None:
        assert beside("a" * 255, "dead") != beside("b" * 255, "dead")


# --- delays


class TestDelays:
    @pytest.mark.parametrize("seconds", [0.001, 0.064, 0.065, 1, 599.99, 86_400, 366 * 86_400])
    def test_add_up(self, seconds: float) -> None:
        ticks = sum(1 << min(level, 25) for level in delay_levels(seconds))
        assert 0 <= ticks * TICK_SECONDS - seconds < TICK_SECONDS
        assert len(set(delay_levels(seconds))) == len(delay_levels(seconds))
        assert max(delay_levels(seconds)) < DELAY_LEVELS

    def test_of_nothing_are_none(self) -> None:
        assert delay_levels(0) == delay_levels(-1) == []

    def test_of_a_year_are_taken(self, provider: RabbitMQProvider, channel: Any) -> None:
        [sent] = make_deliveries(1)
        year = 366 * 86_400.0
        assert provider.publish([replace(sent, delay=year)]) == []
        assert count(channel, f"nameko.delay.{delay_levels(year)[0]}") == 1

    def test_hold_nobody_up(self, provider: RabbitMQProvider, interrupt: int) -> None:
        """Given thousands that wait, each for a time of its own, between seconds and a month."""
        times = random.Random(7)
        many = [
            replace(each, delay=times.choice([1, 60, 3600, 86_400]) * times.uniform(20, 30))
            for each in make_deliveries(20_000, first=100)
        ]
        provider.publish(many)
        reserve(provider)
        # then some come in the order of their times, and on time
        delays = [1.0, 0.3, 0.7]
        for seq, delay in enumerate(delays, 1):
            [sent] = make_deliveries(1, first=seq)
            provider.publish([replace(sent, delay=delay)])
        begin = monotonic()
        for seq, delay in [(2, 0.3), (3, 0.7), (1, 1.0)]:
            [lease] = reserve_within(provider, interrupt)
            assert lease.delivery.seq == seq
            assert delay - 0.1 <= monotonic() - begin <= delay + PROMPTLY
            settle(provider, "acknowledge", lease)

    def test_whose_queues_are_gone_are_kept_once_something_came_too_early(
        self, provider: RabbitMQProvider, channel: Any, interrupt: int
    ) -> None:
        """Given a provider that has declared the delay queues, which somebody deletes."""
        [first, second] = make_deliveries(2)
        provider.publish([replace(first, delay=60)])
        levels = range(delay_levels(60)[0] + 1)
        for level in levels:
            channel.queue_delete(f"nameko.delay.{level}")
        provider.publish([replace(second, delay=60)])
        [lease] = reserve_within(provider, interrupt)

        ended = Settlement(lease, SettleAction.RETRY, 60, is_early=True)
        assert provider.settle([ended]) == []

        assert sum(count(channel, f"nameko.delay.{level}") for level in levels) == 1
        assert reserve(provider) == []

    def test_may_follow_each_other(self, provider: RabbitMQProvider, interrupt: int) -> None:
        # RabbitMQ drops what comes to a queue again by itself
        provider.publish(make_deliveries(1))
        for attempt in range(4):
            [lease] = reserve_within(provider, interrupt)
            assert lease.delivery.attempts == attempt
            settle(provider, "retry", lease, delay=0.1)


# --- consuming


class TestFullQueues:
    """Given delay queues that refuse what is beyond one."""

    @pytest.fixture(autouse=True)
    def _full(self, provider: RabbitMQProvider, rabbitmq_server: RabbitMQServer) -> Iterator[None]:
        full = json.dumps({"max-length": 1, "overflow": "reject-publish"})
        rabbitmq_server.control("set_policy", "full", r"^nameko\.delay", full)
        yield
        rabbitmq_server.control("clear_policy", "full")

    def test_hold_up_nothing_else_and_get_it_once_they_have_room(
        self,
        provider: RabbitMQProvider,
        other: RabbitMQProvider,
        channel: Any,
        interrupt: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sent = make_deliveries(4)
        provider.publish(sent[:3])
        failed = reserve_within(provider, interrupt, 3)
        assert len(failed) == 3
        began = monotonic()
        settle(provider, "retry", *failed, delay=0.5)
        [notice] = provider.notices
        assert "refused 2 messages: a queue is full; what failed is kept in hand" in notice

        # somebody else does not get those, and what is new goes its way, up to a limit
        provider.publish(sent[3:])
        with monkeypatch.context() as patch:
            patch.setattr("shared.providers.rabbitmq.provider.MOST_REFUSED", 2)
            assert reserve(provider) == []
        [new] = reserve_within(provider, interrupt, 1)
        settle(provider, "acknowledge", new)
        assert reserve(other) == []

        found: list[Lease] = []
        while len(found) < 3 and monotonic() < began + 10:
            provider.wait(0.1, interrupt)
            found += reserve(provider)
        assert sorted(lease.delivery.message.id for lease in found) == sorted(
            lease.delivery.message.id for lease in failed
        )
        assert {lease.delivery.attempts for lease in found} == {1}
        settle(provider, "acknowledge", *found)
        assert (count(channel, queue_name(PLACED)), provider.count_delayed()) == (0, 0)


class TestPushes:
    def test_are_given_back_when_there_is_no_room(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        """Given an instance that waited with room for many, and then has no free worker."""
        reserve(provider, 50)
        provider.wait(0, interrupt)
        sent = make_deliveries(20)
        other.publish(sent)
        wait_until(lambda: reserve_is_empty(other), 5, "everything to be pushed")
        provider.wait(0, interrupt, hungry=False)
        assert seqs(reserve(other)) == seqs(sent)

    def test_beyond_the_limit_are_given_back(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        reserve(provider, 50)
        provider.wait(0, interrupt)
        sent = make_deliveries(20)
        other.publish(sent)
        wait_until(lambda: reserve_is_empty(other), 5, "everything to be pushed")
        assert seqs(reserve(provider, 5)) == seqs(sent[:5])
        assert seqs(reserve(other)) == seqs(sent[5:])

    def test_are_ordered_by_priority(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        reserve(provider, 50)
        provider.wait(0, interrupt)
        low = make_deliveries(3, priority=Priority.LOW)
        urgent = make_deliveries(3, first=10, priority=Priority.URGENT)
        other.publish([*low, *urgent])
        assert seqs(reserve(provider, 4)) == seqs([*urgent, low[0]])

    def test_leave_nothing_out(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        """Given an instance that has waited, it gets all that is there, pushed or not."""
        for _ in range(20):
            reserve(provider, 5)
            provider.wait(0, interrupt)
            sent = make_deliveries(8)
            other.publish(sent)
            leases = reserve(provider, 100)
            assert seqs(leases) == seqs(sent)
            settle(provider, "acknowledge", *leases)

    def test_count_as_waiting_and_are_purged(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        reserve(provider, 5)
        provider.wait(0, interrupt)
        other.publish(make_deliveries(8))
        provider.wait(5, interrupt)
        wait_until(lambda: stats_of(provider) == (8, 0), 5, "all of them to be counted")
        assert provider.purge(PLACED) == 8
        assert reserve(provider) == []


def reserve_is_empty(provider: RabbitMQProvider) -> bool:
    leases = reserve(provider)
    settle(provider, "release", *leases)
    return not leases


def stats_of(provider: RabbitMQProvider) -> tuple[int, int]:
    [stats] = provider.get_queue_stats([PLACED])
    return stats.waiting, stats.dead


class TestPauses:
    def test_are_known_to_who_comes_later(
        self,
        rabbitmq_server: RabbitMQServer,
        new_provider: NewProvider,
        provider: RabbitMQProvider,
    ) -> None:
        sent = make_deliveries(1)
        provider.publish(sent)
        provider.pause(PLACED)
        provider.close()
        later = new_provider(rabbitmq_server.environment, PLACED)
        assert reserve(later) == []
        later.resume(PLACED)
        assert seqs(reserve(later)) == seqs(sent)

    def test_end_what_is_pushed(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        """Given an instance that waits while another pauses, it holds nothing back."""
        reserve(provider, 5)
        provider.wait(0, interrupt)
        other.pause(PLACED)
        provider.wait(5, interrupt)
        reserve(provider, 5)
        provider.wait(0, interrupt)
        sent = make_deliveries(1)
        other.publish(sent)
        [stats] = other.get_queue_stats([PLACED])
        assert stats.waiting == 1
        other.resume(PLACED)
        assert seqs(reserve_within(provider, interrupt)) == seqs(sent)


class TestUnreliable:
    @pytest.mark.parametrize("subscription", [EVERYBODY, LOOSE], ids=["broadcast", "pool"])
    def test_queues_stay_as_long_as_who_consumes(
        self,
        rabbitmq_server: RabbitMQServer,
        new_provider: NewProvider,
        channel: Any,
        interrupt: int,
        subscription: Subscription,
    ) -> None:
        provider = new_provider(rabbitmq_server.environment, subscription)
        for first in (1, 11, 21):
            provider.publish(make_deliveries(3, first=first, to=subscription))
            leases = reserve_within(provider, interrupt, 3, subscription)
            assert sorted(seqs(leases)) == [first, first + 1, first + 2]
            settle(provider, "acknowledge", *leases)
            # its consumers end here, but for one
            provider.wait(0, interrupt, hungry=False)
        provider.close()
        name = queue_name(subscription)
        wait_until(lambda: not is_there(rabbitmq_server, name), 5, "the queue to be gone")
        assert not is_there(rabbitmq_server, beside(name, "dead"))


class TestDeadLetters:
    def test_are_kept_whole(self, provider: RabbitMQProvider, channel: Any) -> None:
        [sent] = make_deliveries(1, body='{"item":"tea"}')
        provider.publish([sent])
        settle(provider, "dead_letter", *reserve(provider))
        assert stats_of(provider) == (0, 1)
        dead = channel.basic_get(beside(queue_name(PLACED), "dead"))
        assert dead.body == '{"item":"tea"}'
        assert dead.properties["message_id"] == sent.message.id
        assert dead.properties["application_headers"]["queue-deliveries"] == {"1": 1}


# --- trouble


class TestQueueDeleted:
    def test_while_nobody_looks_is_made_again(
        self, provider: RabbitMQProvider, channel: Any, interrupt: int
    ) -> None:
        assert reserve(provider) == []
        channel.queue_delete(queue_name(PLACED))
        assert reserve(provider) == []
        sent = make_deliveries(2)
        assert provider.publish(sent) == []
        assert seqs(reserve_within(provider, interrupt, 2)) == seqs(sent)

    def test_while_it_is_waited_for_is_made_again(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, channel: Any, interrupt: int
    ) -> None:
        assert reserve(provider) == []
        provider.wait(0, interrupt)
        channel.queue_delete(queue_name(PLACED))
        provider.wait(5, interrupt)
        assert reserve(provider) == []
        sent = make_deliveries(2)
        assert other.publish(sent) == []
        assert seqs(reserve_within(provider, interrupt, 2)) == seqs(sent)


class TestQueueUnbound:
    """Given somebody who takes a queue from its exchange, while it is consumed from."""

    @pytest.fixture(autouse=True)
    def _unbound(self, provider: RabbitMQProvider, channel: Any) -> None:
        channel.queue_unbind(queue_name(PLACED), f"{SOURCE}.events", PLACED.event_type)

    def test_is_bound_again_by_who_publishes(
        self, rabbitmq_server: RabbitMQServer, provider: RabbitMQProvider, new_provider: NewProvider
    ) -> None:
        publishing = new_provider(rabbitmq_server.environment)
        sent = make_deliveries(2)
        assert publishing.publish(sent) == sent

        publishing.rejoin(PLACED)
        publishing.rejoin(PLACED)

        assert publishing.publish(sent) == []
        assert seqs(reserve(provider)) == seqs(sent)
        [notice] = publishing.notices
        assert notice.startswith(f"{queue_name(PLACED)}: was not bound")

    def test_may_be_gone_by_then(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider
    ) -> None:
        publishing = new_provider(rabbitmq_server.environment)
        publishing.rejoin(PAID)
        assert publishing.notices == []
        assert publishing.publish(make_deliveries(1, to=PAID)) != []


class TestAlarm:
    def test_stops_who_publishes_and_not_who_handles(
        self,
        rabbitmq_server: RabbitMQServer,
        provider: RabbitMQProvider,
        new_provider: NewProvider,
        interrupt: int,
    ) -> None:
        """Given a RabbitMQ that ran out of memory."""
        sent = make_deliveries(6)
        provider.publish(sent)
        held = reserve(provider, 2)
        rabbitmq_server.control("set_vm_memory_high_watermark", "0.0000001")
        try:
            # then publishing fails at once, each time, and health is bad
            for _ in range(2):
                with (
                    elapsed(at_most=2),
                    pytest.raises(ProviderUnavailableError, match="short of memory or disk"),
                ):
                    provider.publish(make_deliveries(1, first=10))
            assert provider.health_check() is False
            # and what there is is handled
            provider.initialize()
            assert provider.extend(held) == []
            settle(provider, "acknowledge", held[0])
            settle(provider, "release", held[1])
            leases = reserve(provider)
            assert seqs(leases) == seqs(sent[1:])
            # but for what has to be published, which stays as it is
            with pytest.raises(ProviderUnavailableError):
                provider.settle([Settlement(leases[0], SettleAction.RETRY)])
            assert provider.extend(leases) == []
            # also by who starts just now
            settle(provider, "release", leases[0])
            later = new_provider(rabbitmq_server.environment, PLACED)
            assert seqs(reserve(later)) == seqs(leases[:1])
        finally:
            rabbitmq_server.control("set_vm_memory_high_watermark", "0.4")
        wait_until(provider.health_check, 10, "health to be good again")
        assert provider.publish(make_deliveries(1, first=20)) == []
        # what was on its way when the alarm began may have arrived
        assert seqs(reserve_within(provider, interrupt, 2)) == [10, 20]


class TestSilence:
    def test_is_kept_alive_by_heartbeats(
        self,
        rabbitmq_server: RabbitMQServer,
        new_provider: NewProvider,
        channel: Any,
        interrupt: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(driver, "HEARTBEAT_SECONDS", 1)
        provider = new_provider(rabbitmq_server.environment, PLACED)
        provider.publish(make_deliveries(2))
        kept, _ = reserve(provider)
        for hungry in (True, False):
            with elapsed(at_least=3, at_most=4):
                provider.wait(3, interrupt, hungry)
        # both connections are as they were
        assert provider.extend([kept]) == []
        assert provider.publish(make_deliveries(1, first=3)) == []
        settle(provider, "acknowledge", kept)

    def test_of_a_frozen_server_is_noticed(
        self,
        new_provider: NewProvider,
        rabbitmq_server: RabbitMQServer,
        channel: Any,
        interrupt: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(driver, "HEARTBEAT_SECONDS", 1)
        monkeypatch.setattr(driver, "ANSWER_SECONDS", 1.0)
        monkeypatch.setattr(driver, "CONNECT_SECONDS", 1.0)
        provider = new_provider(rabbitmq_server.environment, PLACED)
        reserve(provider)
        assert rabbitmq_server.process is not None
        try:
            freeze(rabbitmq_server.process.pid)
            # who waits is not kept longer than two heartbeats
            with elapsed(at_most=8):
                provider.wait(30, interrupt)
                with pytest.raises(ProviderUnavailableError):
                    reserve(provider)
            with elapsed(at_most=8), pytest.raises(ProviderUnavailableError):
                provider.publish(make_deliveries(1))
        finally:
            os.kill(rabbitmq_server.process.pid, signal.SIGCONT)
        wait_until(provider.health_check, 10, "it to answer again")


class TestConsumerTimeout:
    def test_takes_leases_back(
        self, new_provider: NewProvider, interrupt: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a RabbitMQ that lets a consumer keep a message for a second."""
        server = RabbitMQServer("consumer_timeout = 1000")
        try:
            server.start()
            environment = {**server.environment, "RABBITMQ_CONSUMER_TIMEOUT_SECONDS": "1"}
            provider = new_provider(environment, PLACED)
            assert provider.longest_lease == pytest.approx(0.8)
            provider.publish(make_deliveries(1))
            leases = reserve(provider)
            # then the lease is said to be lost, and the delivery comes again
            wait_until(lambda: provider.extend(leases) == leases, 10, "the lease to be lost")
            [again] = reserve_within(provider, interrupt)
            assert (again.delivery.seq, again.redelivered) == (1, True)
            settle(provider, "acknowledge", again)
            provider.close()
        finally:
            server.close()


@pytest.fixture(scope="module")
def spoken() -> Iterator[tuple[RabbitMQServer, str]]:
    """A server that speaks TLS, and where."""
    port = free_port()
    files = [f"ssl_options.{kind}file = {PEM}" for kind in ("cacert", "cert", "key")]
    server = RabbitMQServer(f"listeners.ssl.local = {HOST}:{port}", *files)
    server.start()
    uri = load_settings(server.environment).rabbitmq_uri
    uri = uri.replace("amqp://", "amqps://").replace(f":{server.port}/", f":{port}/")
    yield server, uri.replace(f"@{HOST}", "@localhost")
    server.close()


class TestTLS:
    def test_carries_what_is_longer_than_a_record_and_wakes(
        self, spoken: tuple[RabbitMQServer, str], new_provider: NewProvider, interrupt: int
    ) -> None:
        trusting = {"AMQP_URI": f"{spoken[1]}?ssl_ca_certs={PEM}"}
        provider = new_provider(trusting, PLACED)
        assert reserve(provider) == []
        body = json.dumps(["x" * 1000] * 300)
        new_provider(trusting).publish(make_deliveries(5, body=body))
        with elapsed(at_most=PROMPTLY):
            provider.wait(30, interrupt)
        leases = reserve_within(provider, interrupt, 5)
        assert [lease.delivery.message.body for lease in leases] == [body] * 5
        settle(provider, "acknowledge", *leases)

    def test_has_the_same_deadlines(
        self,
        spoken: tuple[RabbitMQServer, str],
        new_provider: NewProvider,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(driver, "ANSWER_SECONDS", 1.0)
        monkeypatch.setattr(driver, "CONNECT_SECONDS", 1.0)
        server, uri = spoken
        provider = new_provider({"AMQP_URI": f"{uri}?ssl_ca_certs={PEM}"}, PLACED)
        assert server.process is not None
        try:
            freeze(server.process.pid)
            with elapsed(at_most=8), pytest.raises(ProviderUnavailableError):
                provider.publish(make_deliveries(1))
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        wait_until(provider.health_check, 10, "it to answer again")

    # eventlet leaves a socket open whose handshake fails
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_is_not_spoken_with_strangers(
        self, spoken: tuple[RabbitMQServer, str], new_provider: NewProvider
    ) -> None:
        with pytest.raises(ProviderError, match="certificate"):
            new_provider({"AMQP_URI": spoken[1]})
        gc.collect()


class TestErrors:
    def test_say_who_is_refused_and_not_the_password(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider
    ) -> None:
        environment = {**rabbitmq_server.environment, "RABBITMQ_PASSWORD": "s3cret-of-others"}
        with pytest.raises(ProviderError) as raised:
            new_provider(environment)
        where = f"{HOST}:{rabbitmq_server.port}"
        assert str(raised.value) == f"RabbitMQ at {where}: user or password refused"
        assert not isinstance(raised.value, ProviderUnavailableError)

    def test_say_which_virtual_host_is_not_there(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider
    ) -> None:
        with pytest.raises(ProviderError, match=r"virtual host is refused: .*nowhere"):
            new_provider({**rabbitmq_server.environment, "RABBITMQ_VHOST": "nowhere"})

    def test_say_what_does_not_answer(self, new_provider: NewProvider) -> None:
        port = free_port()
        with pytest.raises(ProviderUnavailableError, match=f"{HOST}:{port}: .*refused"):
            new_provider({"RABBITMQ_PORT": str(port)})

    def test_leave_the_next_of_several_servers(
        self, rabbitmq_server: RabbitMQServer, new_provider: NewProvider, channel: Any
    ) -> None:
        settings = load_settings(rabbitmq_server.environment)
        uri = f"amqp://{HOST}:{free_port()};{settings.rabbitmq_uri}"
        provider = new_provider({"AMQP_URI": uri}, PLACED)
        assert provider.health_check() is True

    def test_leave_no_lease_of_a_channel_that_was_closed(
        self, provider: RabbitMQProvider, other: RabbitMQProvider, interrupt: int
    ) -> None:
        provider.publish(make_deliveries(2))
        leases = reserve(provider)
        inlet: Any = provider._inlet
        # RabbitMQ ends a channel that settles what it does not have
        inlet._channel.settle(99, SettleAction.ACKNOWLEDGE)
        inlet.connection.flush()
        wait_until(lambda: provider.extend(leases) == leases, 5, "the leases to be lost")
        ended = [Settlement(lease, SettleAction.RETRY) for lease in leases]
        assert provider.settle(ended) == ended
        again = reserve_within(other, interrupt, 2)
        assert [(lease.delivery.seq, lease.redelivered) for lease in again] == [
            (1, True),
            (2, True),
        ]


def test_what_is_delayed_is_counted_whatever_it_waits_in(
    provider: RabbitMQProvider, other: RabbitMQProvider
) -> None:
    assert other.count_delayed() == 0
    provider.publish([replace(each, delay=60 + each.seq) for each in make_deliveries(5)])
    assert other.count_delayed() == 5


@pytest.mark.parametrize("missing", [0, 3])
def test_what_is_delayed_is_counted_and_dropped_beside_a_queue_that_is_gone(
    provider: RabbitMQProvider, other: RabbitMQProvider, channel: Any, missing: int
) -> None:
    provider.publish([replace(each, delay=60) for each in make_deliveries(5)])
    channel.queue_delete(f"nameko.delay.{missing}")
    assert other.count_delayed() == 5
    assert other.drop_scheduled([PLACED], lambda asked: {*asked} - {1}) == 4
    assert other.count_delayed() == 1
