"""A Redis that goes away while a worker consumes, and comes back."""

import pytest

from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"


def test_a_worker_goes_on_when_redis_is_back(flow_on, redis_server):
    redis_server.empty()
    flow = flow_on({"QUEUE_PROVIDER": "redis", **redis_server.environment})
    worker = flow.run(RECORDER)
    ids = [
        message_id
        for _ in range(5)
        for message_id in flow.send_many([("thing.happened", {"n": n}) for n in range(1000)])
    ]

    for kills in range(1, 4):
        flow.effects.wait_for(1500 * kills, timeout=60)
        redis_server.kill()
        redis_server.start()

    wait_until(lambda: flow.stats()["completed"] == 5000, 60, lambda: str(flow.stats()))
    assert {effect["id"] for effect in flow.effects.all(handler="second")} == set(ids)
    assert worker.output().count("reachable again") >= 1
    with redis_server.client(1) as client:
        wait_until(
            lambda: {key.rpartition(":")[2] for key in client.scan_iter()} <= {"settled"},
            10,
            lambda: str(client.keys()),
        )
    redis_server.empty()
