"""What is peculiar to Redis; what it promises with the other providers is tested beside this."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ProviderBlockedError, ProviderError, ProviderUnavailableError
from shared.native import Signal
from shared.providers.redis import RedisProvider, connected, listener, servers
from shared.providers.redis.provider import SETTLED_MOST, SETTLED_MS
from shared.providers.redis.rpc import RedisRpc
from shared.providers.rpc import RpcMessage
from shared.settings import load_settings
from shared.testing.conformance.lab import LEASE_SECONDS, QUEUE, SOURCE, Worker, elapsed, seqs
from shared.testing.servers import HOST, RedisCluster, RedisSentinel, RedisServer, free_port
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
from tests.conformance.labs import OnRedis
from tests.support.waiting import wait_until

BY_REDIS = {"QUEUE_PROVIDER": "shared.providers.redis:RedisProvider"}

PLACED = Subscription(QUEUE, SOURCE, "placed", "audit.note", id=1)
PAID = Subscription("payments", "bank", "paid", "audit.note", id=2)

SETTINGS_DOC = Path(__file__).parents[2] / "docs/settings.md"

PEM = str(Path(__file__).parents[1] / "services/localhost.pem")

NewProvider = Callable[..., RedisProvider]


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Any]:
    with redis_server.client(1) as client:
        yield client
    redis_server.empty()


@pytest.fixture
def new_provider() -> Iterator[NewProvider]:
    made: list[RedisProvider] = []

    def make(environment: Mapping[str, str], *declared: Subscription) -> RedisProvider:
        provider = RedisProvider(load_settings({**BY_REDIS, **environment}))
        made.append(provider)
        provider.initialize()
        provider.declare(declared)
        return provider

    yield make
    for provider in made:
        provider.close()


@pytest.fixture
def provider(redis_server: RedisServer, new_provider: NewProvider, client: Any) -> RedisProvider:
    return new_provider(redis_server.environment, PLACED)


@pytest.fixture
def worker(request: pytest.FixtureRequest, client: Any) -> Iterator[Worker]:
    worker = Worker(OnRedis.from_fixtures(request))
    worker.open()
    worker.subscribe("placed")
    yield worker
    worker.close()


def make_deliveries(
    count: int, *, first: int = 1, to: Subscription = PLACED, body: str = "{}"
) -> list[Delivery]:
    return [
        Delivery(seq, to.id, Envelope(new_message_id(), to.queue, to.event_type, body))
        for seq in range(first, first + count)
    ]


def acknowledge_all(provider: RedisProvider, *ids: int) -> list[int]:
    done: list[int] = []
    while leases := provider.reserve(dict.fromkeys(ids, 1000), 1000):
        assert provider.settle([acknowledged(lease) for lease in leases]) == []
        done += seqs(leases)
    return done


def acknowledged(lease: Lease) -> Settlement:
    return Settlement(lease, SettleAction.ACKNOWLEDGE)


def ended(lease: Lease, action: str, delay: float = 0.0) -> Settlement:
    return Settlement(lease, SettleAction(action), delay)


class TestKeys:
    def test_are_as_before_once_everything_is_completed(
        self, provider: RedisProvider, client: Any
    ) -> None:
        for first in range(1, 10_001, 500):
            provider.publish(make_deliveries(500, first=first))
        assert len(acknowledge_all(provider, PLACED.id)) == 10_000
        # what was settled in the last minute is remembered, up to a limit, and forgets itself
        settled = f"nameko:{{{QUEUE}}}:settled"
        assert set(client.keys()) == {settled}
        assert 0 < client.pttl(settled) <= SETTLED_MS
        assert client.zcard(settled) <= SETTLED_MOST

    def test_have_the_prefix_and_the_queue_as_hash_tag(
        self, redis_server: RedisServer, new_provider: NewProvider, client: Any
    ) -> None:
        environment = {**redis_server.environment, "REDIS_PREFIX": "shop:eu"}
        provider = new_provider(environment, PLACED)
        provider.publish(make_deliveries(6))
        one, two, three, _ = provider.reserve({PLACED.id: 4}, 4)
        provider.settle([acknowledged(one), ended(two, "retry", 60), ended(three, "dead_letter")])
        provider.pause(PLACED)
        names = set(client.keys())
        start = f"shop:eu:{{{QUEUE}}}:"
        assert {x for x in names if not x.startswith(start)} == set()
        assert len(names) == 8

    def test_are_gone_with_a_forgotten_subscription(
        self, provider: RedisProvider, client: Any
    ) -> None:
        provider.publish(make_deliveries(3000))
        one, two, _ = provider.reserve({PLACED.id: 3}, 3)
        provider.settle([ended(one, "retry", 60), ended(two, "dead_letter")])
        provider.pause(PLACED)
        provider.forget(PLACED)
        assert client.keys() == []


class TestRoundTrips:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        asked: list[int] = []
        ask = servers.Single.ask

        def count(server: Any, commands: Any) -> list[Any]:
            asked.append(len(commands))
            return ask(server, commands)

        monkeypatch.setattr(servers.Single, "ask", count)
        return asked

    def test_are_three_for_a_hundred_deliveries(
        self, provider: RedisProvider, asked: list[int]
    ) -> None:
        provider.publish(make_deliveries(100))
        leases = provider.reserve({PLACED.id: 100}, 100)
        provider.extend(leases)
        provider.settle([acknowledged(lease) for lease in leases])
        assert asked == [1, 1, 1, 1]

    def test_are_as_many_for_several_queues(
        self, provider: RedisProvider, asked: list[int]
    ) -> None:
        provider.declare([PAID])
        provider.publish([*make_deliveries(5), *make_deliveries(5, first=6, to=PAID)])
        leases = provider.reserve({PLACED.id: 10, PAID.id: 10}, 10)
        assert provider.settle([acknowledged(lease) for lease in leases]) == []
        assert asked == [2, 2, 2]


class TestQueues:
    def test_share_fairly(self, provider: RedisProvider) -> None:
        provider.declare([PAID])
        provider.publish([*make_deliveries(20), *make_deliveries(20, first=21, to=PAID)])
        limits = {PLACED.id: 10, PAID.id: 10}
        queues = [lease.delivery.message.queue for lease in provider.reserve(limits, 10)]
        assert queues.count(QUEUE) == queues.count("payments") == 5
        singles = [provider.reserve(limits, 1)[0].delivery.message.queue for _ in range(6)]
        assert singles.count(QUEUE) == singles.count("payments") == 3

    def test_give_the_room_to_who_can_use_it(self, provider: RedisProvider) -> None:
        provider.declare([PAID])
        provider.publish([*make_deliveries(1), *make_deliveries(20, first=2, to=PAID)])
        assert len(provider.reserve({PLACED.id: 10, PAID.id: 10}, 10)) == 10


class TestEnvelopes:
    def test_arrive_as_they_were(self, provider: RedisProvider) -> None:
        sent = Envelope(
            new_message_id(),
            QUEUE,
            "placed",
            '{"n": 1.0, "text": "é\\n\\u2028", "id": 12345678901234567890}',
            priority=Priority.HIGH,
            max_retries=7,
            scheduled_at=datetime(2026, 1, 2, 3, 4, 5, 678000),
            created_at=datetime(2026, 1, 1),
            metadata={"nameko": {"call_id": "ü"}, "version": 1},
        )
        provider.publish([Delivery(2**45, PLACED.id, sent)])
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        assert lease.delivery == Delivery(2**45, PLACED.id, sent)
        assert lease.token == 1


class TestPublishingAgain:
    def test_brings_a_dead_letter_back_with_a_larger_token(self, provider: RedisProvider) -> None:
        sent = make_deliveries(1)
        provider.publish(sent)
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        provider.settle([ended(lease, "dead_letter")])
        provider.publish(sent)
        [again] = provider.reserve({PLACED.id: 1}, 1)
        assert again.token > lease.token
        assert again.delivery.attempts == 0
        [stats] = provider.get_queue_stats([PLACED])
        assert stats.dead == 0

    def test_goes_on_from_the_token_of_the_log(self, provider: RedisProvider, client: Any) -> None:
        """Given a delivery that the log knows to have been leased, and Redis does not."""
        [sent] = make_deliveries(1)
        provider.publish([replace(sent, token=5)])
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        assert lease.token == 6
        assert lease.token > 1

    def test_by_who_knows_of_its_leases_is_not_taken_for_a_double(
        self, provider: RedisProvider
    ) -> None:
        [sent] = make_deliveries(1)
        provider.publish([sent])
        acknowledge_all(provider, PLACED.id)
        provider.publish([sent])
        assert provider.reserve({PLACED.id: 1}, 1) == []
        provider.publish([replace(sent, token=1)])
        assert seqs(provider.reserve({PLACED.id: 1}, 1)) == [sent.seq]

    def test_by_a_log_that_has_moved_on_takes_the_place(self, provider: RedisProvider) -> None:
        """Given a worker that drops its copy only then, since the log has told it to."""
        [sent] = make_deliveries(1)
        provider.publish([sent])
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        provider.publish([replace(sent, token=lease.token + 1)])

        assert [each.lease for each in provider.settle([acknowledged(lease)])] == [lease]
        [again] = provider.reserve({PLACED.id: 9}, 9)
        assert (again.delivery.seq, again.token) == (sent.seq, lease.token + 2)

    def test_by_a_log_that_has_moved_on_has_the_time_of_the_log(
        self, provider: RedisProvider
    ) -> None:
        [sent] = make_deliveries(1)
        provider.publish([replace(sent, delay=3600.0)])
        provider.publish([replace(sent, token=1)])
        assert seqs(provider.reserve({PLACED.id: 9}, 9)) == [sent.seq]
        [stats] = provider.get_queue_stats([PLACED])
        assert stats.scheduled == 0

    def test_of_another_log_takes_the_place(self, provider: RedisProvider) -> None:
        """Given what is left of a log that was thrown away, whose numbers begin anew."""
        provider.publish(make_deliveries(3))
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        new = make_deliveries(3)
        provider.publish(new)
        leases = provider.reserve({PLACED.id: 9}, 9)
        assert [x.delivery.message.id for x in leases] == [x.message.id for x in new]
        assert provider.settle([acknowledged(lease)]) != []

    def test_tells_what_is_held(self, provider: RedisProvider) -> None:
        provider.publish(make_deliveries(5))
        one, two, three = provider.reserve({PLACED.id: 3}, 3)
        provider.settle([acknowledged(one), ended(two, "retry", 60), ended(three, "dead_letter")])
        assert provider.holds(PLACED, [*range(1, 10)]) == {2, 3, 4, 5}


class TestDamage:
    """What somebody removed by hand, or a failover lost in part: no worker falls over it."""

    @pytest.mark.parametrize("envelope", [None, "", "no JSON", "[]\n1", '{"id": "1"}\n{}'])
    def test_an_envelope_that_cannot_be_read_holds_up_no_other(
        self, provider: RedisProvider, client: Any, envelope: str | None
    ) -> None:
        sent = make_deliveries(3)
        provider.publish(sent)
        [key] = client.keys("*:messages")
        client.hdel(key, 2)
        if envelope is not None:
            client.hset(key, 2, envelope)
        assert seqs(provider.peek(PLACED, 9)) == [1, 3]
        leases = provider.reserve({PLACED.id: 9}, 2) + provider.reserve({PLACED.id: 9}, 9)
        assert seqs(leases) == [1, 3]
        # told, not logged: providers run in native threads, where the log's lock is nobody's
        [notice] = provider.notices
        assert notice.startswith("redis has no readable envelope of delivery 2 of orders")
        # and it can be published again
        assert provider.holds(PLACED, [1, 2, 3]) == {1, 3}
        provider.publish(sent)
        assert seqs(provider.reserve({PLACED.id: 9}, 9)) == [2]

    @pytest.mark.parametrize("place", ["waiting", "scheduled", "leases", "dead"])
    def test_what_is_in_no_place_is_not_held_and_can_be_published_again(
        self, provider: RedisProvider, client: Any, place: str
    ) -> None:
        """Given one delivery in each place, of which one set is deleted."""
        sent = make_deliveries(4)
        provider.publish(sent)
        _, two, three = provider.reserve({PLACED.id: 3}, 3)
        provider.settle([ended(two, "retry", 60), ended(three, "dead_letter")])
        its = {"leases": 1, "scheduled": 2, "dead": 3, "waiting": 4}[place]
        [key] = client.keys(f"*:{place}")
        client.delete(key)

        assert provider.holds(PLACED, [1, 2, 3, 4]) == {1, 2, 3, 4} - {its}
        provider.publish([sent[its - 1]])
        assert provider.holds(PLACED, [1, 2, 3, 4]) == {1, 2, 3, 4}
        assert its in seqs(provider.reserve({PLACED.id: 9}, 9))

    def test_a_lease_in_no_place_is_lost_once_it_is_published_again(
        self, provider: RedisProvider, client: Any
    ) -> None:
        [sent] = make_deliveries(1)
        provider.publish([sent])
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        [key] = client.keys("*:leases")
        client.delete(key)
        provider.publish([sent])
        assert provider.extend([lease]) == [lease]
        [again] = provider.reserve({PLACED.id: 9}, 9)
        assert again.token > lease.token
        assert provider.settle([acknowledged(again)]) == []

    def test_of_another_subscription_is_not_held(self, provider: RedisProvider) -> None:
        [sent] = make_deliveries(1)
        provider.publish([sent])
        assert provider.holds(replace(PLACED, id=PLACED.id + 1), [sent.seq]) == set()


class TestTrouble:
    def test_script_flush_in_mid_stream(self, provider: RedisProvider, client: Any) -> None:
        for first in range(1, 51, 10):
            client.script_flush()
            provider.publish(make_deliveries(10, first=first))
            client.script_flush()
            leases = provider.reserve({PLACED.id: 100}, 100)
            client.script_flush()
            assert provider.extend(leases) == []
            client.script_flush()
            assert provider.settle([acknowledged(lease) for lease in leases]) == []
            assert len(leases) == 10

    def test_everything_deleted(self, provider: RedisProvider, client: Any) -> None:
        provider.publish(make_deliveries(2))
        [lease] = provider.reserve({PLACED.id: 1}, 1)
        client.flushall()
        assert provider.settle([acknowledged(lease)]) != []
        assert provider.reserve({PLACED.id: 1}, 1) == []
        provider.publish(make_deliveries(2))
        assert len(acknowledge_all(provider, PLACED.id)) == 2
        [stats] = provider.get_queue_stats([PLACED])
        assert stats.subscriber == PLACED.subscriber

    def test_restart_in_mid_stream(self, worker: Worker, redis_server: RedisServer) -> None:
        """Given deliveries in every state, when Redis is killed and started again."""
        worker.dispatch("placed", 100)
        worker.dispatch("placed", 10, delay=0.2)
        leases = worker.reserve(40)
        worker.acknowledge(*leases[:10])
        worker.retry(*leases[10:20], delay=0.2)
        redis_server.kill()
        redis_server.start()
        # then who holds leases still does, and all else comes once
        worker.provider.initialize()
        assert worker.acknowledge(*leases[20:]) == []
        rest = worker.reserve_within(LEASE_SECONDS + worker.lab.promptly, 80)
        assert worker.acknowledge(*rest) == []
        assert len(set(seqs(rest))) == 80
        assert worker.finished() == 110

    def test_a_connection_that_was_closed_as_idle_is_made_anew(
        self, provider: RedisProvider, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connected, "IDLE_SECONDS", 0.0)
        for number in (1, 2):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            wait_until(provider._server.is_closed, 5, "Redis to close it")  # type: ignore[union-attr]
            provider.publish(make_deliveries(1, first=number))
        assert acknowledge_all(provider, PLACED.id) == [1, 2]

    def test_who_loses_the_listener_too_has_to_connect_anew(
        self, provider: RedisProvider, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given what a restart does: Redis may have lost what was declared."""
        monkeypatch.setattr(connected, "IDLE_SECONDS", 0.0)
        for kind in ("normal", "pubsub"):
            client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        wait_until(provider._server.is_closed, 5, "Redis to close it")  # type: ignore[union-attr]
        wait_until(provider._listener.is_closed, 5, "Redis to close it")  # type: ignore[union-attr]
        with pytest.raises(ProviderUnavailableError):
            provider.publish(make_deliveries(1))
        provider.initialize()
        provider.publish(make_deliveries(1))
        assert acknowledge_all(provider, PLACED.id) == [1]

    def test_listener_killed(self, worker: Worker, client: Any) -> None:
        assert worker.reserve() == []
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        sent = worker.dispatch("placed")
        assert seqs(worker.reserve_within(worker.lab.promptly)) == seqs(sent)
        assert worker.reserve() == []
        assert client.execute_command("CLIENT", "LIST", "TYPE", "pubsub")

    def test_listener_that_fell_silent(
        self, worker: Worker, client: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "PING_SECONDS", 0.05)
        assert worker.reserve() == []
        client.execute_command("CLIENT", "PAUSE", "300", "ALL")
        worker.wait(5)  # ends when two pings had no answer
        sent = worker.dispatch("placed")
        assert seqs(worker.reserve_within(worker.lab.promptly)) == seqs(sent)

    def test_listener_is_asked_whether_it_lives(
        self, worker: Worker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "PING_SECONDS", 0.05)
        assert worker.reserve() == []
        before = worker.provider._listener  # type: ignore[attr-defined]
        worker.wait(0.3)
        assert worker.provider._listener is before  # type: ignore[attr-defined]

    def test_wrong_password(self, redis_server: RedisServer, new_provider: NewProvider) -> None:
        environment = {**redis_server.environment, "REDIS_PASSWORD": "s3cret"}
        with pytest.raises(ProviderError, match="user or password refused") as raised:
            new_provider(environment)
        assert "s3cret" not in str(raised.value)
        assert f"{HOST}:{redis_server.port}" in str(raised.value)

    def test_the_documented_rights_of_a_user_are_enough(
        self, redis_server: RedisServer, new_provider: NewProvider, client: Any
    ) -> None:
        [line] = [x for x in SETTINGS_DOC.read_text().splitlines() if x.startswith("ACL SETUSER")]
        name, password = line.split()[2], line.split(">")[1].split()[0]
        client.acl_log_reset()
        client.execute_command(*line.split())
        url = f"redis://{name}:{password}@{HOST}:{redis_server.port}/1"
        try:
            provider = new_provider({"REDIS_URL": url}, PLACED)
            provider.publish(make_deliveries(3))
            one, two, three = provider.reserve({PLACED.id: 3}, 3)
            assert provider.extend([one, two, three]) == []
            ends = [ended(one, "dead_letter"), ended(two, "retry", 9), ended(three, "release")]
            assert provider.settle(ends) == []
            provider.pause(PLACED)
            assert provider.is_paused(PLACED)
            provider.resume(PLACED)
            assert provider.holds(PLACED, [2, 3]) == {2, 3}
            [stats] = provider.get_queue_stats([PLACED])
            assert (stats.waiting, stats.scheduled, provider.health_check()) == (1, 1, True)
            with contextlib.closing(RedisRpc(load_settings({"REDIS_URL": url}))) as rpc:
                rpc.initialize()
                rpc.declare("callee", lasting=True)
                message = RpcMessage("callee", "{}", 5.0)
                assert rpc.send([message]) == []
                assert [each.body for each in rpc.take({"callee": 1})] == ["{}"]
            provider.forget(PLACED)
            assert client.acl_log() == []
        finally:
            client.acl_deluser(name)

    def test_nobody_there(self, new_provider: NewProvider) -> None:
        with pytest.raises(ProviderUnavailableError, match=r"(?i)refused"):
            new_provider({"REDIS_PORT": str(free_port())})

    def test_missing_driver(
        self, new_provider: NewProvider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        servers.driver.cache_clear()
        monkeypatch.setitem(sys.modules, "redis", None)
        with pytest.raises(ProviderError, match="pip install 'redis"):
            new_provider({})
        servers.driver.cache_clear()

    def test_read_only_replica(self, redis_server: RedisServer, new_provider: NewProvider) -> None:
        with (
            started("--replicaof", HOST, str(redis_server.port), auth=redis_server) as replica,
            pytest.raises(ProviderError, match="read-only replica"),
        ):
            new_provider(replica.environment, PLACED)

    def test_primary_that_became_a_replica(self, new_provider: NewProvider) -> None:
        """Given a provider, when its Redis takes no more writes, then it is not healthy."""
        with started() as server, server.client() as client:
            provider = new_provider(server.environment, PLACED)
            assert provider.health_check()
            client.execute_command("REPLICAOF", HOST, "1")
            assert not provider.health_check()
            with pytest.raises(ProviderError, match="read-only replica"):
                provider.reserve({PLACED.id: 1}, 1)
            with pytest.raises(ProviderError, match="read-only replica"):
                provider.initialize()
            client.execute_command("REPLICAOF", "NO", "ONE")
            provider.initialize()
            assert provider.health_check()
            assert client.keys() == []

    def test_out_of_memory(self, new_provider: NewProvider) -> None:
        """Given a Redis without room, when it is full, then it says so, and can be emptied."""
        with started("--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as server:
            provider = new_provider(server.environment, PLACED)
            sent = fill(provider)
            assert 0 < sent < 1000
            # so far there may be room for what is small
            with server.client() as client:
                client.config_set("maxmemory", "1mb")
                assert not provider.health_check()
                client.config_set("maxmemory", "8mb")
            leases = provider.reserve({PLACED.id: 10}, 10)
            assert provider.extend(leases) == []
            provider.settle([ended(lease, "release") for lease in leases])
            assert len(acknowledge_all(provider, PLACED.id)) == sent
            provider.publish(make_deliveries(10, first=sent + 1, body="x" * 20_000))

    def test_throwing_keys_away(
        self, redis_server: RedisServer, new_provider: NewProvider, client: Any
    ) -> None:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            # without a limit it throws nothing away
            provider = new_provider(redis_server.environment)
            client.config_set("maxmemory", "1gb")
            refused = pytest.raises(ProviderError, match="allkeys-lru, and has to be noeviction")
            with refused:
                provider.initialize()
            with refused:
                provider.publish(make_deliveries(1))
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")

    def test_node_of_a_cluster(
        self, redis_cluster: RedisCluster, new_provider: NewProvider
    ) -> None:
        # by itself it has a third of all slots: some of these are elsewhere
        queues = [replace(PLACED, id=n, queue=f"queue-{n}") for n in range(1, 20)]
        address = {"REDIS_PORT": str(redis_cluster.nodes[0].port), "REDIS_DB": "0"}
        provider = new_provider(address, *queues)
        with pytest.raises(ProviderError, match=r"use redis\+cluster://"):
            provider.reserve({each.id: 1 for each in queues}, 1)
        redis_cluster.empty()


class TestCluster:
    @pytest.fixture
    def provider(
        self, redis_cluster: RedisCluster, new_provider: NewProvider
    ) -> Iterator[RedisProvider]:
        yield new_provider(redis_cluster.environment)
        redis_cluster.empty()

    def test_has_queues_on_several_nodes(
        self, redis_cluster: RedisCluster, provider: RedisProvider
    ) -> None:
        queues = [replace(PLACED, id=n, queue=f"queue-{n}") for n in range(1, 20)]
        provider.declare(queues)
        sent = [d for each in queues for d in make_deliveries(3, first=each.id * 10, to=each)]
        provider.publish(sent)
        assert all(node.client().dbsize() > 10 for node in redis_cluster.nodes)
        assert sorted(acknowledge_all(provider, *range(1, 20))) == seqs(sent)

    def test_is_followed_when_a_slot_moves(
        self, redis_cluster: RedisCluster, provider: RedisProvider
    ) -> None:
        clients = [node.client() for node in redis_cluster.nodes]
        ids = [client.execute_command("CLUSTER MYID") for client in clients]
        slot = clients[0].execute_command("CLUSTER KEYSLOT", f"{{{QUEUE}}}")
        owner = redis_cluster.SLOTS_OF.index(next(x for x in redis_cluster.SLOTS_OF if slot in x))
        other = (owner + 1) % 3
        for node in (other, owner):
            clients[node].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[other])
        try:
            provider.declare([PLACED])
            provider.publish(make_deliveries(3))
            assert len(acknowledge_all(provider, PLACED.id)) == 3
        finally:
            redis_cluster.empty()
            for node in (owner, other):
                clients[node].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[owner])


class TestTLS:
    @pytest.fixture
    def url(self) -> Iterator[str]:
        port = free_port()
        files = [x for kind in ("cert", "key", "ca-cert") for x in (f"--tls-{kind}-file", PEM)]
        with started("--tls-port", str(port), *files, "--tls-auth-clients", "no"):
            yield f"rediss://localhost:{port}/1"

    def test_is_spoken_and_wakes(self, url: str, new_provider: NewProvider) -> None:
        trusting = {"REDIS_URL": f"{url}?ssl_ca_certs={PEM}"}
        provider = new_provider(trusting, PLACED)
        assert provider.reserve({PLACED.id: 1}, 1) == []
        with contextlib.closing(Signal()) as interrupt:
            new_provider(trusting).publish(make_deliveries(1))
            with elapsed(at_most=5):
                provider.wait(30, interrupt.fileno())
        assert acknowledge_all(provider, PLACED.id) == [1]

    # eventlet leaves a socket open whose handshake fails
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_is_not_spoken_with_strangers(self, url: str, new_provider: NewProvider) -> None:
        with pytest.raises(ProviderUnavailableError, match="certificate verify failed"):
            new_provider({"REDIS_URL": url})
        gc.collect()


class TestSentinel:
    def test_names_the_primary_also_after_it_changed(self, new_provider: NewProvider) -> None:
        with contextlib.closing(RedisSentinel()) as sentinel:
            sentinel.start()
            provider = new_provider(sentinel.environment, PLACED)
            provider.publish(make_deliveries(5))
            sentinel.fail_over()
            done: list[int] = []

            def consumes() -> bool:
                with contextlib.suppress(ProviderError):
                    done.extend(acknowledge_all(provider, PLACED.id))
                return len(done) == 5

            wait_until(consumes, 30, lambda: f"five deliveries, not {done}")
            provider.publish(make_deliveries(1, first=6))
            assert acknowledge_all(provider, PLACED.id) == [6]


def fill(provider: RedisProvider) -> int:
    """Publish until Redis has no more room; return how many it took."""
    sent = 0
    with pytest.raises(ProviderBlockedError, match="out of memory"):  # noqa: PT012 - which one, is open
        for sent in range(0, 1000, 10):
            provider.publish(make_deliveries(10, first=sent + 1, body="x" * 20_000))
    return sent


@contextlib.contextmanager
def started(*options: str, auth: RedisServer | None = None) -> Iterator[RedisServer]:
    password = ["--masterauth", auth.password] if auth else []
    server = RedisServer(*options, *password, is_durable=False)
    with contextlib.closing(server):
        server.start()
        if auth:
            wait_until(
                lambda: server.client().info("replication")["master_link_status"] == "up",
                30,
                lambda: "the replica to follow",
            )
        yield server
