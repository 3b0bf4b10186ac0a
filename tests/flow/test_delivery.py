"""Who gets what, in which order, whatever is killed."""

import os
import re
import signal
from collections import Counter
from datetime import UTC, datetime, timedelta

import eventlet
import pytest
from sqlalchemy import func, select, update

from shared.database import database_url, disposing, make_engine
from shared.tables import deliveries, subscriptions
from tests.support.waiting import PROMPTLY, wait_until

pytestmark = pytest.mark.flow


@pytest.fixture
def flow(backend_flow):
    return backend_flow


RECORDER = "tests.flow.apps.recorder"
MISSED = "tests.flow.apps.missed"
GROUPS = "tests.flow.apps.groups"


def waiting(flow):
    return sum(
        each[key]
        for each in flow.stats().get("subscriptions", [])
        for key in ("waiting", "active", "scheduled")
    )


def in_hand(flow):
    """Count what is in the hands of who dispatched it, or of a worker."""
    with flow.reading() as log:
        its = deliveries.c.lease_expires_at.is_not(None)
        return log.execute(select(func.count()).select_from(deliveries).where(its)).scalar()


def status_of(flow, message_id, handler):
    deliveries = flow.message(message_id)["deliveries"]
    return next(d["status"] for d in deliveries if d["subscriber"] == f"recorder.{handler}")


def test_who_has_other_options_than_those_before_says_so(flow):
    assert "from now on" not in flow.run(RECORDER).output()
    others = update(subscriptions).where(subscriptions.c.subscriber == "recorder.first")
    # it waits for the lock of SQLite's file, which the worker may have
    made = make_engine(database_url(flow.settings), eventlet.sleep)
    with disposing(made) as engine, engine.begin() as connection:
        connection.execute(others.values(reliable=False))

    again = flow.run(RECORDER)

    said = r"thing\.happened recorder\.first is reliable from now on, which it was not"
    wait_until(lambda: re.search(said, again.output()), 10, again.output)
    assert again.output().count("from now on") == 1


def test_a_thousand_events_to_two_subscribers_while_the_worker_is_killed_five_times(flow):
    worker = flow.run(RECORDER)
    ids = flow.send_many([("thing.happened", {"n": n, "sleep": 0.002}) for n in range(1000)])

    for kills in range(1, 6):
        flow.effects.wait_for(300 * kills, timeout=60)
        worker.restart()

    wait_until(lambda: waiting(flow) == 0, 90, lambda: str(flow.stats()))
    stats = flow.stats()
    assert (stats["completed"], stats["total"]) == (1000, 1000)
    for handler, what in (("first", "done"), ("second", "ran")):
        seen = {effect["id"] for effect in flow.effects.all(handler=handler, what=what)}
        assert seen == set(ids)
    message = flow.message(ids[0])
    assert [d["status"] for d in message["deliveries"]] == ["completed", "completed"]


def test_urgent_ones_go_before_a_thousand_low_ones_that_wait(flow):
    first = flow.run(RECORDER)
    first.stop()
    low = [("thing.happened", {"n": n}, {"priority": "low"}) for n in range(1000)]
    flow.send_many(low)
    flow.send_many([("thing.happened", {"n": n}) for n in range(1000, 1010)], priority="urgent")
    flow.send("thing.happened", {"n": 2000}, priority="high")
    # what is on its way to a broker yet cannot go before what is there
    wait_until(lambda: not in_hand(flow), 20, lambda: f"{in_hand(flow)} to be published")

    flow.run(RECORDER)
    handled = flow.effects.wait_for(1011, handler="second", timeout=60)

    order = [effect["n"] for effect in handled]
    assert sorted(order[:10]) == list(range(1000, 1010))
    # ten workers: whatever is reserved together may overlap
    assert 2000 in order[10:20]
    places = {n: place for place, n in enumerate(order)}
    assert all(abs(places[n] - (n + 11)) <= 20 for n in range(1000))


def test_a_dead_workers_delivery_is_taken_over_and_burns_no_attempt(flow):
    workers = flow.run_twice(RECORDER)
    message_id = flow.send("thing.happened", {"sleep": 3}, max_retries=0)
    (begun,) = flow.effects.wait_for(1, handler="first", what="ran")
    # with a broker the log hears of it only once it takes a while
    wait_until(lambda: status_of(flow, message_id, "first") == "processing", 5, "its beginning")

    next(worker for worker in workers if worker.pid == begun["pid"]).kill()

    flow.effects.wait_for(1, handler="first", what="done", timeout=15)
    message = flow.wait_for_status(message_id, "completed")
    delivery = next(d for d in message["deliveries"] if d["subscriber"].endswith("first"))
    assert (delivery["attempts"], delivery["takeovers"]) == (1, 1)
    assert [h["outcome"] for h in delivery["history"]] == ["taken_over"]
    assert [e["attempt"] for e in flow.effects.all(handler="first", what="ran")] == [1, 1]


def test_a_handler_that_burns_the_processor_keeps_its_lease(flow):
    flow.run_twice(RECORDER, QUEUE_LEASE_SECONDS="1")

    message_id = flow.send("thing.happened", {"burn": 8})

    message = flow.wait_for_status(message_id, "completed")
    assert len(flow.effects.all(handler="first", what="ran")) == 1
    assert message["deliveries"][0]["takeovers"] == 0


def test_a_frozen_worker_cannot_settle_what_was_taken_over(flow):
    workers = flow.run_twice(MISSED)
    message_id = flow.send("thing.happened", {"sleep": 1.5})
    (begun,) = flow.effects.wait_for(1, handler="first", what="ran")
    # frozen while it writes, it would keep everybody from writing
    wait_until(lambda: status_of(flow, message_id, "second") == "completed", 5, "its sibling")
    frozen = next(worker for worker in workers if worker.pid == begun["pid"])

    os.kill(frozen.pid, signal.SIGSTOP)
    # on RabbitMQ when two heartbeats were missed
    flow.effects.wait_for(2, handler="first", what="ran", timeout=90)
    os.kill(frozen.pid, signal.SIGCONT)
    flow.effects.wait_for(2, handler="first", what="done", timeout=15)

    message = flow.wait_for_status(message_id, "completed")
    wait_until(lambda: "lease lost" in frozen.output(), 10, "the loss of the lease in the log")
    delivery = message["deliveries"][0]
    assert delivery["attempts"] == 1
    assert not delivery["worker"].endswith(f":{frozen.pid}")


@pytest.mark.parametrize("backend_flow", ["embedded"], indirect=True)
def test_a_worker_that_gets_back_what_it_still_runs_goes_on_with_it(flow):
    """One beside a broker is tested with its pump alone: it takes minutes to lose a lease."""
    workers = flow.run_twice(RECORDER, QUEUE_LEASE_SECONDS="1")
    message_id = flow.send("thing.happened", {"sleep": 6})
    (begun,) = flow.effects.wait_for(1, handler="first", what="ran")
    wait_until(lambda: status_of(flow, message_id, "second") == "completed", 5, "its sibling")
    frozen, other = sorted(workers, key=lambda worker: worker.pid != begun["pid"])

    os.kill(frozen.pid, signal.SIGSTOP)
    flow.effects.wait_for(2, handler="first", what="ran", timeout=15)
    other.kill()
    os.kill(frozen.pid, signal.SIGCONT)

    message = flow.wait_for_status(message_id, "completed")
    assert len(flow.effects.all(handler="first", what="ran")) == 2
    delivery = message["deliveries"][0]
    assert (delivery["attempts"], delivery["takeovers"]) == (1, 1)
    assert delivery["worker"].endswith(f":{frozen.pid}")


def test_terminate_finishes_what_is_short_and_hands_back_what_is_long(flow):
    worker = flow.run(RECORDER, QUEUE_GRACE_SECONDS="1.5")
    short = flow.send("thing.happened", {"sleep": 0.7})
    long = flow.send("thing.happened", {"sleep": 60}, max_retries=0)
    flow.effects.wait_for(2, handler="first", what="ran")

    status = worker.terminate(timeout=6)

    assert status == 0
    assert flow.message(short)["status"] == "completed"
    delivery = flow.message(long)["deliveries"][0]
    assert (delivery["status"], delivery["attempts"]) == ("pending", 0)
    assert [h["outcome"] for h in delivery["history"]] == ["released"]


def test_terminate_ends_a_worker_whose_handler_keeps_the_processor(flow):
    worker = flow.run(RECORDER, QUEUE_GRACE_SECONDS="1")
    message_id = flow.send("thing.happened", {"burn": 60}, max_retries=0)
    flow.effects.wait_for(1, handler="first", what="ran")

    worker.terminate(timeout=6)

    delivery = flow.message(message_id)["deliveries"][0]
    assert (delivery["status"], delivery["attempts"]) == ("pending", 0)


def test_nothing_is_handled_before_its_time(flow):
    flow.run(RECORDER)
    start = datetime.now(UTC)
    by_delay = flow.send("thing.happened", {"n": 1}, delay=1.5)
    by_time = flow.send("thing.happened", {"n": 2}, scheduled_at=start + timedelta(seconds=1))
    at_once = flow.send("thing.happened", {"n": 3})

    flow.effects.wait_for(3, handler="second")

    when = {e["id"]: e["at"] - start.timestamp() for e in flow.effects.all(handler="second")}
    assert when[at_once] < PROMPTLY
    # by a timer, and not when something else happens to look
    assert 1 <= when[by_time] < 1 + PROMPTLY
    assert 1.5 <= when[by_delay] < 1.5 + PROMPTLY
    assert flow.message(by_delay)["scheduledAt"] is not None


def test_singleton_broadcast_and_pool(flow):
    workers = flow.run_twice(GROUPS)
    wait_until(
        lambda: (
            len([s for s in flow.stats()["subscriptions"] if "everyone" in s["subscriber"]]) == 2
        ),
        10,
        "a subscription for each instance",
    )

    for n in range(20):
        flow.send("group.happened", {"n": n})
    flow.effects.wait_for(80)

    counts = Counter(effect["handler"] for effect in flow.effects.all())
    assert counts == {"one": 20, "pool": 20, "everyone": 40}
    by_instance = Counter(e["instance"] for e in flow.effects.all(handler="everyone"))
    assert sorted(by_instance.values()) == [20, 20]
    # what was broadcast to an instance ends with it
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.wait(12)
    left = [s["subscriber"] for s in flow.stats()["subscriptions"]]
    assert sorted(left) == ["groups.pool", "singleton"]


def test_an_event_that_nobody_wants_is_kept_and_counted(flow):
    message_id = flow.send("nobody.cares", {})

    flow.wait_for_status(message_id, "completed")
    assert flow.stats()["unrouted"] == 1
