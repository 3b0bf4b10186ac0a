"""A provider with storage of its own that fails after the message log has committed."""

import pytest
from nameko.containers import ServiceContainer

from shared.errors import ProviderUnavailableError
from shared.events import event_handler
from shared.providers.redis import RedisProvider
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

HANDLED = []
FAILURES = {"publish": 0, "settle": 0}


class Apart(RedisProvider):
    """The one on Redis, which fails when it is told to."""

    def publish(self, deliveries, tx=None):
        self._fail("publish")
        return super().publish(deliveries)

    def settle(self, settlements, tx=None):
        self._fail("settle")
        return super().settle(settlements)

    def _fail(self, step):
        if FAILURES[step]:
            FAILURES[step] -= 1
            raise ProviderUnavailableError(f"told to fail: {step}")


class Counter:
    name = "counter"

    @event_handler("source", "thing.counted")
    def count(self, payload):
        HANDLED.append(payload["n"])


@pytest.fixture
def apart(flow_on, redis_server):
    HANDLED.clear()
    redis_server.empty()
    flow = flow_on({"QUEUE_PROVIDER": f"{__name__}:Apart", **redis_server.environment})
    container = ServiceContainer(Counter, dict(flow.env))
    container.start()
    yield flow
    FAILURES.update(publish=0, settle=0)
    container.stop()
    redis_server.empty()


def test_what_is_stored_is_said_to_be_and_published_later(apart):
    apart.container  # noqa: B018 - started before anything fails
    FAILURES["publish"] = 2

    ids = [apart.send("thing.counted", {"n": 1})]
    ids += [apart.send("thing.counted", {"n": n}) for n in (2, 3)]

    for message_id in ids:
        apart.wait_for_status(message_id, "completed")
    assert sorted(HANDLED) == [1, 2, 3]


def test_an_outcome_that_the_provider_missed_is_told_again_and_stored_once(apart):
    FAILURES["settle"] = 1

    message_id = apart.send("thing.counted", {"n": 1})

    message = apart.wait_for_status(message_id, "completed")
    assert message["deliveries"][0]["attempts"] == 1
    next_id = apart.send("thing.counted", {"n": 2})
    apart.wait_for_status(next_id, "completed")
    wait_until(lambda: FAILURES["settle"] == 0, 5, "the failure")
    assert HANDLED == [1, 2]
