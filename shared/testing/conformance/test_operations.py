"""What operations do: look, pause, purge; and a server that goes away and comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from time import monotonic

import pytest

from shared.errors import (
    ProviderUnavailableError,
    StoreUnavailableError,
    UnsupportedByProviderError,
)
from shared.native import sleep
from shared.providers import SubscriptionStats
from shared.testing.conformance.lab import LEASE_SECONDS, ProviderLab, Worker, elapsed, seqs
from shared.testing.conformance.process import Process
from shared.types import Priority, SettleAction, Settlement, Subscription

NewWorker = Callable[..., Worker]


class TestPause:
    def test_holds_for_every_instance(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        sent = worker.dispatch("placed")
        worker.provider.pause(placed)
        worker.provider.pause(placed)
        sent += worker.dispatch("placed")
        assert worker.reserve() == other.reserve() == []
        other.provider.resume(placed)
        assert seqs(worker.reserve()) == seqs(sent)

    def test_holds_for_no_other_subscription(self, worker: Worker, placed: Subscription) -> None:
        worker.subscribe("paid")
        worker.provider.pause(placed)
        worker.dispatch("placed")
        paid = worker.dispatch("paid")
        assert seqs(worker.reserve()) == seqs(paid)

    def test_holds_for_what_becomes_due(self, worker: Worker, placed: Subscription) -> None:
        sent = worker.dispatch("placed", delay=0.1)
        worker.provider.pause(placed)
        worker.reserves_nothing_for(0.3, meanwhile=lambda: None)
        worker.provider.resume(placed)
        assert seqs(worker.reserve_within(worker.lab.promptly)) == seqs(sent)

    def test_lets_who_has_a_lease_settle(self, worker: Worker, placed: Subscription) -> None:
        sent = worker.dispatch("placed", 2)
        done, released = worker.reserve()
        worker.provider.pause(placed)
        assert worker.extend(done, released) == []
        assert worker.acknowledge(done) == []
        assert worker.release(released) == []
        assert worker.reserve() == []
        worker.provider.resume(placed)
        assert seqs(worker.reserve()) == seqs(sent[1:])

    def test_ends_with_a_push(
        self, worker: Worker, placed: Subscription, new_process: Callable[..., Process]
    ) -> None:
        process = new_process()
        sent = worker.dispatch("placed")
        worker.provider.pause(placed)
        # what was dispatched may have woken it already
        worker.reserves_nothing_for(0.1, meanwhile=lambda: None)
        process.tell("resume", asdict(placed), 0.1)
        with elapsed(at_most=0.1 + worker.lab.promptly):
            assert seqs(worker.reserve_within(30)) == seqs(sent)
        process.answer()

    def test_is_known_to_who_consumes(self, worker: Worker, placed: Subscription) -> None:
        assert not worker.provider.is_paused(placed)
        worker.provider.pause(placed)
        assert worker.provider.is_paused(placed)
        worker.provider.resume(placed)
        assert not worker.provider.is_paused(placed)


class TestHolds:
    @pytest.fixture(autouse=True)
    def _can(self, worker: Worker, placed: Subscription) -> None:
        if not worker.provider.capabilities.lists:
            with pytest.raises(UnsupportedByProviderError):
                worker.provider.holds(placed, [1])
            pytest.skip("the provider cannot list what it has, and says so")

    def test_is_all_that_did_not_end(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        sent = [*worker.dispatch("placed", 4), *worker.dispatch("placed", delay=60)]
        done, dead, *_ = worker.reserve(3)
        worker.acknowledge(done)
        worker.provider.settle([Settlement(dead, SettleAction.DEAD_LETTER)])
        asked = seqs(sent)
        expected = set(asked) - {done.delivery.seq}
        assert other.provider.holds(placed, [*asked, 10**9]) == expected


class TestPeek:
    @pytest.fixture(autouse=True)
    def _can(self, worker: Worker, placed: Subscription) -> None:
        if not worker.provider.capabilities.peek:
            with pytest.raises(UnsupportedByProviderError):
                worker.provider.peek(placed, 1)
            pytest.skip("the provider cannot peek, and says so")

    def test_shows_what_would_be_reserved(self, worker: Worker, placed: Subscription) -> None:
        normal = worker.dispatch("placed", 3, body='{"n":1}')
        urgent = worker.dispatch("placed", 1, priority=Priority.URGENT)
        worker.dispatch("placed", delay=60)
        seen = worker.provider.peek(placed, 3)
        has_priorities = worker.provider.capabilities.priorities
        expected = [*urgent, *normal[:2]] if has_priorities else normal
        assert seqs(seen) == seqs(expected)
        assert seen[-1].message.body == '{"n":1}'
        assert seqs(worker.reserve(3)) == seqs(expected)

    def test_reserves_nothing(self, worker: Worker, other: Worker, placed: Subscription) -> None:
        sent = worker.dispatch("placed", 2)
        for _ in range(2):
            assert seqs(worker.provider.peek(placed, 10)) == seqs(sent)
        leases = other.reserve()
        assert seqs(leases) == seqs(sent)
        assert worker.provider.peek(placed, 10) == []
        assert other.acknowledge(*leases) == []

    def test_shows_what_is_paused(self, worker: Worker, placed: Subscription) -> None:
        sent = worker.dispatch("placed")
        worker.provider.pause(placed)
        assert seqs(worker.provider.peek(placed, 10)) == seqs(sent)

    def test_shows_nothing_of_other_subscriptions(self, worker: Worker) -> None:
        [paid] = worker.subscribe("paid")
        worker.dispatch("placed")
        assert worker.provider.peek(paid, 10) == []


class TestPurge:
    def test_removes_and_counts_what_waits(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        worker.dispatch("placed", 4)
        scheduled = worker.dispatch("placed", 2, delay=0.1)
        leased, retried = worker.reserve(2)
        worker.retry(retried, delay=0.1)
        # two wait, three wait for their time, one is leased
        counts_all = worker.provider.capabilities.counts_all
        assert other.provider.purge(placed) == (5 if counts_all else 2)
        assert other.provider.purge(placed) == 0
        if not counts_all:
            left = worker.reserve_within(0.1 + worker.lab.promptly, 3)
            assert sorted(seqs(left)) == sorted(seqs([retried, *scheduled]))
            worker.acknowledge(*left)
        worker.reserves_nothing_for(0.3, meanwhile=lambda: None)
        assert worker.acknowledge(leased) == []

    def test_removes_what_was_taken_over(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        worker.dispatch("placed", 2)
        assert len(worker.reserve()) == 2
        other.provider.pause(placed)
        worker.lab.lose_leases(worker)
        deadline = monotonic() + 2 * LEASE_SECONDS + worker.lab.promptly
        while other.provider.get_queue_stats([placed])[0].waiting < 2:
            assert monotonic() < deadline
            assert other.reserve() == []
            sleep(0.01)
        assert other.provider.purge(placed) == 2
        other.provider.resume(placed)
        other.reserves_nothing_for(0.3, meanwhile=lambda: None)

    def test_leaves_other_subscriptions_alone(self, worker: Worker, placed: Subscription) -> None:
        worker.subscribe("paid")
        worker.dispatch("placed")
        paid = worker.dispatch("paid")
        assert worker.provider.purge(placed) == 1
        assert seqs(worker.reserve()) == seqs(paid)

    def test_leaves_what_comes_after_alone(self, worker: Worker, placed: Subscription) -> None:
        worker.dispatch("placed")
        worker.provider.purge(placed)
        later = worker.dispatch("placed")
        assert seqs(worker.reserve()) == seqs(later)


class TestStats:
    def test_count_by_subscription(self, worker: Worker) -> None:
        worker.subscribe("placed", subscriber="other.note")
        worker.dispatch("placed", 6)
        worker.dispatch("placed", 1, delay=60)
        ours, theirs = worker.declared
        one, two, three, _ = worker.reserve(4, {ours.id: 4})
        worker.acknowledge(one)
        worker.retry(two, delay=60)
        worker.dead_letter(three)
        counts = [
            expected(worker, ours, waiting=2, active=1, scheduled=2, dead=1),
            expected(worker, theirs, waiting=6, active=0, scheduled=1, dead=0),
        ]
        # a server may pass on a dead letter by itself, soon
        deadline = monotonic() + worker.lab.promptly
        while (found := worker.provider.get_queue_stats(worker.declared)) != counts:
            assert monotonic() < deadline, found
            sleep(0.01)

    def test_are_zero_where_nothing_was_published(self, worker: Worker) -> None:
        [ours] = worker.declared
        nothing = expected(worker, ours, waiting=0, active=0, scheduled=0, dead=0)
        assert worker.provider.get_queue_stats(worker.declared) == [nothing]

    def test_are_empty_for_nothing(self, worker: Worker) -> None:
        assert worker.provider.get_queue_stats([]) == []

    def test_are_the_same_from_each_instance(self, worker: Worker, other: Worker) -> None:
        [ours] = worker.declared
        worker.dispatch("placed", 2)
        worker.reserve(1)
        for each in (worker, other):
            [stats] = each.provider.get_queue_stats(worker.declared)
            assert stats == expected(worker, ours, waiting=1, active=1, scheduled=0, dead=0)


def expected(
    worker: Worker, subscription: Subscription, *, active: int, scheduled: int, **counts: int
) -> SubscriptionStats:
    """Return what is to be counted, as far as the provider can count it."""
    if worker.provider.capabilities.counts_all:
        return SubscriptionStats(
            subscription.subscriber, active=active, scheduled=scheduled, **counts
        )
    return SubscriptionStats(subscription.subscriber, active=None, scheduled=None, **counts)


class TestHealth:
    def test_is_good(self, worker: Worker) -> None:
        assert worker.provider.health_check() is True
        assert worker.provider.health_check() is True


class TestOutage:
    @pytest.fixture
    def outage(self, lab: ProviderLab) -> Callable[[], contextlib.AbstractContextManager[None]]:
        if not lab.can_stop:
            pytest.skip("there is no server to stop")

        @contextlib.contextmanager
        def take_away() -> Iterator[None]:
            lab.stop_server()
            try:
                yield
            finally:
                lab.start_server()

        return take_away

    def test_is_seen_and_survived(
        self, worker: Worker, outage: Callable[..., contextlib.AbstractContextManager[None]]
    ) -> None:
        provider = worker.provider
        [placed] = worker.declared
        sent = worker.dispatch("placed", 2)
        leases = worker.reserve(1)
        with outage(), elapsed(at_most=10):
            assert provider.health_check() is False
            for call in (
                provider.initialize,
                lambda: provider.publish(sent),
                lambda: provider.reserve({placed.id: 1}, 1),
                lambda: provider.settle([Settlement(leases[0], SettleAction.ACKNOWLEDGE)]),
                lambda: provider.extend(leases),
                lambda: provider.get_queue_stats(worker.declared),
                lambda: provider.pause(placed),
                lambda: provider.resume(placed),
                lambda: provider.peek(placed, 1),
                lambda: provider.purge(placed),
            ):
                with pytest.raises(ProviderUnavailableError) as raised:
                    call()
                assert str(raised.value)
            assert provider.health_check() is False
        provider.initialize()
        assert provider.health_check() is True
        provider.declare([placed])
        # the lease may have run out meanwhile, and then it is the first again
        taken = worker.reserve_within(worker.lab.promptly + 2, 1)
        assert taken[0].delivery.seq in seqs(sent)
        assert worker.acknowledge(*taken) == []

    def test_that_nobody_noticed_is_survived(
        self, worker: Worker, outage: Callable[..., contextlib.AbstractContextManager[None]]
    ) -> None:
        sent = worker.dispatch("placed")
        with outage():
            pass
        try:
            leases = worker.reserve_within(worker.lab.promptly)
        except (ProviderUnavailableError, StoreUnavailableError):
            # what was lost is found out once
            worker.provider.initialize()
            leases = worker.reserve_within(worker.lab.promptly)
        assert seqs(leases) == seqs(sent)

    def test_ends_a_wait_for_nobody(
        self, worker: Worker, outage: Callable[..., contextlib.AbstractContextManager[None]]
    ) -> None:
        with outage(), contextlib.suppress(ProviderUnavailableError):
            worker.interrupt.ring()
            with elapsed(at_most=worker.lab.promptly):
                worker.wait(30)
