"""What becomes of handlers that fail."""

from datetime import datetime

import pytest

from tests.flow.apps.recorder import FAST
from tests.support.waiting import PROMPTLY

pytestmark = pytest.mark.flow


@pytest.fixture
def flow(backend_flow):
    return backend_flow


RECORDER = "tests.flow.apps.recorder"


@pytest.fixture
def recorder(flow):
    return flow.run(RECORDER)


def delivery_of(message, subscriber):
    return next(d for d in message["deliveries"] if d["subscriber"] == subscriber)


def test_fails_twice_then_succeeds_and_its_sibling_runs_once(flow, recorder):
    message_id = flow.send("thing.happened", {"fail": 2})

    message = flow.wait_for_status(message_id, "completed")

    assert [e["attempt"] for e in flow.effects.all(handler="first", what="ran")] == [1, 2, 3]
    assert len(flow.effects.all(handler="second")) == 1
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


def test_out_of_attempts_becomes_a_dead_letter_and_can_be_retried(flow, recorder):
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
    flow.effects.wait_for(4, handler="first", what="ran")
    message = flow.wait_for_status(message_id, "failed")
    history = delivery_of(message, "recorder.first")["history"]
    assert [(h["attempt"], h["outcome"]) for h in history] == [
        (1, "retry"), (2, "failed"), (1, "retry"), (2, "failed"),
    ]  # fmt: skip
    assert len(flow.effects.all(handler="second")) == 1


def test_reject_is_a_dead_letter_at_once(flow, recorder):
    message_id = flow.send("thing.happened", {"reject": True})

    message = flow.wait_for_status(message_id, "failed")

    delivery = delivery_of(message, "recorder.first")
    assert delivery["attempts"] == 1
    assert delivery["errorType"] == "Reject"


def test_retry_after_is_when_the_next_attempt_runs(flow, recorder):
    message_id = flow.send("thing.happened", {"retry_after": 0.7})

    flow.wait_for_status(message_id, "completed")

    first, second = flow.effects.all(handler="first", what="ran")
    assert 0.7 <= second["at"] - first["at"] < 0.7 + PROMPTLY


def test_a_timeout_is_raised_in_the_handler(flow, recorder):
    message_id = flow.send("single.happened", {"sleep": 30}, max_retries=0)

    message = flow.wait_for_status(message_id, "failed", timeout=5)

    assert message["deliveries"][0]["errorType"] == "HandlerTimeoutError"


def test_requeue_on_error_has_no_limit(flow, recorder):
    message_id = flow.send("stubborn.happened", {"fail": 6}, max_retries=0)

    flow.wait_for_status(message_id, "completed")

    assert len(flow.effects.all(handler="stubborn")) == 7


AFTER_RESTART = 20
"""Seconds in which a process starts again and handles an event, on a busy machine: to start is
what takes most of them."""


def test_waiting_retries_survive_a_restart_and_delay_nothing_else(flow, recorder):
    waiting = flow.send("thing.happened", {"retry_after": AFTER_RESTART})
    flow.wait_for_status(waiting, "retry")

    recorder.restart()
    prompt = flow.send("thing.happened", {})
    flow.wait_for_status(prompt, "completed", timeout=AFTER_RESTART)

    first = flow.effects.all(handler="first", what="ran", id=waiting)
    assert len(first) == 1, "the retry was to wait"
    flow.wait_for_status(waiting, "completed", timeout=2 * AFTER_RESTART)
    runs = flow.effects.all(handler="first", what="ran", id=waiting)
    assert runs[1]["at"] - runs[0]["at"] >= AFTER_RESTART


def test_context_data_is_carried_from_worker_to_worker(flow, recorder):
    flow.send("chain.begun", {})

    (effect,) = flow.effects.wait_for(1, handler="end_of_chain")

    stack = effect["stack"]["context"]["call_id_stack"]
    assert [call.rsplit(".", 1)[0] for call in stack] == ["source.send", "recorder.forward"]


def seconds_between(start, end):
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
