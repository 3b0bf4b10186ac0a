"""What is read of a message that came over RabbitMQ: no more than can be stored."""

import json

import amqp
import pytest

from shared.providers.rabbitmq.messages import Held, delivery_of
from shared.tables import OWN_METADATA
from shared.types import MAX_JSON_DEPTH, Subscription

SUBSCRIPTION = Subscription(
    id=1,
    queue="source",
    source="source",
    event_type="thing.happened",
    subscriber="service.method",
    handler_type="service_pool",
    reliable=True,
)


def metadata_of(headers):
    message = amqp.Message("{}", application_headers=headers)
    return delivery_of(Held((1, 1), 1, "queue", message, False), SUBSCRIPTION).message.metadata


def nested(levels):
    made = "inmost"
    for _ in range(levels):
        made = [made]
    return made


def test_context_and_metadata_come_back_together():
    own = {"cause": "an id", "context": {"kept": None}}
    sent = {"version": "1", "note": "[{\\u0000", OWN_METADATA: own}
    headers = {
        "queue-metadata": json.dumps(sent),
        "nameko.call_id_stack": ["a", "b"],
        "language": "de",
        "x-death": [{"count": 1}],
    }

    context = {"kept": None, "call_id_stack": ["a", "b"], "language": "de"}
    assert metadata_of(headers) == {**sent, OWN_METADATA: {**own, "context": context}}


@pytest.mark.parametrize(
    "value",
    [
        "a\x00b",
        {"a\x00b": 1},
        b"\xff",
        float("nan"),
        [float("inf")],
        nested(MAX_JSON_DEPTH + 1),
        nested(5_000),
        {"a": {b"key": 1}},
        "\ud800",
        None,
    ],
    ids=["nul", "nul-key", "bytes", "nan", "infinity", "deep", "deeper", "key", "half", "none"],
)
def test_of_the_context_what_cannot_be_stored_is_dropped_alone(value):
    headers = {
        "queue-metadata": '{"version": "1"}',
        "nameko.odd": value,
        "nameko.language": "de",
    }

    made = {"version": "1", OWN_METADATA: {"context": {"language": "de"}}}
    assert metadata_of(headers) == made


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}',
        '{"a": "\\u0000"}',
        '{"a": "\\ud800"}',
        '{"a": ' + "[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1) + "}",
        "[" * 100_000,
        "[1]",
        "{",
        5,
        None,
    ],
    ids=["nan", "nul", "half", "deep", "endless", "list", "broken", "number", "none"],
)
def test_metadata_that_cannot_be_stored_is_dropped_without_the_context(text):
    headers = {"queue-metadata": text, "nameko.language": "de"}

    assert metadata_of(headers) == {OWN_METADATA: {"context": {"language": "de"}}}


def test_brackets_within_text_are_no_levels():
    value = "[{" * MAX_JSON_DEPTH + "\\u0000"

    assert metadata_of({"nameko.odd": value}) == {OWN_METADATA: {"context": {"odd": value}}}
