"""Two providers at once: whose copy runs, and what the log says is still at the old one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

from shared.errors import ProviderUnavailableError
from shared.events.audit import Both, Counting, Joined, Listing
from shared.events.carrier import prepare
from shared.events.commands import Prepare
from shared.events.draining import Drain
from shared.providers import Capabilities, SubscriptionStats, make_provider
from shared.settings import load_settings
from shared.store import attempts, backlog, moving, subscriptions
from shared.store.audit import Entry
from shared.store.moving import Route
from shared.tables import subscriptions as subscriptions_table
from shared.types import Delivery, Lease, Outcome, SettleAction, Subscription
from tests.support.waiting import wait_until
from tests.unit.message_log import PENDING, PROCESSING, RETRY, Log, event
from tests.unit.test_backlog import OPEN, append, copy, expire, recover, start, take

FORTH = Route("redis", "rabbitmq")
BACK = Route("rabbitmq", "redis")
FROM_LOG = Route("embedded", "redis", from_log=True)
TO_LOG = Route("redis", "embedded", to_log=True)


@pytest.fixture
def delivery(store: Log) -> Delivery:
    """One delivery that a provider has."""
    store.subscribe()
    [made] = append(store, event())
    store.do(backlog.published, [made])
    return made


def later(store: Log, seconds: float = 60) -> Delivery:
    """One that a provider has for its time."""
    [made] = append(store, event(delay=seconds))
    store.do(backlog.published, [made])
    return made


def known(store: Log) -> int:
    """Return the id of the one subscription."""
    return int(store.rows(subscriptions_table)[0].id)


def page(store: Log, route: Route, *, timed_alone: bool = False) -> list[int]:
    return store.do(moving.page, known(store), route, 0, timed_alone=timed_alone)


def by_redis(delivery: Delivery, token: int = 1) -> Lease:
    return Lease(delivery, token)


def end(store: Log, lease: Lease, status: Any, delay: float = 0.0) -> None:
    outcome = Outcome(lease, status, delay=delay)
    stored, _, _ = store.do(attempts.finish, [outcome], "host:1", 30.0)
    assert stored == [outcome]


class TestCopies:
    @pytest.mark.parametrize(
        "second", [copy, lambda d: copy(d, redelivered=True), lambda d: by_redis(d, 5)]
    )
    def test_of_what_another_worker_has_in_hand_are_dropped(
        self, store: Log, delivery: Delivery, second: Callable[[Delivery], Lease]
    ) -> None:
        [first] = start(store, by_redis(delivery), is_moving=True).run
        found = start(store, second(delivery), worker="host:2", is_moving=True)
        assert [x.action for x in found.settled] == [SettleAction.ACKNOWLEDGE]
        assert not found.run
        end(store, first, PENDING)

    def test_run_once_its_worker_is_gone(self, store: Log, delivery: Delivery) -> None:
        start(store, by_redis(delivery), is_moving=True)
        expire(store, delivery.seq)
        [lease] = start(store, copy(delivery), worker="host:2", is_moving=True).run
        assert lease.token > 1

    def test_are_dropped_where_another_provider_keeps_the_lease(
        self, store: Log, delivery: Delivery
    ) -> None:
        """Given a process that was not restarted yet: its lease is in Redis alone."""
        store.do(lambda tx: attempts.begin(tx, [by_redis(delivery)], "host:1", 0.0))
        assert store.delivery(delivery.seq).status == PROCESSING
        found = start(store, copy(delivery, redelivered=True), worker="host:2", is_moving=True)
        assert not found.run
        # it is handed out again by who kept the lease: the worker is gone
        assert start(store, by_redis(delivery, 3), worker="host:2", is_moving=True).run

    def test_that_the_log_has_moved_on_from_are_published_again(
        self, store: Log, delivery: Delivery
    ) -> None:
        store.do(moving.make_ready, [delivery.seq])
        store.do(moving.make_ready, [delivery.seq])  # which is ready already
        [again] = take(store)
        store.do(backlog.published, [again])
        store.do(moving.make_ready, [delivery.seq])
        assert store.delivery(delivery.seq).lease_token == 2
        found = start(store, by_redis(delivery, 1), is_moving=True)
        assert [each.seq for each in found.again] == [delivery.seq]
        assert not found.run
        assert start(store, by_redis(delivery, 2), is_moving=True).run

    def test_of_what_is_to_be_published_again_are_begun_in_the_log(
        self, store: Log, delivery: Delivery
    ) -> None:
        assert store.do(attempts.fit, [by_redis(delivery)], ())[0]
        store.do(backlog.give_back, [delivery])
        fit, others = store.do(attempts.fit, [by_redis(delivery)], ())
        assert (fit, others) == ([], [by_redis(delivery)])

    def test_are_taken_from_who_would_publish_them(self, store: Log, delivery: Delivery) -> None:
        store.do(backlog.give_back, [delivery])
        assert start(store, by_redis(delivery), is_moving=True).run
        assert take(store) == []


class TestWhatIsAtTheOldOne:
    def test_is_what_nobody_noted_to_be_at_the_new_one(self, store: Log) -> None:
        store.subscribe()
        old, new = append(store, event(), event())
        store.do(backlog.published, [old])
        store.do(backlog.published, [new], "rabbitmq")
        assert page(store, FORTH) == [old.seq]
        assert store.do(moving.of_old, [old.seq, new.seq], FORTH) == {old.seq}
        # on the way back it is the other one, and what nobody knows of
        assert page(store, BACK) == [old.seq, new.seq]

    def test_is_nothing_that_is_on_its_way_or_in_hand(self, store: Log, delivery: Delivery) -> None:
        start(store, by_redis(delivery), is_moving=True)
        append(store, event())
        append(store, event(), handover=OPEN)
        assert page(store, FORTH) == []

    def test_is_no_longer_there_once_it_is_ready(self, store: Log, delivery: Delivery) -> None:
        assert store.do(moving.make_ready, page(store, FORTH)) == 1
        assert page(store, FORTH) == []
        [taken] = take(store)
        # whoever gets a copy of it has to begin it in the log
        assert (taken.token, taken.to is not None) == (1, True)
        store.do(backlog.published, [taken], "rabbitmq")
        assert page(store, FORTH) == []

    def test_keeps_its_time_and_its_attempts(self, store: Log, delivery: Delivery) -> None:
        [lease] = start(store, by_redis(delivery)).run
        end(store, lease, RETRY, delay=60.0)
        assert page(store, FORTH, timed_alone=True) == [delivery.seq]
        store.do(moving.make_ready, [delivery.seq])
        [taken] = take(store)
        assert taken.attempts == 1
        assert 59 < taken.delay <= 60

    def test_has_no_time_where_the_new_one_is_the_log(self, store: Log, delivery: Delivery) -> None:
        timed = later(store)
        store.do(moving.mark, [timed.seq], "redis")
        assert page(store, TO_LOG) == [delivery.seq]
        store.do(moving.forget_others, known(store))
        assert store.delivery(timed.seq).provider is None

    def test_has_a_time_where_the_old_one_is_the_log(self, store: Log, delivery: Delivery) -> None:
        timed, there = later(store), later(store)
        store.do(moving.mark, [there.seq], "redis")
        assert page(store, FROM_LOG) == [timed.seq]


class TestInheriting:
    def inherit(self, store: Log) -> float:
        return store.do(moving.inherit, [known(store)], "redis")

    def test_makes_ready_what_is_due(self, store: Log) -> None:
        store.subscribe()
        due, not_due, there = later(store, 0.01), later(store, 60), later(store, 0.01)
        store.do(moving.mark, [there.seq], "redis")
        began = store.do(lambda tx: tx.now)
        wait_until(lambda: store.do(lambda tx: tx.later(-0.02)) > began, 5, "their time")
        assert 59 < self.inherit(store) <= 60
        found = [bool(store.delivery(each.seq).ready) for each in (due, not_due, there)]
        assert found == [True, False, False]

    def test_has_what_was_taken_over_wait_again(self, store: Log, delivery: Delivery) -> None:
        """Given a worker of the log's own provider that died, and nobody free to take over."""
        provider = make_provider(load_settings(store.config))
        known_id = known(store)
        store.do(lambda tx: provider.publish([delivery], tx))
        [lease] = store.do(lambda tx: provider.reserve({known_id: 1}, 1, tx))
        store.start(lease)
        expire(store, delivery.seq)
        store.do(lambda tx: provider.reserve({known_id: 0}, 1, tx))
        row = store.delivery(delivery.seq)
        assert (row.status, bool(row.ready)) == (PROCESSING, True)

        self.inherit(store)

        assert store.delivery(delivery.seq).status == PENDING
        [taken] = take(store)
        assert taken.token > lease.token
        provider.close()


class TestTakingOut:
    def out(self, store: Log, *leases: Lease, route: Route = FORTH) -> int:
        return store.do(moving.take_out, leases, route, 3, 30.0)

    def test_makes_ready_what_only_the_old_one_has(self, store: Log, delivery: Delivery) -> None:
        assert self.out(store, by_redis(delivery)) == 1
        assert [each.seq for each in take(store)] == [delivery.seq]

    def test_leaves_alone_what_the_new_one_has(self, store: Log, delivery: Delivery) -> None:
        store.do(moving.mark, [delivery.seq], "rabbitmq")
        assert self.out(store, by_redis(delivery)) == 0
        assert take(store) == []

    def test_leaves_alone_what_ended(self, store: Log, delivery: Delivery) -> None:
        [lease] = start(store, by_redis(delivery)).run
        store.record(Outcome(lease, attempts.DeliveryStatus.COMPLETED))
        assert self.out(store, by_redis(delivery)) == 0

    def test_stores_what_a_plain_dispatcher_sent(self, store: Log) -> None:
        store.subscribe()
        stranger = Delivery(0, known(store), replace(event(), id=""))
        assert self.out(store, copy(stranger), route=BACK) == 1
        assert len(take(store)) == 1

    def test_has_what_a_dead_worker_had_taken_over(self, store: Log, delivery: Delivery) -> None:
        """Given a lease in Redis that ran out: nobody else tells the log."""
        store.do(lambda tx: attempts.begin(tx, [by_redis(delivery)], "host:1", 0.0))
        assert self.out(store, by_redis(delivery, 3)) == 0
        assert store.delivery(delivery.seq).lease_expires_at is not None
        expire(store, delivery.seq)
        recover(store)
        assert [each.seq for each in take(store)] == [delivery.seq]


def test_what_is_ready_before_its_time_is_not_reserved_in_the_log(store: Log) -> None:
    """Given another provider that is away: what it was to publish is ready, and has a time."""
    store.subscribe()
    [timed] = append(store, event(delay=60), handover=OPEN)
    provider = make_provider(load_settings(store.config))
    assert store.delivery(timed.seq).ready
    its = {known(store): 10}
    assert store.do(lambda tx: provider.reserve(its, 10, tx)) == []
    provider.close()


# --- asking two providers


def entry(seq: int, provider: str | None = None) -> Entry:
    return Entry(seq, 1, f"m{seq}", "pending", 0, 0, None, provider)


SUBSCRIPTION = Subscription("orders", "shop", "placed", "audit.note", id=1)


def listing(*there: int) -> Listing:
    provider = Mock()
    provider.holds = lambda _queue, seqs: set(seqs) & set(there)
    return Listing(provider, {1: SUBSCRIPTION})


def counting(ready: int) -> Counting:
    provider = Mock(capabilities=Capabilities(counts_all=False))
    provider.shares.return_value = False
    provider.get_queue_stats = lambda its: [
        SubscriptionStats("audit.note", ready, None, None, 0) for _ in its
    ]
    return Counting(provider, {1: SUBSCRIPTION}, Mock())


class TestAudit:
    def lack(self, asker: Both, *entries: Entry) -> set[int]:
        return asker.ask(entries)(entries).suspects

    def test_takes_for_lost_what_neither_has(self) -> None:
        asker = Both(listing(1, 2), counting(1), "redis")
        assert self.lack(asker, entry(1, "redis"), entry(2), entry(3)) == set()
        assert asker.held == {1: 2}
        # of those that the other one may have, two are one too many
        assert self.lack(asker, entry(1, "redis"), entry(3), entry(4)) == {3, 4}
        assert self.lack(asker, entry(5, "redis")) == {5}

    def test_asks_the_old_one_for_what_is_not_in_the_log(self) -> None:
        asker = Both(Joined(), listing(1), "embedded")
        assert self.lack(asker, entry(1), entry(2)) == {2}

    def test_leaves_to_the_log_what_has_a_time(self, store: Log) -> None:
        asker = Both(listing(), None, "redis")
        now = store.do(lambda tx: tx.now)
        timed = entry(1)._replace(available_at=now)
        assert self.lack(asker, timed) == set()
        assert self.lack(asker, timed._replace(provider="redis")) == {1}
        assert self.lack(asker, entry(1)) == {1}


class TestPreparing:
    def test_is_for_what_lasts(self) -> None:
        provider, fleeting = Mock(), replace(SUBSCRIPTION, id=2, reliable=False)
        prepare(provider, Prepare([SUBSCRIPTION, fleeting], [SUBSCRIPTION]))
        provider.declare.assert_called_once_with([SUBSCRIPTION])
        provider.pause.assert_called_once_with(SUBSCRIPTION)
        provider.close.assert_called_once_with()

    def test_closes_what_does_not_answer(self) -> None:
        provider = Mock()
        provider.initialize.side_effect = ProviderUnavailableError("away")
        with pytest.raises(ProviderUnavailableError):
            prepare(provider, Prepare([], []))
        provider.close.assert_called_once_with()


class TestWorkers:
    """One service has as many workers, whichever provider hands out."""

    @pytest.fixture
    def drain(self, store: Log) -> Iterator[Drain]:
        config = {**store.config, "QUEUE_PROVIDER": "embedded", "QUEUE_PROVIDER_DRAIN": "redis"}
        made = Drain(Mock(), load_settings(config), Mock(), Mock(), Mock(), Mock())
        yield made
        made._old._database.close()
        made.mailbox.close()

    def leases(self, count: int) -> Sequence[Lease]:
        return [Lease(Delivery(n, 1, event()), 1) for n in range(count)]

    def test_are_counted_for_both(self, drain: Drain) -> None:
        new, old = self.leases(2), self.leases(3)
        drain.came(new)
        drain._take_old(list(old))
        assert (drain._old.elsewhere(), drain._new.elsewhere()) == (2, 3)
        assert [drain.owns(each) for each in (old[0], new[0])] == [True, False]
        assert (drain._old.elsewhere(), drain._new.elsewhere()) == (1, 2)
        drain._new.look_again.assert_called_once_with()  # type: ignore[attr-defined]

    def test_take_batches_as_one(self, drain: Drain) -> None:
        drain.note_batches({1: 10})
        drain.came(self.leases(11))
        assert drain._old.elsewhere() == 2

    def test_are_freed_once(self, drain: Drain) -> None:
        [lease] = self.leases(1)
        drain._take_old([lease])
        assert [drain.owns(lease), drain.owns(lease)] == [True, False]
        assert drain._new.elsewhere() == 0


@pytest.mark.parametrize(
    ("new", "old", "is_apart"),
    [("redis", "embedded", False), ("embedded", "redis", True), ("redis", "rabbitmq", True)],
)
def test_a_second_pump_is_for_what_has_storage_of_its_own(
    store: Log, new: str, old: str, is_apart: bool
) -> None:
    config = {**store.config, "QUEUE_PROVIDER": new, "QUEUE_PROVIDER_DRAIN": old}
    drain = Drain.beside(Mock(), load_settings(config), Mock(), Mock(), Mock(), Mock())
    assert (drain is not None) is is_apart
    if drain is not None:
        drain._old._database.close()
        drain.mailbox.close()


def test_who_is_active_is_seen_with_what_the_log_has(store: Log, delivery: Delivery) -> None:
    later(store)
    store.do(backlog.give_back, [delivery])
    with contextlib.closing(store.database.engine.connect()) as connection:
        assert moving.seen(connection, FROM_LOG) == (subscriptions.active(connection), 2)
        assert moving.seen(connection, FORTH) == (subscriptions.active(connection), 0)
