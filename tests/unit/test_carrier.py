"""The carrier alone, with a clock and a provider of the test's."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from shared.errors import ProviderUnavailableError
from shared.events import carrier as module
from shared.events.carrier import GATHER_SECONDS, RECONNECT_SECONDS, Carrier
from shared.events.commands import (
    Allow,
    Allowed,
    Credit,
    Declare,
    Forget,
    Publish,
    Unpublished,
)
from shared.settings import load_settings
from shared.types import Delivery, Lease, Subscription
from tests.unit.message_log import event


@pytest.fixture
def provider() -> Any:
    made = Mock()
    made.publish.return_value = []
    made.notices = []
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Given a time that stands still: its one item."""
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def carrier(provider: Any, clock: list[float]) -> Carrier:
    made = Carrier(load_settings({}), provider, Mock(), Mock())
    made._turn()
    return made


def publish(carrier: Carrier) -> list[Delivery]:
    deliveries = [Delivery(1, 1, event())]
    carrier.inbox.send(Publish(deliveries))
    carrier._turn()
    return deliveries


class TestGathering:
    def test_ends_with_a_publication(
        self, carrier: Carrier, provider: Any, clock: list[float]
    ) -> None:
        """Given something that gathers, whose time is over before the thread would wait."""
        publish(carrier)
        provider.publish.reset_mock()
        gathered = publish(carrier)
        assert not provider.publish.called
        clock[0] += GATHER_SECONDS

        carrier._wait()
        carrier._turn()

        assert not provider.wait.called
        provider.publish.assert_called_once_with(gathered)

    def test_of_nothing_waits_for_the_provider(self, carrier: Carrier, provider: Any) -> None:
        publish(carrier)
        carrier._wait()
        assert provider.wait.called


class TestOrder:
    def test_what_was_decided_before_a_setback_was_known_waits_for_what_came_back(
        self, carrier: Carrier, provider: Any, clock: list[float]
    ) -> None:
        """Given a pump that heard so late that the broker is there again by then."""
        report = carrier._report = Mock()
        provider.publish.side_effect = ProviderUnavailableError("gone")
        [older] = publish(carrier)
        provider.publish.side_effect = None
        clock[0] += RECONNECT_SECONDS
        carrier._turn()
        newer, newest = Delivery(2, 1, event()), Delivery(3, 1, event())

        carrier.inbox.send(Publish([newer], setbacks=0))
        carrier._turn()
        carrier.inbox.send(Publish([newest], setbacks=2))
        carrier._turn()

        said = [call.args[0] for call in report.call_args_list]
        back = [(each.deliveries, each.setbacks) for each in said if isinstance(each, Unpublished)]
        assert back == [([older], 1), ([newer], 2)]
        assert provider.publish.call_args.args == ([newest],)


def test_queues_that_got_nothing_new_and_are_there_are_joined_again(
    carrier: Carrier, provider: Any, clock: list[float]
) -> None:
    """Given one whose queue is there, twice, one whose queue is not, and one of another kind."""
    first, second, third = (
        Subscription("orders", "shop", "placed", f"audit.{n}", id=n) for n in (1, 2, 3)
    )
    strays = [
        Delivery(n, each.id, event(), to=each) for n, each in enumerate([first, first, second])
    ]
    provider.publish.return_value = [strays[2]]

    carrier.inbox.send(Publish(strays, is_stray=True))
    carrier.inbox.send(Publish([Delivery(9, 3, event(), to=third)], is_backlog=True))
    carrier._turn()

    provider.rejoin.assert_called_once_with(first)


def test_what_cannot_be_forgotten_is_given_back(
    carrier: Carrier, provider: Any, clock: list[float]
) -> None:
    """Given a provider that goes away after the first: meanwhile the other may be wanted again."""
    first, other = (
        Subscription("auth_events", "auth_events", "user.registered", f"s{n}.note", id=n)
        for n in (1, 2)
    )
    provider.forget.side_effect = [None, ProviderUnavailableError("away")]
    carrier.inbox.send(Forget([first, other]))
    carrier._turn()

    carrier._report.assert_called_with(Forget([other]))  # type: ignore[attr-defined]
    clock[0] += RECONNECT_SECONDS
    carrier._turn()
    assert provider.forget.call_count == 2


class TestLimits:
    """Given a subscription with limits, and one without."""

    @pytest.fixture
    def consuming(self, carrier: Carrier, provider: Any) -> Carrier:
        wanted = [Subscription("orders", "shop", "placed", f"audit.{n}", id=n) for n in (1, 2)]
        provider.reserve.return_value = []
        carrier.inbox.send(Declare(wanted, [1, 1], 10))
        return carrier

    def asked(self, carrier: Carrier, provider: Any, leases: int = 0) -> dict[int, int]:
        """Return what the provider is asked for, when it has so many of the first."""
        provider.reserve.return_value = [
            Lease(Delivery(seq, 1, event()), 1, handle=object()) for seq in range(leases)
        ]
        carrier._turn()
        limits, _ = provider.reserve.call_args[0]
        return dict(limits)

    def test_are_kept_to(self, consuming: Carrier, provider: Any) -> None:
        consuming.inbox.send(Allow({1: Credit(3, 200.0)}))
        assert self.asked(consuming, provider, leases=2) == {1: 3, 2: 10}
        assert self.asked(consuming, provider, leases=1) == {1: 1, 2: 8}
        assert self.asked(consuming, provider) == {1: 0, 2: 7}
        consuming.inbox.send(Allow({1: Credit(4, 200.0)}))
        assert self.asked(consuming, provider) == {1: 1, 2: 7}
        consuming.inbox.send(Allow({}))
        assert self.asked(consuming, provider) == {1: 7, 2: 7}

    def test_are_none_when_what_was_told_ran_out(
        self, consuming: Carrier, provider: Any, clock: list[float]
    ) -> None:
        consuming.inbox.send(Allow({1: Credit(3, 101.0)}))
        assert self.asked(consuming, provider) == {1: 3, 2: 10}
        clock[0] = 101.0
        assert self.asked(consuming, provider) == {1: 0, 2: 10}

    def test_are_answered_after_what_was_reserved(self, consuming: Carrier, provider: Any) -> None:
        report: Any = consuming._report
        consuming.inbox.send(Allow({1: Credit(3, 200.0)}))
        self.asked(consuming, provider, leases=1)
        assert Allowed(0) not in [each.args[0] for each in report.call_args_list]
        consuming.inbox.send(Allow({1: Credit(1, 200.0)}, 5))
        self.asked(consuming, provider)
        said = [each.args[0] for each in report.call_args_list]
        kinds = [type(each).__name__ for each in said]
        assert kinds.index("Reserved") < kinds.index("Allowed")
        assert said[kinds.index("Allowed")] == Allowed(5)
