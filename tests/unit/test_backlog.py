"""What a provider with storage of its own has not got yet, and what arrives without a number."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import update

from shared.lifecycle import MAX_TAKEOVERS, DeliveryStatus
from shared.store import adoption, attempts, backlog, log, subscriptions
from shared.store.log import Handover
from shared.store.summary import refresh
from shared.tables import deliveries as deliveries_table
from shared.tables import messages as messages_table
from shared.types import Delivery, Envelope, Lease, Outcome, SettleAction
from tests.unit.message_log import BOOM, COMPLETED, PENDING, RETRY, Log, event

HANDED = Handover(backlog.PUBLISH_SECONDS, fans_out=True)
OPEN = Handover(backlog.PUBLISH_SECONDS, is_open=True, fans_out=True)


def append(store: Log, *envelopes: Envelope, handover: Handover = HANDED) -> list[Delivery]:
    return store.do(lambda tx: log.append(tx, envelopes, 3, handover=handover))


def take(store: Log) -> list[Delivery]:
    return store.do(backlog.take)


def recover(store: Log) -> None:
    store.do(backlog.recover)


def expire(store: Log, *seqs: int) -> None:
    """Let the time pass for which deliveries are in somebody's hands."""

    def step(tx: Any) -> None:
        its = deliveries_table.c.seq.in_(seqs)
        past = tx.later(-1)
        tx.connection.execute(update(deliveries_table).where(its).values(lease_expires_at=past))

    store.do(step)


def start(store: Log, *leases: Lease, worker: str = "host:1", **options: Any) -> attempts.Started:
    def step(tx: Any) -> attempts.Started:
        started = attempts.start(tx, leases, worker, held_for=30.0, **options)
        refresh(tx, {lease.delivery.message.id for lease in leases})
        return started

    return store.do(step)


@pytest.fixture
def delivery(store: Log) -> Delivery:
    """One delivery that the broker has."""
    store.subscribe()
    [made] = append(store, event())
    store.do(backlog.published, [made])
    return made


def copy(delivery: Delivery, *, redelivered: bool = False) -> Lease:
    """What the broker hands out: it has no token."""
    return Lease(delivery, 0, redelivered=redelivered, handle=object())


class TestHandover:
    def test_what_is_handed_over_is_in_nobodys_way(self, store: Log) -> None:
        store.subscribe()
        [made] = append(store, event())
        row = store.delivery(made.seq)
        assert row.lease_expires_at is not None
        assert not row.ready
        assert take(store) == []

    def test_what_is_published_stays_published(self, store: Log, delivery: Delivery) -> None:
        assert store.delivery(delivery.seq).lease_expires_at is None
        recover(store)
        assert take(store) == []

    def test_while_the_broker_is_away_it_waits_in_order(self, store: Log) -> None:
        store.subscribe()
        store.subscribe(subscriber="other.note")
        made = [each for n in range(3) for each in append(store, event(body=f"{n}"), handover=OPEN)]
        taken = take(store)
        assert [each.seq for each in taken] == [each.seq for each in made]
        # nobody had any of it: it goes to whoever listens
        assert {each.to for each in taken} == {None}
        assert take(store) == []

    def test_an_urgent_one_does_not_keep_its_delay_from_the_broker(self, store: Log) -> None:
        store.subscribe()
        append(store, event(delay=60.0), handover=OPEN)
        [taken] = take(store)
        assert 55 < taken.delay <= 60

    def test_given_back_it_is_taken_again(self, store: Log) -> None:
        store.subscribe()
        made = append(store, event())
        store.do(backlog.give_back, made)
        assert [each.seq for each in take(store)] == [made[0].seq]

    def test_what_is_newer_than_what_another_publishes_is_left(
        self, store: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backlog, "MOST_AT_ONCE", 2)
        store.subscribe()
        made = [each for _ in range(4) for each in append(store, event(), handover=OPEN)]
        first = take(store)
        assert take(store) == []
        assert store.do(backlog.waits)
        store.do(backlog.published, first)
        assert [each.seq for each in first + take(store)] == [each.seq for each in made]
        assert not store.do(backlog.waits)

    def test_who_takes_long_to_publish_holds_up_nobody(
        self, store: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(backlog, "MOST_AT_ONCE", 2)
        store.subscribe()
        made = [each for _ in range(4) for each in append(store, event(), handover=OPEN)]
        monkeypatch.setattr(backlog, "PUBLISH_SECONDS", 10.0)
        take(store)
        monkeypatch.setattr(backlog, "PUBLISH_SECONDS", 30.0)
        assert [each.seq for each in take(store)] == [each.seq for each in made[2:]]

    def test_whoever_died_with_it_in_hand_is_replaced(self, store: Log) -> None:
        store.subscribe()
        [made] = append(store, event())
        recover(store)
        assert take(store) == []
        expire(store, made.seq)
        recover(store)
        assert [each.seq for each in take(store)] == [made.seq]

    def test_where_a_sibling_was_handled_it_goes_to_its_subscription_alone(
        self, store: Log
    ) -> None:
        store.subscribe()
        other = store.subscribe(subscriber="other.note")
        one, two = append(store, event())
        [lease] = start(store, copy(one)).run
        store.record(Outcome(lease, COMPLETED))
        expire(store, two.seq)
        recover(store)
        [taken] = take(store)
        assert taken.to is not None
        assert (taken.seq, taken.to.id, taken.to.subscriber) == (two.seq, other.id, "other.note")

    def test_what_nobody_in_the_log_wants_is_done_once_it_is_published(self, store: Log) -> None:
        envelope = event("unheard.of")
        [made] = append(store, envelope)
        assert (made.seq, made.subscription_id) == (0, 0)
        assert store.message(envelope.id).status == "pending"
        assert store.do(backlog.alone) == []  # its dispatcher has it in hand
        store.do(backlog.published, [made])
        assert store.message(envelope.id).status == "completed"

    def test_what_nobody_in_the_log_wants_is_found_when_its_dispatcher_died(
        self, store: Log
    ) -> None:
        envelope = event("unheard.of")
        append(store, envelope)
        age(store, envelope)
        [found] = store.do(backlog.alone)
        assert (found.seq, found.message.id) == (0, envelope.id)
        assert store.do(backlog.alone) == []  # who found it has it in hand

    def test_what_nobody_in_the_log_wants_is_taken_by_who_could_not_publish_it(
        self, store: Log
    ) -> None:
        envelopes = [event("unheard.of") for _ in range(3)]
        for each in envelopes:
            append(store, each)
        own = [each.id for each in reversed(envelopes)]
        found = store.do(lambda tx: backlog.alone(tx, own))
        assert [each.message.id for each in found] == own[::-1]

        age(store, envelopes[0])
        assert len(store.do(backlog.alone)) == 1  # by another one, which takes it over
        store.do(backlog.give_back, found[1:])
        again = store.do(lambda tx: backlog.alone(tx, own))
        assert [each.message.id for each in again] == own[1::-1]


def age(store: Log, envelope: Envelope) -> None:
    """Have a message be older than those who publish it have for that."""

    def make_old(tx: Any) -> None:
        its = messages_table.c.id == envelope.id
        old = tx.later(-backlog.PUBLISH_SECONDS - 5)
        values = {"created_at": old, "updated_at": old}
        tx.connection.execute(update(messages_table).where(its).values(**values))

    store.do(make_old)


class TestFit:
    def test_nothing_overtakes_what_has_to_be_started_first(self, store: Log) -> None:
        """Given five of which the third was given back before, and is handed out again."""
        store.subscribe()
        leases = [copy(each) for each in append(store, *[event() for _ in range(5)])]
        leases[2] = copy(leases[2].delivery, redelivered=True)

        fit, others = store.do(attempts.fit, leases, ())

        assert [lease.key for lease in fit] == [lease.key for lease in leases[:2]]
        assert others == leases[2:]

    def test_nor_does_it_where_the_log_knows_better(self, store: Log) -> None:
        """Given five of which another worker handles the third already, by another copy."""
        store.subscribe()
        leases = [copy(each) for each in append(store, *[event() for _ in range(5)])]
        start(store, copy(leases[2].delivery), worker="host:2")

        fit, others = store.do(attempts.fit, leases, ())

        assert [lease.key for lease in fit] == [lease.key for lease in leases[:2]]
        assert others == leases[2:]

    def test_what_has_the_number_of_another_message_does_not_run(
        self, store: Log, delivery: Delivery
    ) -> None:
        """Given what a broker has of a log that was restored, and has used the number again."""
        stranger = copy(replace(delivery, message=event()))
        own = copy(delivery)
        assert store.do(attempts.fit, [stranger, own], ()) == ([], [stranger, own])

        started = start(store, stranger, own)

        assert started.unknown == [stranger]
        [settled] = started.settled
        assert (settled.lease, settled.action) == (stranger, SettleAction.ACKNOWLEDGE)
        assert [lease.delivery for lease in started.run] == [delivery]
        outcome = Outcome(replace(started.run[0], delivery=stranger.delivery), COMPLETED)
        assert store.record(outcome) == ([], [outcome])
        assert store.record(Outcome(started.run[0], COMPLETED))[1] == []

    @pytest.mark.parametrize(
        "values",
        [
            {"available_at": datetime(2037, 1, 1)},
            {"ready": True},
            {"lease_token": 1},
            {"status": DeliveryStatus.RETRY},
        ],
        ids=["waits for its time", "is to be published again", "was handed out", "is tried again"],
    )
    def test_what_is_not_as_it_was_stored_is_for_the_log_to_sort_out(
        self, store: Log, delivery: Delivery, values: dict[str, Any]
    ) -> None:
        its = deliveries_table.c.seq == delivery.seq
        change = update(deliveries_table).where(its).values(**values)
        store.do(lambda tx: tx.connection.execute(change))

        lease = copy(delivery)
        assert store.do(attempts.fit, [lease], ()) == ([], [lease])

    def test_what_runs_already_is_for_the_log_to_sort_out(
        self, store: Log, delivery: Delivery
    ) -> None:
        lease = copy(delivery)
        assert store.do(attempts.fit, [lease], {delivery.seq}) == ([], [lease])


class TestLeasesInTheLog:
    def test_begin_with_a_token_of_the_log(self, store: Log, delivery: Delivery) -> None:
        [lease] = start(store, copy(delivery)).run
        row = store.delivery(delivery.seq)
        assert (row.status, row.lease_token) == ("processing", lease.token)
        assert row.lease_expires_at is not None
        outcome = Outcome(lease, COMPLETED)
        assert store.record(outcome) == ([outcome], [])

    def test_another_copy_is_dropped_while_one_is_handled(
        self, store: Log, delivery: Delivery
    ) -> None:
        start(store, copy(delivery))
        started = start(store, copy(delivery), worker="host:2")
        assert started.run == []
        assert [each.action for each in started.settled] == [SettleAction.ACKNOWLEDGE]

    def test_two_copies_at_once_are_one(self, store: Log, delivery: Delivery) -> None:
        started = start(store, copy(delivery), copy(delivery))
        assert len(started.run) == len(started.settled) == 1

    def test_a_redelivered_one_is_taken_over(self, store: Log, delivery: Delivery) -> None:
        [lost] = start(store, copy(delivery)).run
        [held] = start(store, copy(delivery, redelivered=True), worker="host:2").run
        assert held.token > lost.token
        assert store.delivery(delivery.seq).takeovers == 1
        stale = Outcome(lost, COMPLETED)
        assert store.record(stale) == ([], [stale])

    def test_a_copy_is_taken_over_when_its_lease_ran_out(
        self, store: Log, delivery: Delivery
    ) -> None:
        start(store, copy(delivery))
        expire(store, delivery.seq)
        assert len(start(store, copy(delivery), worker="host:2").run) == 1

    def test_who_lost_it_and_gets_it_again_goes_on(self, store: Log, delivery: Delivery) -> None:
        start(store, copy(delivery))
        started = start(store, copy(delivery, redelivered=True), running={delivery.seq})
        assert started.run == started.settled == []
        [lease] = started.resumed
        assert store.delivery(delivery.seq).takeovers == 0
        assert store.record(Outcome(lease, COMPLETED))[1] == []

    def test_a_retry_that_comes_before_its_time_is_put_off(
        self, store: Log, delivery: Delivery
    ) -> None:
        """Given an outcome that was stored by somebody who died before the broker was told."""
        [lease] = start(store, copy(delivery)).run
        store.record(Outcome(lease, RETRY, BOOM, 60.0))
        started = start(store, copy(delivery, redelivered=True))
        [settlement] = started.settled
        assert (settlement.action, settlement.is_early) == (SettleAction.RETRY, True)
        assert 55 < settlement.delay <= 60
        # what the broker counts up by one is then what the log has
        assert settlement.lease.delivery.attempts + 1 == 1
        assert store.delivery(delivery.seq).attempts == 1

    def test_run_out_when_their_worker_dies(self, store: Log, delivery: Delivery) -> None:
        [lost] = start(store, copy(delivery)).run
        expire(store, delivery.seq)
        recover(store)
        row = store.delivery(delivery.seq)
        assert (row.status, row.takeovers, row.attempts) == ("pending", 1, 0)
        assert store.message(delivery.message.id).status == "pending"
        stale = Outcome(lost, COMPLETED)
        assert store.record(stale) == ([], [stale])
        [taken] = take(store)
        assert taken.to is not None
        assert taken.token > lost.token
        assert len(start(store, copy(taken), worker="host:2").run) == 1

    def test_that_run_out_ten_times_make_a_dead_letter(
        self, store: Log, delivery: Delivery
    ) -> None:
        for _ in range(MAX_TAKEOVERS):
            start(store, copy(delivery))
            expire(store, delivery.seq)
            recover(store)
        row = store.delivery(delivery.seq)
        assert (row.status, row.error_type) == ("failed", "WorkerLost")
        assert row.lease_expires_at is None
        assert take(store) == []

    def test_are_renewed_and_let_go(self, store: Log, delivery: Delivery) -> None:
        [lease] = start(store, copy(delivery)).run
        expire(store, delivery.seq)
        store.do(attempts.hold, [delivery.seq], "host:1", 30.0)
        recover(store)
        assert store.delivery(delivery.seq).status == "processing"
        outcome = Outcome(lease, PENDING, BOOM)
        store.record(outcome)
        store.do(attempts.let_go, [outcome])
        assert store.delivery(delivery.seq).lease_expires_at is None


class TestAdoption:
    def test_a_stranger_becomes_a_message_of_its_own(self, store: Log) -> None:
        mine = store.subscribe()
        stranger = Envelope("", mine.queue, "placed", '{"n":1}')
        leases = [Lease(Delivery(0, mine.id, stranger), 0, handle=n) for n in range(2)]
        adopted = store.do(adoption.adopt, leases, 3)
        assert [each.handle for each in adopted] == [0, 1]
        assert len({each.delivery.message.id for each in adopted}) == 2
        assert all(each.delivery.seq for each in adopted)
        assert store.message(adopted[0].delivery.message.id).payload == '{"n":1}'
        assert len(start(store, *adopted).run) == 2

    def test_one_of_ours_gets_a_further_delivery_once(self, store: Log, delivery: Delivery) -> None:
        late = store.subscribe(subscriber="late.note")
        stranger = Lease(Delivery(0, late.id, delivery.message), 0)
        [adopted] = store.do(adoption.adopt, [stranger], 3)
        [again] = store.do(adoption.adopt, [stranger], 3)
        assert adopted.delivery.seq == again.delivery.seq != delivery.seq
        assert adopted.delivery.message.id == delivery.message.id

    def test_what_has_a_number_is_left_alone(self, store: Log, delivery: Delivery) -> None:
        lease = copy(delivery)
        assert store.do(adoption.adopt, [lease], 3) == [lease]


class TestAnnouncing:
    def test_gets_no_events_before_it_is_active(self, store: Log) -> None:
        mine = store.subscribe()
        wanted = replace(mine, subscriber="late.note", id=0)
        [late] = store.do(subscriptions.announce, [wanted])
        assert [each.subscription_id for each in append(store, event())] == [mine.id]
        store.do(subscriptions.activate, [late])
        ids = [each.subscription_id for each in append(store, event())]
        assert sorted(ids) == sorted([mine.id, late.id])

    def test_does_not_stop_who_is_active(self, store: Log) -> None:
        mine = store.subscribe()
        assert store.do(subscriptions.announce, [replace(mine, id=0)]) == [mine]
        assert len(append(store, event())) == 1
