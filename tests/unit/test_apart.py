"""The pump beside a broker alone: what becomes of outcomes when the log cannot store them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from time import monotonic
from typing import Any
from unittest.mock import Mock

import pytest

from shared.database import CommitUncertainError
from shared.errors import StoreUnavailableError
from shared.events.apart import ApartPump
from shared.events.commands import (
    Append,
    Finish,
    Forget,
    Publish,
    Published,
    Reserved,
    Settle,
    Up,
)
from shared.events.pump import RECONNECT_SECONDS
from shared.native import Mailbox, Promise
from shared.providers import Capabilities
from shared.settings import load_settings
from shared.store import attempts, backlog, log, subscriptions
from shared.store.log import Handover
from shared.types import Delivery, Lease, Outcome, SettleAction, Subscription
from tests.unit.message_log import COMPLETED, Log, event
from tests.unit.test_backlog import expire

HANDED = Handover(backlog.PUBLISH_SECONDS)
FANNED = Handover(backlog.PUBLISH_SECONDS, fans_out=True)


def make_pump(store: Log, provider: Mock) -> Iterator[ApartPump]:
    made = ApartPump(load_settings(store.config), provider, Mailbox(), Mock(), Mock(), Mock())
    made._connect()
    yield made
    made._database.close()
    made._mailbox.close()


@pytest.fixture
def pump(store: Log) -> Iterator[ApartPump]:
    yield from make_pump(store, Mock(capabilities=Capabilities()))


@pytest.fixture
def broker_pump(store: Log) -> Iterator[ApartPump]:
    """One whose provider keeps no leases, and what it tells that is noted."""
    provider = Mock(capabilities=Capabilities(leases_expire=False), longest_lease=1800.0)
    for made in make_pump(store, provider):
        made._tell = Mock()  # type: ignore[method-assign]
        yield made


def settled(pump: ApartPump) -> dict[Any, SettleAction]:
    """Return what became of copies at the provider, by their handles."""
    told = [call.args[0] for call in pump._tell.call_args_list]  # type: ignore[attr-defined]
    found = [x for each in told if isinstance(each, Settle) for x in each.settlements]
    return {each.lease.handle: each.action for each in found}


def forgotten(pump: ApartPump) -> list[Subscription]:
    """Return what it told the provider to forget."""
    told = [call.args[0] for call in pump._tell.call_args_list]  # type: ignore[attr-defined]
    return [x for each in told if isinstance(each, Forget) for x in each.subscriptions]


def completed(store: Log) -> list[Outcome]:
    """Return how the attempts of two deliveries ended, of which the log knows nothing so far."""
    deliveries = store.do(log.append, [event(), event()], 3, handover=HANDED)
    store.do(backlog.published, deliveries)
    fit, _ = store.do(attempts.fit, [Lease(each, 1) for each in deliveries], ())
    return [Outcome(lease, COMPLETED) for lease in fit]


def statuses(store: Log, outcomes: list[Outcome]) -> list[str]:
    return [store.delivery(each.lease.delivery.seq).status for each in outcomes]


def send(pump: ApartPump, *commands: Any) -> None:
    for command in commands:
        pump._mailbox.inbox.send(command)


class TestDispatches:
    def test_of_a_type_that_nobody_wants_any_more_is_finished(
        self, store: Log, pump: ApartPump
    ) -> None:
        """Given that it went out with its COMMIT, since somebody wanted the one before."""

        def dispatch() -> str:
            sent = event()
            send(pump, Append([sent], Promise()))
            pump._turn()
            return str(store.message(sent.id).status)

        assert dispatch() == "completed"
        mine = store.subscribe()
        assert [dispatch(), dispatch()] == ["pending", "pending"]
        store.do(subscriptions.retire, [mine.id])
        assert [dispatch(), dispatch()] == ["completed", "completed"]
        store.subscribe()
        assert dispatch() == "pending"

    @pytest.mark.parametrize("has_turned", [True, False])
    def test_that_are_published_are_noted_before_the_end(
        self, store: Log, pump: ApartPump, has_turned: bool
    ) -> None:
        """Given what the provider took just before: it is in nobody's hands then."""
        store.subscribe()
        [sent] = store.do(log.append, [event()], 3, handover=HANDED)
        send(pump, Published([sent], [], False))
        if has_turned:
            pump._turn()
        assert store.delivery(sent.seq).lease_expires_at is not None
        pump._thread = Mock()

        send(pump, Finish())
        pump._turn()
        pump._end()

        assert store.delivery(sent.seq).lease_expires_at is None


class TestOpening:
    """When the hub may store an event itself: nothing else is to be done, or was to be before."""

    @pytest.fixture
    def resting(self, store: Log) -> Iterator[ApartPump]:
        provider = Mock(capabilities=Capabilities(fans_out=True))
        for made in make_pump(store, provider):
            made._carrier = Mock()
            send(made, Up())
            made._turn()
            while made._has_backlog:
                made._sweep_at = 0.0
                made._turn()
            made._is_resting = True
            yield made

    def test_is_there_while_the_pump_rests(self, resting: ApartPump) -> None:
        resting._setbacks = 3
        opening = resting.opening(event())
        assert opening is not None
        assert opening == (FANNED, 3)

    def test_is_not_before_the_pump_knows_of_all_that_was_dispatched(
        self, resting: ApartPump
    ) -> None:
        """Given one that was interrupted: what it dispatches next must not overtake that."""
        send(resting, Append([event()], Promise()))
        assert resting.opening(event()) is None

    def test_is_not_beside_a_handler(self, store: Log, resting: ApartPump) -> None:
        """P8: it may use the processor without a pause, and what is stored would wait for that."""
        store.subscribe()
        [delivery] = store.do(log.append, [event()], 3, handover=HANDED)
        resting._hand_out([Lease(delivery, 1)])
        assert resting.opening(event()) is None
        resting._ended(Outcome(Lease(delivery, 1), COMPLETED))
        assert resting.opening(event()) is not None

    @pytest.mark.parametrize(
        "change",
        [
            {"_is_resting": False},
            {"_is_up": False},
            {"_has_backlog": True},
            {"_connected": False},
            {"_trouble": "away"},
        ],
    )
    def test_is_not_otherwise(self, resting: ApartPump, change: dict[str, Any]) -> None:
        for name, value in change.items():
            setattr(resting, name, value)
        assert resting.opening(event()) is None

    def test_is_not_for_what_may_have_no_subscription(self, store: Log, pump: ApartPump) -> None:
        """Given a provider that gets nothing without one: it takes another statement."""
        pump._is_resting, pump._is_up, pump._has_backlog = True, True, False
        one = event()
        assert pump.opening(one) is None
        pump._wanted.add((one.queue, one.type))
        assert pump.opening(one) is not None
        pump.is_unwanted(one)
        assert pump.opening(one) is None


class TestRetired:
    def test_are_forgotten_once_the_provider_is_there_but_for_who_came_back(
        self, store: Log, broker_pump: ApartPump
    ) -> None:
        """Given two that were retired while the broker was down, and one that works again."""
        gone, back = store.subscribe(), store.subscribe(subscriber="other.note")
        store.do(subscriptions.retire, [gone.id, back.id])
        send(broker_pump, Forget([gone, back]))
        broker_pump._turn()
        assert forgotten(broker_pump) == []

        store.subscribe(subscriber="other.note")
        send(broker_pump, Up())
        broker_pump._turn()
        broker_pump._turn()

        assert forgotten(broker_pump) == [gone]


class TestOutcomes:
    def test_that_gather_outlast_a_turn_that_fails(
        self, store: Log, pump: ApartPump, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a database that goes away while something else is stored."""
        store.subscribe()
        outcomes = completed(store)
        [other] = store.do(log.append, [event()], 3, handover=HANDED)
        with monkeypatch.context() as patch:
            patch.setattr(pump._database, "run", Mock(side_effect=StoreUnavailableError("away")))
            send(pump, Published([other], [], False))
            pump._turn()
            pump._publish_at = 0.0
            send(pump, *outcomes)
            pump._turn()
        assert statuses(store, outcomes) == ["pending", "pending"]

        pump._store_at = 0.0
        pump._turn()

        assert statuses(store, outcomes) == ["completed", "completed"]

    def test_that_are_stored_singly_are_stored_all(
        self, store: Log, pump: ApartPump, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a database that takes them one by one alone, and time for more to gather."""
        store.subscribe()
        outcomes = completed(store)
        run = pump._database.run

        def run_one(step: Any, **options: Any) -> Any:
            if len(step.args[0].outcomes) > 1:
                raise ValueError("too many")
            return run(step, **options)

        monkeypatch.setattr(pump._database, "run", run_one)
        send(pump, *outcomes)
        turn, _ = pump._take()
        turn.outcomes, pump._unsaved = turn.outcomes or pump._unsaved, []
        pump._do_together_or_singly(turn)

        assert statuses(store, outcomes) == ["completed", "completed"]


class TestALogThatIsAway:
    def test_is_tried_now_and_then_whatever_is_due(
        self, store: Log, pump: ApartPump, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a sign of life, a sweep and more that nobody can see to meanwhile."""
        pump._mine = [store.subscribe()]
        [sent] = store.do(log.append, [event()], 3, handover=HANDED)
        away = Mock(side_effect=StoreUnavailableError("away"))
        with monkeypatch.context() as patch:
            patch.setattr(pump, "_prepare_tables", away)
            patch.setattr(pump._database, "run", away)
            patch.setattr(pump._database, "read", away)
            send(pump, Published([sent], [], False))
            for _ in range(2):
                pump._sign_at = pump._sweep_at = pump._publish_at = 0.0
                pump._turn()
                assert pump._next_timer() - monotonic() > RECONNECT_SECONDS / 2
        pump._turn()
        assert store.delivery(sent.seq).lease_expires_at is None


class TestBacklog:
    def test_that_was_taken_perhaps_is_given_back(
        self, store: Log, broker_pump: ApartPump, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a COMMIT whose answer is lost: nobody else would publish it for long."""
        store.subscribe()
        [delivery] = store.do(log.append, [event()], 3, handover=Handover(is_open=True))
        broker_pump._is_up = True
        run = broker_pump._database.run

        def lose_one_answer(*args: Any, **options: Any) -> None:
            monkeypatch.setattr(broker_pump._database, "run", run)
            run(*args, **options)
            raise CommitUncertainError("lost")

        monkeypatch.setattr(broker_pump._database, "run", lose_one_answer)
        broker_pump._turn()
        assert not store.delivery(delivery.seq).ready

        broker_pump._turn()
        broker_pump._turn()

        told = [call.args[0] for call in broker_pump._tell.call_args_list]  # type: ignore[attr-defined]
        published = [x.seq for each in told if isinstance(each, Publish) for x in each.deliveries]
        assert published == [delivery.seq]

    @pytest.mark.parametrize("fans_out", [True, False])
    def test_of_what_a_lost_commit_stored_comes_to_an_end(
        self, store: Log, broker_pump: ApartPump, fans_out: bool
    ) -> None:
        """Given a provider that publishes what no subscription wants, and one that does not."""
        provider: Any = broker_pump._provider
        provider.capabilities = Capabilities(leases_expire=False, fans_out=fans_out)
        store.subscribe()
        [delivery] = store.do(log.append, [event()], 3, handover=HANDED)
        broker_pump._is_up = True
        store.do(broker_pump._take_back, [delivery.message.id])

        broker_pump._turn()
        send(broker_pump, Published([delivery], [], is_backlog=True))
        broker_pump._turn()
        broker_pump._turn()

        assert broker_pump._is_direct
        assert broker_pump._sweep_at > monotonic()


class TestStrays:
    """Given what is published and no queue gets, though a subscription wants it."""

    @staticmethod
    def published(pump: ApartPump) -> list[Publish]:
        told = [call.args[0] for call in pump._tell.call_args_list]  # type: ignore[attr-defined]
        return [each for each in told if isinstance(each, Publish)]

    @pytest.fixture
    def fanning(self, broker_pump: ApartPump) -> ApartPump:
        broker_pump._provider.capabilities = Capabilities(leases_expire=False, fans_out=True)
        return broker_pump

    def test_go_to_their_queues_alone_and_once(self, store: Log, fanning: ApartPump) -> None:
        mine = store.subscribe()
        events = [event(), event("other")]
        [sent, unwanted] = store.do(log.append, events, 3, handover=FANNED)
        send(fanning, Published([sent, unwanted], [sent, unwanted], is_backlog=False))
        fanning._turn()

        [stray] = self.published(fanning)
        assert (stray.deliveries, stray.is_stray) == ([replace(sent, to=mine)], True)

        send(fanning, Published(stray.deliveries, stray.deliveries, is_backlog=False))
        fanning._turn()
        assert self.published(fanning) == [stray]
        assert store.delivery(sent.seq).lease_expires_at is not None

    def test_outlast_a_log_that_is_away(
        self, store: Log, fanning: ApartPump, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store.subscribe()
        [sent] = store.do(log.append, [event()], 3, handover=HANDED)
        with monkeypatch.context() as patch:
            patch.setattr(fanning._database, "run", Mock(side_effect=StoreUnavailableError("away")))
            send(fanning, Published([sent], [sent], is_backlog=False))
            fanning._turn()
        assert self.published(fanning) == []

        fanning._turn()
        assert [each.is_stray for each in self.published(fanning)] == [True]

    def test_of_the_last_moment_are_left_to_others(self, store: Log, fanning: ApartPump) -> None:
        store.subscribe()
        [sent] = store.do(log.append, [event()], 3, handover=HANDED)
        fanning._thread = Mock()
        send(fanning, Finish())
        fanning._turn()
        send(fanning, Published([sent], [sent], is_backlog=False))
        fanning._end()

        assert store.delivery(sent.seq).ready

    def test_wake_who_sees_to_them(self, fanning: ApartPump) -> None:
        inbox = fanning._mailbox.inbox
        fanning._report(Published([Delivery(0, 0, event())], [Delivery(0, 0, event())], False))
        assert inbox.has_quiet()
        inbox.take()
        stray = Delivery(1, 1, event())
        fanning._report(Published([stray], [stray], is_backlog=False))
        assert not inbox.has_quiet()


class TestLimits:
    def test_count_nothing_that_is_not_to_run(
        self, store: Log, pump: ApartPump, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Given a delivery whose outcome is stored, that its provider hands out once more."""
        subscription = store.subscribe()
        outcomes = completed(store)
        send(pump, *outcomes)
        pump._turn()
        pump._store_at = 0.0
        pump._turn()
        pump._gate.limited = {subscription.id}
        ended = Mock()
        monkeypatch.setattr(pump._gate, "ended", ended)

        send(pump, Reserved([replace(outcomes[0].lease, redelivered=True)]))
        pump._turn()

        [[leases], _] = ended.call_args
        assert [each.delivery.seq for each in leases] == [outcomes[0].lease.delivery.seq]


class TestWhatWasLost:
    """Given a lease in the log that ran out, while its worker was frozen and its broker waited."""

    @staticmethod
    def end(pump: ApartPump, outcome: Outcome) -> list[SettleAction]:
        """Have an attempt end; return what becomes of its copy."""
        send(pump, outcome)
        pump._turn()
        pump._store_at = 0.0
        pump._turn()
        return list(settled(pump).values())

    def test_is_dropped_where_another_worker_has_a_copy(
        self, store: Log, broker_pump: ApartPump
    ) -> None:
        store.subscribe()
        [first, _] = completed(store)
        copy = replace(first.lease, token=0, handle="copy")
        store.do(attempts.start, [copy], "another", held_for=30.0)

        assert self.end(broker_pump, first) == [SettleAction.ACKNOWLEDGE]
        assert store.delivery(first.lease.delivery.seq).worker == "another"

    def test_is_dropped_where_a_copy_is_to_be_published(
        self, store: Log, broker_pump: ApartPump
    ) -> None:
        store.subscribe()
        [first, _] = completed(store)
        store.do(attempts.begin, [first.lease], "frozen", 30.0)
        expire(store, first.lease.delivery.seq)
        store.do(backlog.recover)

        assert self.end(broker_pump, first) == [SettleAction.ACKNOWLEDGE]

    def test_comes_again_where_the_log_does_not_have_it(
        self, store: Log, broker_pump: ApartPump
    ) -> None:
        store.subscribe()
        [first, _] = completed(store)
        copy = replace(first.lease, token=0, handle="copy")
        store.do(attempts.start, [copy], "another", held_for=0.0)

        assert self.end(broker_pump, first) == [SettleAction.RELEASE]


class TestWhatComesAgain:
    """Given a broker that closes the connection, and gives what was unsettled once more."""

    @pytest.mark.parametrize("redelivered", [True, False])
    def test_while_its_outcome_gathers_is_settled_and_does_not_run(
        self, store: Log, broker_pump: ApartPump, redelivered: bool
    ) -> None:
        store.subscribe()
        [first, other] = completed(store)
        broker_pump._hand_out([first.lease])
        send(broker_pump, first)
        broker_pump._turn()
        broker_pump._store_at = inf
        again = replace(first.lease, token=0, redelivered=redelivered, handle="again")
        fresh = replace(other.lease, token=0)
        send(broker_pump, Reserved([fresh, again]))
        broker_pump._turn()

        assert [lease.delivery.seq for lease in broker_pump._active.values()] == [
            fresh.delivery.seq
        ]
        assert statuses(store, [first]) == ["completed"]
        assert settled(broker_pump)["again"] == SettleAction.ACKNOWLEDGE
