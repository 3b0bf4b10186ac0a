"""Which subscriptions are taken to get nothing."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import ProviderUnavailableError
from shared.events import watch
from shared.events.carrier import Carrier
from shared.events.commands import Declare, Down, Revive, Stuck, Up
from shared.events.watch import Watch
from shared.settings import load_settings
from shared.types import Delivery, Envelope, Lease, Subscription

MINE = [Subscription("orders", "shop", "placed", f"audit.{n}", id=n) for n in (1, 2)]


def lease(subscription_id: int) -> Lease:
    return Lease(Delivery(7, subscription_id, Envelope("a", "orders", "placed", "{}")), 1)


class TestWatch:
    def test_suspects_whose_oldest_stays_the_same(self) -> None:
        its = Watch()
        assert its.suspects({1: 10, 2: 20}) == set()
        assert its.suspects({1: 10, 2: 21}) == {1}

    def test_knows_who_got_nothing_since_it_was_last_asked(self) -> None:
        its = Watch()
        its.came([lease(2)])
        assert its.idle(MINE) == [1]
        assert its.idle(MINE) == [1, 2]

    def test_waits_longer_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 0.0
        monkeypatch.setattr(watch, "monotonic", lambda: now)
        its, times = Watch(), []
        for now in range(0, 700, 10):
            if its.suspects({1: 10}):
                times.append(now)
        assert times == [10, 20, 40, 80, 160, 320, 640]

    def test_is_over_when_something_comes(self) -> None:
        its = Watch()
        its.is_stuck(MINE)
        its.is_changed = False
        its.came([lease(1)])
        assert (its.stuck, its.is_changed) == ({2}, True)

    def test_is_over_when_nothing_waits_any_more(self) -> None:
        its = Watch()
        its.is_stuck(MINE)
        its.is_changed = False
        its.suspects({1: 10})
        assert (its.stuck, its.is_changed) == ({1}, True)


class Provider:
    """Has nothing, and a reason for it or not."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.connections = 0
        self.paused: set[int] = set()
        self.shared: set[int] = set()

    def initialize(self) -> None:
        if self.connections < 0:
            raise ProviderUnavailableError("away")
        self.connections += 1

    def close(self) -> None: ...

    def declare(self, subscriptions: Any) -> None: ...

    def reserve(self, limits: Any, limit: int) -> list[Lease]:
        return []

    def is_paused(self, subscription: Subscription) -> bool:
        return subscription.id in self.paused

    def shares(self, subscription: Subscription) -> bool:
        return subscription.id in self.shared


class TestCarrier:
    @pytest.fixture
    def provider(self) -> Provider:
        return Provider()

    @pytest.fixture
    def reports(self) -> list[Any]:
        return []

    @pytest.fixture
    def carrier(self, provider: Any, reports: list[Any]) -> Carrier:
        made = Carrier(load_settings({}), provider, reports.append, lambda *_: None)
        made.inbox.send(Declare(MINE, [1, 1], 10))
        made._turn()
        reports.clear()
        return made

    def test_connects_anew_for_whom_nothing_comes(
        self, carrier: Carrier, provider: Provider, reports: list[Any]
    ) -> None:
        carrier.inbox.send(Revive(MINE[:1]))
        carrier._turn()
        assert provider.connections == 2
        assert [type(each) for each in reports] == [Stuck, Up]
        assert reports[0].subscriptions == MINE[:1]

    @pytest.mark.parametrize("reason", ["paused", "shared"])
    def test_leaves_who_has_a_reason(
        self, carrier: Carrier, provider: Provider, reports: list[Any], reason: str
    ) -> None:
        setattr(provider, reason, {1})
        carrier.inbox.send(Revive(MINE[:1]))
        carrier._turn()
        assert (provider.connections, reports) == (1, [])

    def test_says_so_of_all_while_the_provider_is_away(
        self, carrier: Carrier, provider: Provider, reports: list[Any]
    ) -> None:
        provider.connections = -1
        carrier.inbox.send(Revive(MINE))
        carrier._turn()
        carrier.inbox.send(Revive(MINE))
        carrier._turn()
        assert [type(each) for each in reports] == [Stuck, Down, Stuck]
