"""The pump without a message log: what who dispatches is told when the broker takes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from shared.errors import DispatchError, ProviderBlockedError, ProviderUnavailableError
from shared.events.commands import Append
from shared.events.unlogged import UnloggedPump
from shared.native import Mailbox, Promise
from shared.settings import load_settings
from tests.unit.message_log import event


@pytest.fixture
def provider() -> Mock:
    return Mock(notices=[])


@pytest.fixture
def pump(provider: Mock) -> Iterator[UnloggedPump]:
    settings = load_settings({"QUEUE_PROVIDER": "rabbitmq", "QUEUE_LOG": "off"})
    mailbox = Mailbox()
    mailbox.answer = Mock()  # type: ignore[method-assign]
    made = UnloggedPump(settings, provider, mailbox, Mock(), Mock(), Mock())
    # it has connected
    made._carrier._turn()
    made._turn()
    yield made
    mailbox.close()


@pytest.mark.parametrize("kind", [ProviderBlockedError, ProviderUnavailableError])
def test_a_dispatch_that_the_broker_does_not_take_says_why(
    pump: UnloggedPump, provider: Mock, kind: type[Exception]
) -> None:
    promise = Promise()
    provider.publish.side_effect = kind("short of memory")

    pump._mailbox.inbox.send(Append([event()], promise))
    pump._turn()
    pump._carrier._turn()
    pump._turn()

    answers = [call.args for call in pump._mailbox.answer.call_args_list]  # type: ignore[attr-defined]
    [error] = [args[1] for args in answers if args[0] == promise.reject]
    assert isinstance(error, DispatchError)
    assert str(error) == "the broker does not have it for sure: short of memory"
