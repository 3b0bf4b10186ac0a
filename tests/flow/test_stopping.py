"""Processes that are asked to end: in order, in time, at once, and as the first of a container."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from time import monotonic

import pytest
from sqlalchemy import select

from shared.tables import deliveries as d
from tests.flow.conftest import BACKENDS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"
TALLY = "tests.flow.apps.tally"
SLOWLY = "tests.flow.apps.slowly"


@pytest.fixture(params=["redis", "rabbitmq"])
def flow(request, flow_on):
    # whoever is not handed back is taken over long after the test is over
    return flow_on({**BACKENDS[request.param](request), "QUEUE_LEASE_SECONDS": "60"})


def delivery(flow, message_id):
    return flow.message(message_id)["deliveries"][0]


def assert_unburnt(flow, *message_ids):
    for message_id in message_ids:
        found = delivery(flow, message_id)
        assert (found["status"], found["attempts"]) == ("pending", 0)
        assert [each["outcome"] for each in found["history"]] == ["released"]


def begin_what_lasts(flow):
    """Have both services busy: one waits, and the other keeps the processor."""
    waits = flow.send("unit.sent", {"n": 1, "sleep": 60}, max_retries=0)
    flow.effects.wait_for(1, n=1)
    wait_until(lambda: delivery(flow, waits)["status"] == "processing", 5, "its beginning")
    burns = flow.send("single.happened", {"n": 2, "burn": 60}, max_retries=0)
    flow.effects.wait_for(1, n=2)
    return waits, burns


def test_all_services_of_a_process_hand_back_before_it_ends(flow):
    worker = flow.run(RECORDER, SLOWLY, QUEUE_GRACE_SECONDS="0.5")
    lasting = begin_what_lasts(flow)

    assert worker.terminate(timeout=5) == 0

    assert_unburnt(flow, *lasting)
    # the broker has them, too, for whoever comes next
    flow.run(TALLY)
    flow.effects.wait_for(2, n=1, timeout=10)


def test_a_second_signal_ends_it_at_once(flow):
    # so slowly that an attempt lasts which the log had not heard of when it was to end
    worker = flow.run(RECORDER, SLOWLY, QUEUE_GRACE_SECONDS="60")
    lasting = begin_what_lasts(flow)

    os.kill(worker.pid, signal.SIGTERM)
    # two of one kind are one to Python until it has got round to the first
    flow.effects.wait_for(2, what="asked to end")
    asked_at = monotonic()
    os.kill(worker.pid, signal.SIGTERM)

    assert worker.process.wait(5) == 0
    assert monotonic() - asked_at < 3
    assert_unburnt(flow, *lasting)


def test_interrupt_finishes_what_is_short_and_hands_back_what_is_long(flow_on):
    flow = flow_on({"QUEUE_GRACE_SECONDS": "1"})
    worker = flow.run(RECORDER)
    short = flow.send("thing.happened", {"sleep": 0.5})
    long = flow.send("thing.happened", {"sleep": 60}, max_retries=0)
    flow.effects.wait_for(2, handler="first", what="ran")

    os.kill(worker.pid, signal.SIGINT)

    assert worker.process.wait(5) == 0
    assert flow.message(short)["status"] == "completed"
    assert_unburnt(flow, long)


def test_who_dispatched_last_leaves_nothing_in_hand(flow):
    """Given a consumer that is away: else others would publish it once more, much later."""
    assert flow.run(TALLY).terminate() == 0
    sent = [flow.send("unit.sent", {"n": n}) for n in range(3)]

    flow.stop_source()

    with flow.reading() as connection:
        in_hand = select(d.c.message_id).where(d.c.lease_expires_at.is_not(None))
        assert connection.execute(in_hand).scalars().all() == []
    flow.run(TALLY)
    for n, message_id in enumerate(sent):
        flow.effects.wait_for(1, id=message_id, n=n)


def needs_namespaces():
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare here")
    tried = subprocess.run(
        [unshare, "--pid", "--fork", "true"], check=False, capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"no namespace of processes can be made here: {tried.stderr.strip()}")
    return [unshare, "--pid", "--fork", "--kill-child"]


def test_the_first_process_of_a_container_ends_as_any_other(flow_on):
    flow = flow_on({"QUEUE_GRACE_SECONDS": "0.5"})
    worker = flow.run(RECORDER, before=needs_namespaces())
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    message_id = flow.send("thing.happened", {"sleep": 60}, max_retries=0)
    flow.effects.wait_for(1, handler="first", pid=1)

    # as ``docker stop`` does: from outside, where the kernel drops what it has no handler for
    os.kill(int(children[0]), signal.SIGTERM)

    assert worker.process.wait(5) == 0
    assert_unburnt(flow, message_id)
