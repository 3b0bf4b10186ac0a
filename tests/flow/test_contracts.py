"""Contracts on the way in and on the way out, and versions beside each other."""

import pytest
from marshmallow import Schema, fields
from nameko.containers import ServiceContainer

from shared.contracts import contracts
from shared.database import Database, database_url
from shared.errors import ContractError
from shared.events import MessageContext, event_handler
from shared.native import sleep
from shared.providers import make_provider
from shared.store import log
from shared.types import Envelope, new_message_id

pytestmark = pytest.mark.flow


@pytest.fixture
def flow(backend_flow):
    return backend_flow


HANDLED = []


class OrderPlaced1(Schema):
    item = fields.Str(required=True)


class OrderPlaced2(Schema):
    item = fields.Str(required=True)
    count = fields.Int(required=True, strict=True)


contracts.register("source", "order.placed", 1, OrderPlaced1)
contracts.register("source", "order.placed", 2, OrderPlaced2)


class Shop:
    name = "shop"
    message = MessageContext()

    @event_handler("source", "order.placed")
    def place(self, payload):
        HANDLED.append((self.message.metadata["version"], payload))


@pytest.fixture
def shop(flow):
    HANDLED.clear()
    container = ServiceContainer(Shop, dict(flow.env))
    container.start()
    yield container
    container.stop()


def test_version_2_is_consumed_beside_version_1(flow, shop):
    old = flow.send("order.placed", {"item": "tea"})
    new = flow.send("order.placed", {"item": "tea", "count": 2}, metadata={"version": "2"})

    flow.wait_for_status(old, "completed")
    flow.wait_for_status(new, "completed")

    assert sorted(HANDLED, key=lambda each: each[0]) == [
        ("1", {"item": "tea"}),
        ("2", {"item": "tea", "count": 2}),
    ]


def test_a_broken_payload_is_refused_and_nothing_is_stored(flow, shop):
    with pytest.raises(ContractError) as refused:
        flow.send_many(
            [
                ("order.placed", {"item": "tea"}),
                ("order.placed", {"item": 3, "colour": "red"}),
            ]
        )

    assert refused.value.errors == {
        "payload.item": "Not a valid string.",
        "payload.colour": "Unknown field.",
    }
    assert flow.stats()["total"] == 0


def test_what_arrives_broken_is_a_dead_letter_without_an_attempt_of_the_handler(flow, shop):
    message_id = send_unchecked(flow)

    message = flow.wait_for_status(message_id, "failed")

    delivery = message["deliveries"][0]
    assert delivery["errorType"] == "ContractError"
    assert "payload.item" in delivery["errorMessage"]
    assert [h["outcome"] for h in delivery["history"]] == ["failed"]
    assert HANDLED == []


def send_unchecked(flow):
    """Store and publish as a dispatcher of another release would, which knows no contract."""
    envelope = Envelope(
        new_message_id(), "source", "order.placed", '{"item": 3}', metadata={"version": "1"}
    )
    database = Database(database_url(flow.settings), sleep)
    provider = make_provider(flow.settings)
    with database.transaction() as tx:
        stored = log.append(tx, [envelope], 3)
        provider.publish(stored, tx)
    provider.published(stored)
    provider.close()
    database.close()
    return envelope.id
