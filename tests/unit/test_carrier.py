"""The carrier alone, with a clock and a provider of the test's."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest

from shared.events import carrier as module
from shared.events.carrier import GATHER_SECONDS, Carrier
from shared.events.commands import Publish
from shared.settings import load_settings
from shared.types import Delivery
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
