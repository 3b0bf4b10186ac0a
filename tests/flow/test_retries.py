"""What becomes of handlers that fail."""

from datetime import datetime
from functools import cache

import pytest

from tests.flow.apps.recorder import FAST
from tests.flow.conftest import SHARED
from tests.support.waiting import PROMPTLY

pytestmark = pytest.mark.flow


RECORDER = "tests.flow.apps.recorder"

AFTER_RESTART = 20
"""Seconds in which a process starts again and handles an event, on a busy machine: to start is
what takes most of them."""


class Restarted:
    """A flow whose recorder was restarted while a retry waited: it waits beside the tests."""

    def __init__(self, flow):
        self.flow = flow
        recorder = flow.run(RECORDER)
        self.waiting = flow.send("thing.happened", {"retry_after": AFTER_RESTART})
        flow.wait_for_status(self.waiting, "retry")
        recorder.restart()
        self.prompt = flow.send("thing.happened", {})
        flow.wait_for_status(self.prompt, "completed", timeout=AFTER_RESTART)
        self.ran_by_then = runs(flow, self.waiting)


def runs(flow, message_id):
    return flow.effects.all(handler="first", what="ran", id=message_id)


@pytest.fixture(scope="module")
def restarted_on(request, shared_flow_on):
    """Makes one on a backend, the first time that it is asked for."""
    return cache(lambda backend: Restarted(shared_flow_on(SHARED[backend](request))))


@pytest.fixture(params=list(SHARED))
def restarted(request, restarted_on):
    return restarted_on(request.param)


@pytest.fixture
def flow(restarted):
    return restarted.flow


def delivery_of(message, subscriber):
    return next(d for d in message["deliveries"] if d["subscriber"] == subscriber)


def test_fails_twice_then_succeeds_and_its_sibling_runs_once(flow):
    message_id = flow.send("thing.happened", {"fail": 2})

    message = flow.wait_for_status(message_id, "completed")

    assert [e["attempt"] for e in runs(flow, message_id)] == [1, 2, 3]
    assert len(flow.effects.all(handler="second", id=message_id)) == 1
    assert message["retryCount"] == 2
    assert len(message["deliveries"]) == 2
    delivery = delivery_of(message, "recorder.first")
    assert delivery["attempts"] == 3
    assert [h["outcome"] for h in delivery["history"]] == ["retry", "retry"]
    starts = [h["startedAt"] for h in delivery["history"][1:]] + [delivery["startedAt"]]
    for retries, (attempt, started) in enumerate(zip(delivery["history"], starts, strict=True)):
        planned = seconds_between(attempt["endedAt"], attempt["retryAt"])
        assert 0 <= planned <= FAST.ceiling(retries) + 0.001
        assert started >= attempt["retryAt"]
    assert delivery_of(message, "recorder.second")["history"] == []


def test_out_of_attempts_becomes_a_dead_letter_and_can_be_retried(flow):
    message_id = flow.send("thing.happened", {"fail": 2}, max_retries=1)

    message = flow.wait_for_status(message_id, "failed")

    delivery = delivery_of(message, "recorder.first")
    assert (delivery["status"], delivery["attempts"]) == ("failed", 2)
    assert delivery["errorType"] == "ValueError"
    assert message["errorMessage"] == "told to fail, attempt 2"
    assert message["retryCount"] == 1
    assert "in obey\n" in delivery["history"][-1]["traceback"]
    assert "ValueError: told to fail" in delivery["history"][-1]["traceback"]
    assert delivery_of(message, "recorder.second")["status"] == "completed"

    assert flow.retry(message_id) == 1

    # attempts count from zero: two more failures, of which the first is retried
    flow.effects.wait_for(4, handler="first", what="ran", id=message_id)
    message = flow.wait_for_status(message_id, "failed")
    history = delivery_of(message, "recorder.first")["history"]
    assert [(h["attempt"], h["outcome"]) for h in history] == [
        (1, "retry"), (2, "failed"), (1, "retry"), (2, "failed"),
    ]  # fmt: skip
    assert len(flow.effects.all(handler="second", id=message_id)) == 1


def test_reject_is_a_dead_letter_at_once(flow):
    message_id = flow.send("thing.happened", {"reject": True})

    message = flow.wait_for_status(message_id, "failed")

    delivery = delivery_of(message, "recorder.first")
    assert delivery["attempts"] == 1
    assert delivery["errorType"] == "Reject"


def test_retry_after_is_when_the_next_attempt_runs(flow):
    message_id = flow.send("thing.happened", {"retry_after": 0.7})

    flow.wait_for_status(message_id, "completed")

    first, second = runs(flow, message_id)
    assert 0.7 <= second["at"] - first["at"] < 0.7 + PROMPTLY


def test_a_timeout_is_raised_in_the_handler(flow):
    message_id = flow.send("single.happened", {"sleep": 30}, max_retries=0)

    message = flow.wait_for_status(message_id, "failed", timeout=5)

    assert message["deliveries"][0]["errorType"] == "HandlerTimeoutError"


def test_requeue_on_error_has_no_limit(flow):
    message_id = flow.send("stubborn.happened", {"fail": 6}, max_retries=0)

    flow.wait_for_status(message_id, "completed")

    assert len(flow.effects.all(handler="stubborn", id=message_id)) == 7


def test_context_data_is_carried_from_worker_to_worker(flow):
    flow.send("chain.begun", {})

    (effect,) = flow.effects.wait_for(1, handler="end_of_chain")

    stack = effect["stack"]["context"]["call_id_stack"]
    assert [call.rsplit(".", 1)[0] for call in stack] == ["source.send", "recorder.forward"]


def test_waiting_retries_survive_a_restart_and_delay_nothing_else(restarted):
    assert len(restarted.ran_by_then) == 1, "the retry was to wait"
    restarted.flow.wait_for_status(restarted.waiting, "completed", timeout=2 * AFTER_RESTART)
    first, second = runs(restarted.flow, restarted.waiting)
    assert second["at"] - first["at"] >= AFTER_RESTART


def seconds_between(start, end):
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
