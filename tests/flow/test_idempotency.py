"""Requests to queue_admin that are sent again with the same Idempotency-Key."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from shared.testing.servers import free_port

pytestmark = pytest.mark.flow

BODY = {"queueName": "source", "messageType": "thing.happened", "payload": {"n": 1, "m": [2]}}


@pytest.fixture
def publish(flow_on):
    address = f"127.0.0.1:{free_port()}"
    flow_on({"QUEUE_ADMIN_ADDRESS": address}).run("services.queue_admin")

    def publish(key=None, body=BODY):
        headers = {} if key is None else {"Idempotency-Key": key}
        url = f"http://{address}/queue/publish"
        return requests.post(url, json=body, headers=headers, timeout=20)

    publish.total = lambda: requests.get(f"http://{address}/queue/stats/source", timeout=20).json()[
        "total"
    ]
    return publish


def test_a_request_is_published_once(publish):
    first = publish('"a key"')
    # in whatever order its members come
    again = publish('"a key"', dict(reversed(BODY.items())))
    bare = [publish("bare-key"), publish('"bare-key"')]
    without = [publish(), publish()]

    assert [first.status_code, again.status_code] == [202, 202]
    assert first.json() == again.json()
    assert bare[0].json() == bare[1].json() != first.json()
    assert without[0].json() != without[1].json()
    assert publish.total() == 4

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: publish("at-once"), range(16)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["messageId"] for answer in answers}) == 1
    assert publish.total() == 5


def test_a_key_with_another_body_is_refused_and_what_is_no_key_too(publish):
    publish("k")

    for changes in ({"payload": {"n": 2}}, {"queueName": "other"}, {"priority": "low"}):
        answer = publish("k", {**BODY, **changes})
        assert answer.status_code == 422
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json()["type"] == "/problems/idempotency-key-reused"
    assert publish.total() == 1

    # two headers of that name reach us as one, with a comma between
    two = ("a,b", "a, b", '"a","b"')
    for header in (
        "",
        *two,
        '""',
        '"a',
        'a"b',
        "a b",
        "ü",
        "x" * 201,
        f'"{"x" * 201}"',
        '" a"',
        '"\\a"',
    ):
        answer = publish(header.encode())
        assert (answer.status_code, header) == (400, header)
        assert answer.json()["type"] == "/problems/idempotency-key-malformed"
    assert publish("x" * 200).status_code == 202
    assert publish('"a,b"').status_code == 202
    assert publish.total() == 3
