"""What a pump may reserve of subscriptions with limits, without its threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest

from shared.events import gate as module
from shared.events.commands import Allow, Append, Consume
from shared.events.gate import LATE_SECONDS, LOOK_SECONDS, ApartGate
from shared.events.joined import JoinedPump
from shared.native import Mailbox, Promise
from shared.providers import make_provider
from shared.settings import load_settings
from shared.store import limits
from shared.store.limits import Ask, Grant, Limits, Others
from shared.tables import deliveries, permits
from shared.types import Delivery, Lease, Outcome, Subscription
from tests.unit.message_log import COMPLETED, Log, event

LEASE = 30.0
ID = 7


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Given a time that stands still: its one item."""
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def gate(clock: list[float]) -> ApartGate:
    return ApartGate(LEASE)


def grant(target: int, tokens: float = 0.0, **wanted: Any) -> Grant:
    its = Limits(**wanted or {"concurrency": 5})
    at: Any = None
    return Grant(ID, its, 0, target, target, tokens, at, Others(), (0, 0, 0.0), True, False)


def open_gate(gate: ApartGate, batch: int = 1) -> None:
    """Have it hear of limits, and the carrier answer."""
    allow = gate.hear_for({ID}, {ID: batch})
    assert allow is not None
    gate.answered(allow.number)


def ask(gate: ApartGate, room: int = 10, *, is_able: bool = True, held: int = 0) -> list[Ask]:
    return gate.asks({ID: held}, room, is_able)


def get(gate: ApartGate, asks: list[Ask], target: int) -> Allow | None:
    return gate.granted(asks, {ID: grant(target)}, 100.0)


def took(gate: ApartGate, count: int) -> None:
    gate.took([Lease(Delivery(seq, ID, event()), 1) for seq in range(count)])


class TestHearing:
    def test_closes_before_anything_is_asked(self, gate: ApartGate) -> None:
        allow = gate.hear_for({ID}, {ID: 1})
        assert allow is not None
        assert allow.credits[ID].total == 0
        assert ask(gate) == []
        # reserved before the carrier heard of it, and counted nowhere there
        took(gate, 3)
        gate.answered(allow.number)
        [asked] = ask(gate, held=3)
        assert (asked.held, asked.spare, asked.used, asked.want) == (3, 0, 0, 1)
        told = get(gate, [asked], 1)
        assert told is not None
        assert told.credits[ID].total == 1

    def test_of_the_end_opens(self, gate: ApartGate) -> None:
        open_gate(gate)
        assert gate.hear_for(set(), {}) == Allow({}, 0)
        assert ask(gate) == []
        assert gate.ask_at == gate.renew_at == math.inf

    def test_of_nothing_tells_nothing(self, gate: ApartGate) -> None:
        assert gate.hear_for(set(), {ID: 1}) is None
        assert gate.next_at(10) == 100.0 + LOOK_SECONDS

    def test_is_done_again_for_another_carrier(self, gate: ApartGate) -> None:
        open_gate(gate)
        get(gate, ask(gate), 1)
        allow = gate.reset()
        assert allow is not None
        assert allow.credits[ID].total == 0
        assert ask(gate) == []


class TestAsking:
    def test_is_for_more_each_time_that_all_is_used(self, gate: ApartGate) -> None:
        open_gate(gate)
        wants = []
        for used in (0, 1, 2, 4):
            took(gate, used)
            asks = ask(gate, room=5)
            wants += [each.want for each in asks]
            get(gate, asks, asks[0].want)
        assert wants == [1, 2, 4, 5]

    def test_is_for_a_batch_at_least(self, gate: ApartGate) -> None:
        open_gate(gate, batch=20)
        assert ask(gate)[0].want == 20

    def test_is_not_done_without_a_reason(self, gate: ApartGate, clock: list[float]) -> None:
        open_gate(gate)
        get(gate, ask(gate), 1)
        assert ask(gate) == []
        assert gate.next_at(10) == 100.0 + LOOK_SECONDS
        clock[0] += LEASE / 3
        [renewal] = ask(gate)
        assert (renewal.spare, renewal.want) == (1, 1)

    def test_is_done_again_when_the_next_token_is_due(
        self, gate: ApartGate, clock: list[float]
    ) -> None:
        open_gate(gate)
        gate.granted(ask(gate), {ID: grant(0, 0.5, rate=2.0)}, 100.0)
        assert ask(gate) == []
        assert gate.next_at(10) == pytest.approx(100.25)
        clock[0] = 100.25
        assert ask(gate)[0].want == 1

    def test_is_done_once_while_its_answer_is_lost(self, gate: ApartGate) -> None:
        """Given a database that went away in between."""
        open_gate(gate)
        assert ask(gate) == ask(gate) != []

    def test_gives_told_numbers_a_time(self, gate: ApartGate) -> None:
        open_gate(gate)
        told = get(gate, ask(gate), 1)
        assert told is not None
        assert 100 < told.credits[ID].until < 100 + LEASE


class TestGivingBack:
    def give_back(self, gate: ApartGate, **options: Any) -> None:
        """Check that what is spare is asked for back, and noted as gone once that is answered."""
        asks = ask(gate, **options)
        assert [(each.spare, each.want) for each in asks] == [(1, 0)]
        told = get(gate, asks, 0)
        assert told is not None
        assert (told.credits[ID].total, bool(told.number)) == (0, True)
        assert ask(gate, **options) == []
        gate.answered(told.number)
        [asked] = ask(gate, **options)
        assert (asked.spare, asked.want) == (0, 0)
        get(gate, [asked], 0)
        assert ask(gate, **options) == []

    @pytest.fixture
    def having(self, gate: ApartGate, clock: list[float]) -> ApartGate:
        open_gate(gate)
        gate.ended([])
        get(gate, ask(gate), 1)
        return gate

    def test_comes_when_no_worker_was_free_for_long(
        self, having: ApartGate, clock: list[float]
    ) -> None:
        assert ask(having, room=0) == []
        assert having.next_at(0) == 100.0 + LATE_SECONDS
        clock[0] += LATE_SECONDS
        self.give_back(having, room=0)
        # until one is
        having.ended([])
        [asked] = ask(having, room=1)
        assert asked.want == 1

    def test_comes_when_the_provider_is_away(self, having: ApartGate) -> None:
        self.give_back(having, is_able=False)
        having.rouse()
        [asked] = ask(having)
        assert asked.want == 1

    def test_counts_what_was_reserved_meanwhile(self, having: ApartGate) -> None:
        asks = ask(having, is_able=False)
        told = get(having, asks, 0)
        assert told is not None
        took(having, 1)
        having.answered(told.number)
        [asked] = ask(having, held=1, is_able=False)
        assert (asked.held, asked.spare, asked.used) == (1, 0, 1)

    def test_is_seen_by_the_watch(self, having: ApartGate) -> None:
        assert not having.may_wait(ID)
        took(having, 1)
        assert having.may_wait(ID)
        assert not having.may_wait(99)


class Joined:
    """A pump that joins the log, turned by hand."""

    def __init__(self, store: Log) -> None:
        settings = load_settings(store.config)
        self.store = store
        self.mailbox = Mailbox()
        self.leases: list[Lease] = []
        self.pump = JoinedPump(
            settings, make_provider(settings), self.mailbox, self.leases.extend, Mock(), Mock()
        )
        # what is for the hub is done at once
        self.mailbox.answer = lambda callback, *args: callback(*args)  # type: ignore[method-assign]

    def send(self, *commands: Any) -> None:
        for each in commands:
            self.mailbox.inbox.send(each)
        self.pump._turn()

    def consume(self, *types: str, batch: int = 1) -> None:
        wanted = [Subscription("orders", "shop", each, "audit.note") for each in types]
        self.send(Consume(wanted, [batch] * len(wanted), 10, Mock()))

    def dispatch(self, count: int, event_type: str = "placed") -> None:
        promise = Mock(spec=Promise)
        self.send(Append([event(event_type) for _ in range(count)], promise))

    def end(self, count: int) -> None:
        ended, self.leases[:] = self.leases[:count], self.leases[count:]
        self.send(*[Outcome(each, COMPLETED) for each in ended])

    def close(self) -> None:
        self.pump._close()
        self.pump._database.close()
        self.mailbox.close()


@pytest.fixture
def joined(store: Log) -> Iterator[Joined]:
    made = Joined(store)
    yield made
    made.close()


class TestJoined:
    def limit(self, joined: Joined, **wanted: Any) -> None:
        for each in joined.pump._mine:
            joined.store.do(limits.change, each.id, Limits(**wanted))
        joined.pump._gate.look_at = 0.0

    def test_without_limits_asks_nothing(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        joined.consume("placed")
        for name in ("limited", "ask", "keep"):
            monkeypatch.setattr(limits, name, Mock(side_effect=AssertionError(name)))
        joined.pump._gate.look_at = math.inf
        joined.dispatch(5)
        joined.end(5)
        assert joined.leases == []
        assert {row.status for row in joined.store.rows(deliveries)} == {"completed"}

    def test_reserves_what_is_allowed_and_no_more(self, joined: Joined) -> None:
        joined.consume("placed")
        self.limit(joined, concurrency=2)
        joined.dispatch(5)
        assert len(joined.leases) == 2
        joined.end(1)
        assert len(joined.leases) == 2
        [row] = joined.store.rows(permits)
        assert (row.held, row.spare) == (2, 0)
        joined.end(2)
        joined.end(2)
        assert joined.leases == []
        assert joined.store.rows(permits) == []

    def test_gives_each_its_own(self, joined: Joined) -> None:
        joined.consume("placed", "paid")
        self.limit(joined, concurrency=2)
        joined.pump._workers = 0
        joined.dispatch(3)
        joined.dispatch(3, "paid")
        joined.pump._workers = 10
        joined.send()
        assert len(joined.leases) == 4

    def test_counts_each_delivery_of_a_batch(self, joined: Joined) -> None:
        joined.consume("placed", batch=5)
        self.limit(joined, concurrency=3, rate=0.01, burst=4)
        joined.dispatch(9)
        assert len(joined.leases) == 3
        joined.end(3)
        assert len(joined.leases) == 1

    def test_notes_what_was_in_hand_before(self, joined: Joined) -> None:
        joined.consume("placed")
        joined.dispatch(12)
        assert len(joined.leases) == 10
        self.limit(joined, concurrency=2)
        joined.send()
        # though no worker is free, and so nothing is to be reserved
        assert [row.held for row in joined.store.rows(permits)] == [10]
        joined.end(8)
        assert len(joined.leases) == 2
        joined.end(1)
        assert len(joined.leases) == 2

    def test_wakes_when_the_next_token_is_due(self, joined: Joined) -> None:
        joined.consume("placed")
        self.limit(joined, rate=2.0, burst=1)
        joined.dispatch(3)
        assert len(joined.leases) == 1
        due = joined.pump._next_timer() - module.monotonic()
        assert 0.3 < due <= 0.5

    def test_sleeps_when_there_is_nothing_to_wait_for(self, joined: Joined) -> None:
        joined.consume("placed")
        self.limit(joined, rate=2.0, burst=5, concurrency=1)
        joined.dispatch(1)
        joined.end(1)
        joined.send()
        assert joined.pump._next_timer() - module.monotonic() > 1

    def test_wakes_others_when_none_took_the_place(
        self, joined: Joined, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        joined.consume("placed")
        self.limit(joined, concurrency=1)
        joined.dispatch(2)
        woken: list[Any] = []
        monkeypatch.setattr(joined.pump._provider, "published", woken.append)
        joined.end(1)
        assert woken == []  # the next one took it
        joined.end(1)
        assert len(woken) == 1

    def test_goes_on_at_once_when_the_limit_is_removed(self, joined: Joined) -> None:
        joined.consume("placed")
        self.limit(joined, concurrency=1)
        joined.dispatch(5)
        assert len(joined.leases) == 1
        self.limit(joined)
        joined.send()
        assert len(joined.leases) == 5

    def test_leaves_nothing_behind(self, joined: Joined) -> None:
        joined.consume("placed")
        self.limit(joined, concurrency=1)
        joined.dispatch(2)
        joined.pump._end()
        assert joined.store.rows(permits) == []
