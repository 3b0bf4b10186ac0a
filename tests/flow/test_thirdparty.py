"""Services on a provider that does not come with the suite."""

import sqlite3

import pytest

from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"


@pytest.fixture
def flow(flow_on):
    return flow_on({"QUEUE_PROVIDER": "tests.thirdparty.provider:FileProvider"})


def test_an_event_is_handled_retried_and_completed(flow):
    worker = flow.run(RECORDER)

    message_id = flow.send("thing.happened", {"n": 1, "fail": 2})

    message = flow.wait_for_status(message_id, "completed")
    attempts = {each["subscriber"]: each["attempts"] for each in message["deliveries"]}
    assert attempts == {"recorder.first": 3, "recorder.second": 1}
    ran = flow.effects.all(handler="first", what="ran")
    assert [effect["attempt"] for effect in ran] == [1, 2, 3]
    assert "provider=tests.thirdparty.provider:FileProvider" in worker.output()


def test_a_dead_letter_runs_again(flow):
    flow.run(RECORDER)
    message_id = flow.send("thing.happened", {"n": 1, "reject": True})
    flow.wait_for_status(message_id, "failed")

    assert flow.retry(message_id) == 1

    flow.effects.wait_for(2, handler="first", what="ran")
    message = flow.wait_for_status(message_id, "failed")
    assert len(message["deliveries"][0]["history"]) == 2


def test_what_a_killed_worker_had_is_taken_over(flow):
    worker = flow.run(RECORDER)
    ids = [flow.send("thing.happened", {"n": n, "sleep": 1}) for n in range(20)]
    flow.effects.wait_for(5, handler="first", what="ran")

    worker.restart()

    for message_id in ids:
        flow.wait_for_status(message_id, "completed", timeout=30)
    assert {e["n"] for e in flow.effects.all(handler="first", what="done")} == set(range(20))
    wait_until(lambda: left_in_the_file(flow) == 0, 10, lambda: f"{left_in_the_file(flow)} left")


def left_in_the_file(flow):
    connection = sqlite3.connect(flow.settings.data_dir / "thirdparty.db")
    try:
        return connection.execute(
            "SELECT count(*) FROM deliveries WHERE state <> 'done'"
        ).fetchone()[0]
    finally:
        connection.close()
