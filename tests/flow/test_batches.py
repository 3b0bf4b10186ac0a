"""Handlers that take several deliveries at once."""

import eventlet
import pytest
from nameko.containers import ServiceContainer

from shared.events import Backoff, MessageContext, event_handler

pytestmark = pytest.mark.flow


@pytest.fixture
def flow(backend_flow):
    return backend_flow


BATCHES = []


class Bulk:
    name = "bulk"
    messages = MessageContext()

    @event_handler(
        "source",
        "thing.bulked",
        batch_size=25,
        batch_timeout=0.3,
        backoff=Backoff(base=0.01),
    )
    def store(self, payloads):
        BATCHES.append([payload["n"] for payload in payloads])
        assert len(self.messages) == len(payloads)
        if any(
            payload.get("fail", 0) >= m.attempt
            for payload, m in zip(payloads, self.messages, strict=True)
        ):
            raise ValueError("told to fail")

    @event_handler("source", "thing.single")
    def single(self, payload):
        BATCHES.append(payload["n"])
        eventlet.sleep(payload.get("sleep", 0))


@pytest.fixture
def bulk(flow):
    BATCHES.clear()
    container = ServiceContainer(Bulk, {**flow.env, "max_workers": 2})
    container.start()
    yield container
    container.stop()


def test_a_batch_is_full_or_as_old_as_it_may_be(flow, bulk):
    ids = flow.send_many([("thing.bulked", {"n": n}) for n in range(60)])

    for message_id in ids:
        flow.wait_for_status(message_id, "completed")

    assert [len(batch) for batch in BATCHES] == [25, 25, 10]
    assert [n for batch in BATCHES for n in batch] == list(range(60))


def test_what_a_batch_raises_it_raises_for_all(flow, bulk):
    ids = flow.send_many([("thing.bulked", {"n": n, "fail": n == 1}) for n in range(3)])

    messages = [flow.wait_for_status(message_id, "completed") for message_id in ids]

    assert BATCHES[0] == [0, 1, 2]
    assert [m["retryCount"] for m in messages] == [1, 1, 1]
    assert sorted(n for batch in BATCHES[1:] for n in batch) == [0, 1, 2]


def test_an_incomplete_batch_is_handed_back_at_stop(flow, bulk):
    slow = next(e for e in bulk.entrypoints if e.method_name == "store")
    slow.batch_timeout = 0.5
    # the stop waits for this one, longer than the batch would wait for more
    running = flow.send("thing.single", {"n": 0, "sleep": 1.5})
    flow.wait_for_status(running, "processing")
    message_id = flow.send("thing.bulked", {"n": 1})
    flow.wait_for_status(message_id, "processing")

    bulk.stop()

    delivery = flow.message(message_id)["deliveries"][0]
    assert (delivery["status"], delivery["attempts"]) == ("pending", 0)
    assert BATCHES == [0]


def test_beside_batches_one_goes_alone(flow, bulk):
    ids = flow.send_many([("thing.single", {"n": n}) for n in range(5)])

    for message_id in ids:
        flow.wait_for_status(message_id, "completed")
    assert sorted(BATCHES) == list(range(5))
