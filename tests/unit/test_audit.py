"""What an audit finds in the message log, and how it puts it right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import update

from shared.events.audit import Audit, Counting, Findings, Lack
from shared.lifecycle import DeliveryStatus
from shared.providers import Capabilities, SubscriptionStats
from shared.settings import load_settings
from shared.store import audit, backlog, subscriptions
from shared.store.audit import Entry
from shared.store.why import Provider, why
from shared.tables import deliveries, messages
from shared.types import Delivery, Subscription
from tests.unit.message_log import COMPLETED, FAILED, PENDING, PROCESSING, RETRY, Log, event
from tests.unit.test_backlog import append, copy, start


@pytest.fixture
def embedded(store: Log) -> Iterator[Audit]:
    made = Audit(load_settings(store.config))
    yield made
    made.close()


def ready(store: Log, *made: Delivery) -> None:
    """Have the provider in the log have them."""
    store.do(_set, [each.seq for each in made], {"ready": True})


def _set(tx: Any, seqs: list[int], values: dict[str, Any]) -> None:
    tx.connection.execute(update(deliveries).where(deliveries.c.seq.in_(seqs)).values(**values))


def elsewhere(store: Log, *, is_joined: bool = False) -> list[int]:
    found = store.do(lambda tx: audit.elsewhere(tx.connection, is_joined=is_joined))
    return [each.seq for each in found]


def reasons(store: Log, made: Delivery) -> list[str]:
    """Say why a message is where it is, as the log knows it."""
    provider = Provider("embedded", is_up=True, joins_log=True)
    found = store.do(lambda tx: why(tx.connection, made.message.id, tx.now, provider))
    return [each["reason"] for each in found["reasons"]]


class TestAccounts:
    def test_say_what_became_of_all_that_was_dispatched(self, store: Log) -> None:
        store.subscribe()
        store.subscribe("cancelled", "idle.note")
        made = store.append(*[event() for _ in range(5)])
        ready(store, *made)
        store.attempt(made[0], COMPLETED)
        store.attempt(made[1], FAILED)
        store.attempt(made[2], RETRY)
        [idle, busy] = store.do(lambda tx: audit.accounts(tx.connection))
        assert busy[2:] == (5, 1, 1, 0, 3, 3, 0)
        assert busy.dispatched == busy.completed + busy.dead + busy.discarded + busy.waiting
        assert idle[2:] == (0, 0, 0, 0, 0, 0, 0)

    def test_count_what_was_discarded(self, store: Log) -> None:
        mine = store.subscribe()
        store.append(event())
        store.do(subscriptions.retire, [mine.id])
        [its] = store.do(lambda tx: audit.accounts(tx.connection))
        assert (its.is_retired, its.dispatched, its.discarded, its.waiting) == (True, 1, 1, 0)


class TestElsewhere:
    def test_is_what_a_broker_has(self, store: Log) -> None:
        store.subscribe()
        published, in_hand, given_back = append(store, event(), event(), event())
        store.do(backlog.published, [published])
        store.do(backlog.give_back, [given_back])
        assert elsewhere(store) == [published.seq]
        assert in_hand.seq

    def test_is_not_what_the_log_leases(self, store: Log) -> None:
        store.subscribe()
        [made] = append(store, event())
        store.do(backlog.published, [made])
        start(store, copy(made))
        assert elsewhere(store) == []

    def test_is_nothing_of_who_is_retired(self, store: Log) -> None:
        mine = store.subscribe()
        [made] = append(store, event())
        store.do(backlog.published, [made])
        store.do(subscriptions.retire, [mine.id])
        store.do(_set, [made.seq], {"status": "pending"})
        assert elsewhere(store) == []


class TestRepair:
    def test_has_what_waits_published_again_at_its_time(self, store: Log) -> None:
        store.subscribe()
        made = append(store, event(), event(delay=60.0))
        store.do(backlog.published, made)
        store.do(audit.give_back, [each.seq for each in made], 30.0)
        at_once, later = store.do(backlog.take)
        assert at_once.delay == 0
        assert 55 < later.delay <= 60

    def test_leases_what_runs_to_its_worker(self, store: Log) -> None:
        store.subscribe()
        [made] = append(store, event())
        store.do(backlog.published, [made])
        start(store, copy(made))
        store.do(_set, [made.seq], {"lease_expires_at": None})
        assert elsewhere(store) == [made.seq]
        store.do(audit.give_back, [made.seq], 30.0)
        row = store.delivery(made.seq)
        assert (row.status, bool(row.ready)) == (PROCESSING, False)
        assert row.lease_expires_at is not None

    def test_leaves_what_moved_meanwhile(self, store: Log) -> None:
        store.subscribe()
        [made] = append(store, event())
        store.do(audit.give_back, [made.seq], 30.0)
        assert not store.delivery(made.seq).ready


class TestOnEmbedded:
    def test_what_waits_or_runs_is_in_order(self, store: Log, embedded: Audit) -> None:
        store.subscribe()
        made = store.append(event(), event(), event(delay=60.0))
        ready(store, *made[:2])
        assert embedded.look().are_none

    def test_finds_what_nobody_would_ever_reserve(self, store: Log, embedded: Audit) -> None:
        """Given what a broker had that was the provider before."""
        mine = store.subscribe()
        made = store.append(event(), event())
        ready(store, made[0])
        found = embedded.look()
        assert found.lack.counts == {mine.id: 1}
        embedded.repair(found)
        assert store.delivery(made[1].seq).ready
        assert embedded.look().are_none

    @pytest.mark.parametrize("wrong", [PROCESSING, COMPLETED, FAILED])
    def test_draws_wrong_statuses_of_messages_anew(
        self, store: Log, embedded: Audit, wrong: DeliveryStatus
    ) -> None:
        store.subscribe()
        envelope = event()
        ready(store, *store.append(envelope))

        def spoil(tx: Any) -> None:
            its = messages.c.id == envelope.id
            values = {"status": wrong, "processed_at": tx.now}
            tx.connection.execute(update(messages).where(its).values(**values))

        store.do(spoil)
        found = embedded.look()
        assert found.misdrawn == {envelope.id}
        embedded.repair(found)
        assert store.message(envelope.id).status == PENDING
        assert embedded.look().are_none

    def test_draws_what_is_done_anew(self, store: Log, embedded: Audit) -> None:
        store.subscribe()
        envelope = event()
        [made] = store.append(envelope)
        ready(store, made)
        store.attempt(made, COMPLETED)
        its = messages.c.id == envelope.id
        store.do(lambda tx: tx.connection.execute(update(messages).where(its).values(status=RETRY)))
        found = embedded.look()
        assert found.misdrawn == {envelope.id}
        embedded.repair(found)
        assert store.message(envelope.id).status == COMPLETED


class TestOrphans:
    def test_are_found_and_discarded(self, store: Log, embedded: Audit) -> None:
        """Given what was added by who did not see yet that its subscription was retired."""
        mine, other = store.subscribe(), store.subscribe(subscriber="other.note")
        late, kept = store.append(event())
        assert (late.subscription_id, kept.subscription_id) == (mine.id, other.id)
        ready(store, late, kept)
        store.do(subscriptions.end, [mine.id])
        found = embedded.look()
        assert str(found) == "1 open deliveries of retired subscriptions"
        assert not found.are_none
        assert reasons(store, late) == ["retired", "next"]
        embedded.repair(found)
        assert embedded.look().are_none
        assert reasons(store, late) == ["discarded", "next"]
        assert [store.delivery(x.seq).status for x in (late, kept)] == ["discarded", "pending"]

    def test_are_none_when_they_are_discarded_next(
        self, store: Log, embedded: Audit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mine = store.subscribe()
        store.append(event())
        store.do(subscriptions.end, [mine.id])
        discard = partial(store.do, subscriptions.discard, [mine.id])
        monkeypatch.setattr("shared.events.audit.sleep", lambda _: discard())
        assert embedded.look().are_none


class TestOfWhatABrokerLists:
    def test_leaves_who_is_retired_just_now(
        self, store: Log, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a subscription that goes after its deliveries were read."""
        mine = store.subscribe()
        [made] = append(store, event())
        store.do(backlog.published, [made])
        monkeypatch.setattr("shared.events.audit.make_provider", lambda _: Lister())
        audited = Audit(load_settings(store.config))
        read = audited._elsewhere

        def read_and_retire() -> list[Entry]:
            found = read()
            store.do(subscriptions.retire, [mine.id])
            return found

        monkeypatch.setattr(audited, "_elsewhere", read_and_retire)
        try:
            assert audited.look().are_none
        finally:
            audited.close()


class Lister:
    """Has nothing, and says so."""

    capabilities = Capabilities(lists=True)

    def initialize(self) -> None:
        pass

    def holds(self, _subscription: Subscription, _seqs: Sequence[int]) -> set[int]:
        return set()

    def close(self) -> None:
        pass


class Broker:
    """Counts what it has."""

    capabilities = Capabilities(counts_all=False, leases_expire=False)

    def __init__(self, ready: int, delayed: int = 0, *, is_shared: bool = False) -> None:
        self.ready = ready
        self.delayed = delayed
        self.is_shared = is_shared

    def get_queue_stats(self, its: Sequence[Subscription]) -> list[SubscriptionStats]:
        return [SubscriptionStats(each.subscriber, self.ready, None, None, 0) for each in its]

    def count_delayed(self) -> int:
        return self.delayed

    def shares(self, _subscription: Subscription) -> bool:
        return self.is_shared


class TestCounting:
    """Given three deliveries that are due, and one of each of two messages that are not."""

    NOW = datetime(2026, 1, 1)
    KNOWN = Subscription("orders", "shop", "placed", "audit.note", id=1)
    ENTRIES = tuple(
        Entry(seq, 1, f"m{seq}", "pending", 0, 0, due)
        for seq, due in enumerate(
            [None, None, NOW - timedelta(seconds=9), *[NOW + timedelta(seconds=9)] * 2]
        )
    )

    def ask(self, broker: Any, *, reliable: bool = True) -> Lack:
        known = {1: replace(self.KNOWN, reliable=reliable)}
        return Counting(broker, known, lambda: self.NOW).ask(self.ENTRIES)(self.ENTRIES)

    def test_misses_nothing_where_the_counts_are_right(self) -> None:
        assert self.ask(Broker(3, 2)).suspects == set()
        assert self.ask(Broker(300, 200)).suspects == set()

    def test_suspects_all_of_which_some_are_missing(self) -> None:
        lack = self.ask(Broker(1, 2))
        assert (lack.counts[1], lack.suspects) == (2, {0, 1, 2})

    def test_counts_what_is_delayed_apart(self) -> None:
        lack = self.ask(Broker(3, 1))
        assert (lack.counts[1], lack.suspects) == (1, {3, 4})

    def test_says_nothing_of_what_others_may_have_taken(self) -> None:
        assert self.ask(Broker(0, is_shared=True)).suspects == set()
        assert self.ask(Broker(0), reliable=False).suspects == set()

    def test_is_no_verdict_on_what_is_left_alone(self) -> None:
        """Given three queues for which something waits, of which two are not counted."""
        found = Findings(held={1: 3, 2: None, 3: None})
        assert found.are_none
        but = ", but for what waits in 2 queues that are left alone"
        assert str(found) == f"every delivery is accounted for{but}"

    def test_leaves_what_moved_meanwhile(self) -> None:
        answer = Counting(Broker(1, 2), {1: self.KNOWN}, lambda: self.NOW).ask(self.ENTRIES)
        assert answer(self.ENTRIES[1:]).counts[1] == 1
        assert answer(self.ENTRIES[2:]).suspects == set()
