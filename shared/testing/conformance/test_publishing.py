"""Connecting, declaring, publishing, and in which order what was published is reserved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.testing.conformance.lab import ProviderLab, Worker, seqs
from shared.types import Priority, Subscription

NewWorker = Callable[..., Worker]

RISING = (Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.URGENT)


class TestConnection:
    def test_is_made_twice_and_closed_twice(self, new_worker: NewWorker) -> None:
        worker = new_worker()
        worker.provider.initialize()
        worker.subscribe("placed")
        sent = worker.dispatch("placed")
        assert seqs(worker.reserve()) == seqs(sent)
        worker.provider.close()
        worker.provider.close()

    def test_is_made_again_after_it_was_closed(self, worker: Worker, placed: Subscription) -> None:
        worker.provider.close()
        worker.provider.initialize()
        worker.provider.declare([placed])
        sent = worker.dispatch("placed")
        assert seqs(worker.reserve_within(worker.lab.promptly)) == seqs(sent)

    def test_is_closed_without_having_been_made(self, lab: ProviderLab) -> None:
        lab.make_provider().close()

    def test_leaves_what_waits_behind(self, worker: Worker, new_worker: NewWorker) -> None:
        sent = worker.dispatch("placed", 3)
        worker.provider.close()
        assert seqs(new_worker(*worker.declared).reserve()) == seqs(sent)


class TestDeclaring:
    def test_again_changes_nothing(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        sent = worker.dispatch("placed", 2)
        for each in (worker, other):
            each.provider.declare([placed])
            each.provider.declare([placed, placed])
        assert seqs(worker.reserve()) == seqs(sent)
        assert other.reserve() == []


class TestPublishing:
    def test_one(self, worker: Worker) -> None:
        [sent] = worker.dispatch("placed", body='{"name":"Zoë 🚲"}')
        [lease] = worker.reserve()
        assert lease.delivery.seq == sent.seq
        assert lease.delivery.subscription_id == sent.subscription_id
        assert lease.delivery.attempts == 0
        assert lease.delivery.message.id == sent.message.id
        assert lease.delivery.message.body == '{"name":"Zoë 🚲"}'
        assert lease.delivery.message.queue == sent.message.queue
        assert lease.delivery.message.type == "placed"

    def test_many(self, worker: Worker) -> None:
        sent = worker.dispatch("placed", 250)
        assert seqs(worker.reserve(1000)) == seqs(sent)

    def test_nothing(self, worker: Worker) -> None:
        worker.provider.publish([])
        worker.provider.published([])
        assert worker.reserve() == []

    def test_to_several_subscriptions(self, worker: Worker) -> None:
        worker.subscribe("placed", subscriber="other.note")
        sent = worker.dispatch("placed", 3)
        assert len(sent) == 6
        leases = worker.reserve()
        assert sorted(seqs(leases)) == seqs(sent)
        assert len({lease.delivery.message.id for lease in leases}) == 3

    def test_without_a_listener(self, worker: Worker, new_worker: NewWorker) -> None:
        worker.provider.close()
        publisher = new_worker()
        sent = publisher.dispatch("placed")
        assert seqs(new_worker(*worker.declared).reserve()) == seqs(sent)


class TestPublishingAgain:
    def test_what_waits_makes_no_double(self, worker: Worker, other: Worker) -> None:
        sent = worker.dispatch("placed", 2)
        worker.publish(sent)
        other.publish(sent)
        assert seqs(worker.reserve()) == seqs(sent)
        assert other.reserve() == []

    def test_what_is_leased_does_not_hand_it_out_twice(self, worker: Worker, other: Worker) -> None:
        sent = worker.dispatch("placed")
        leases = worker.reserve()
        other.publish(sent)
        assert other.reserve() == []
        assert worker.acknowledge(*leases) == []

    def test_what_is_acknowledged_does_not_bring_it_back(self, worker: Worker) -> None:
        sent = worker.dispatch("placed")
        worker.acknowledge(*worker.reserve())
        worker.publish(sent)
        assert worker.reserve() == []

    def test_what_is_scheduled_does_not_put_it_off(self, worker: Worker) -> None:
        sent = worker.dispatch("placed", delay=0.2)
        worker.publish([replace(delivery, delay=3600) for delivery in sent])
        assert seqs(worker.reserve_within(0.2 + worker.lab.promptly)) == seqs(sent)

    def test_what_is_scheduled_does_not_hasten_it(self, worker: Worker) -> None:
        sent = worker.dispatch("placed", delay=3600)
        worker.publish([replace(delivery, delay=0) for delivery in sent])
        assert worker.reserve() == []

    def test_what_waits_for_its_next_attempt_does_not_hasten_it(self, worker: Worker) -> None:
        sent = worker.dispatch("placed")
        worker.retry(*worker.reserve(), delay=60)
        worker.publish(sent)
        assert worker.reserve() == []


class TestOrder:
    def test_is_that_of_dispatch(self, worker: Worker, other: Worker) -> None:
        sent = [*worker.dispatch("placed", 3), *other.dispatch("placed", 3)]
        sent += worker.dispatch("placed", 3)
        assert seqs(worker.reserve()) == seqs(sent)

    def test_urgent_goes_first(self, worker: Worker) -> None:
        if not worker.provider.capabilities.priorities:
            pytest.skip("the provider has no priorities")
        sent = [worker.dispatch("placed", 2, priority=priority) for priority in RISING]
        assert seqs(worker.reserve()) == [seq for two in reversed(sent) for seq in seqs(two)]

    def test_urgent_overtakes_what_was_waiting_before(self, worker: Worker) -> None:
        if not worker.provider.capabilities.priorities:
            pytest.skip("the provider has no priorities")
        low = worker.dispatch("placed", 100, priority=Priority.LOW)
        assert seqs(worker.reserve(10)) == seqs(low[:10])
        urgent = worker.dispatch("placed", 2, priority=Priority.URGENT)
        assert seqs(worker.reserve(10)) == seqs([*urgent, *low[10:18]])

    def test_is_that_of_dispatch_without_priorities(self, worker: Worker) -> None:
        if worker.provider.capabilities.priorities:
            pytest.skip("the provider has priorities")
        sent = [worker.dispatch("placed", 1, priority=priority)[0] for priority in RISING]
        assert seqs(worker.reserve()) == seqs(sent)


class TestReserving:
    def test_nothing(self, worker: Worker) -> None:
        assert worker.reserve() == []
        assert worker.reserve(limits={}) == []

    def test_stops_at_the_limit(self, worker: Worker) -> None:
        sent = worker.dispatch("placed", 5)
        assert worker.reserve(0) == []
        assert seqs(worker.reserve(2)) == seqs(sent[:2])
        assert seqs(worker.reserve(2)) == seqs(sent[2:4])
        assert seqs(worker.reserve(2)) == seqs(sent[4:])

    def test_stops_at_the_limit_of_each_subscription(self, worker: Worker) -> None:
        placed, paid, shipped = *worker.declared, *worker.subscribe("paid", "shipped")
        for event_type in ("placed", "paid", "shipped"):
            worker.dispatch(event_type, 5)
        leases = worker.reserve(100, {placed.id: 1, paid.id: 3, shipped.id: 0})
        ids = [lease.delivery.subscription_id for lease in leases]
        assert sorted(ids) == [placed.id, paid.id, paid.id, paid.id]

    def test_stops_at_the_limit_of_all_together(self, worker: Worker) -> None:
        worker.subscribe("paid")
        worker.dispatch("placed", 5)
        worker.dispatch("paid", 5)
        assert len(worker.reserve(7)) <= 7
        ids = {subscription.id: 5 for subscription in worker.declared}
        assert len(worker.reserve(1, ids)) <= 1

    def test_takes_nothing_of_other_subscriptions(
        self, worker: Worker, new_worker: NewWorker
    ) -> None:
        other = new_worker()
        other.subscribe("paid")
        worker.dispatch("placed", 2)
        paid = worker.dispatch("paid", 2)
        assert seqs(other.reserve()) == seqs(paid)

    def test_shares_fairly_between_subscriptions(self, worker: Worker) -> None:
        worker.subscribe("paid")
        worker.dispatch("placed", 20)
        worker.dispatch("paid", 20)
        ids = [lease.delivery.subscription_id for lease in worker.reserve(10)]
        assert len(ids) == 10
        # evenly, but for what cannot be divided
        assert all(ids.count(subscription.id) >= 4 for subscription in worker.declared)

    def test_starves_no_subscription_when_one_worker_is_free(self, worker: Worker) -> None:
        worker.subscribe("paid", "shipped")
        for event_type in ("placed", "paid", "shipped"):
            worker.dispatch(event_type, 10)
        ids = [lease.delivery.subscription_id for _ in range(9) for lease in worker.reserve(1)]
        assert {ids.count(subscription.id) for subscription in worker.declared} == {3}

    def test_gives_the_room_to_who_can_use_it(self, worker: Worker) -> None:
        worker.subscribe("paid")
        # twice, since another may be first each time
        for _ in range(2):
            sent = [*worker.dispatch("placed", 1), *worker.dispatch("paid", 9)]
            assert sorted(seqs(worker.reserve(10))) == seqs(sent)
