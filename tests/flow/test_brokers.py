"""What has to be so on a broker beside MariaDB: monitoring, what is left, long handlers, delays."""

import itertools
import random
from time import monotonic, time

import pytest

from shared.testing.servers import RabbitMQServer
from tests.flow.conftest import BACKENDS, Flow
from tests.support.monitoring import FAILED_MESSAGES, PERFORMANCE, QUEUE_STATISTICS
from tests.support.waiting import PROMPTLY, wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"
TALLY = "tests.flow.apps.tally"


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_flow(request, tmp_path):
    """A flow on each broker, with MariaDB as its database."""
    made = Flow(tmp_path, dict(BACKENDS[request.param](request)))
    yield made
    made.close()


def test_the_monitoring_queries_give_the_right_figures(broker_flow, mariadb_server):
    flow = broker_flow
    flow.run(RECORDER)
    completed = [flow.send("thing.happened", {}) for _ in range(5)]
    completed.append(flow.send("thing.happened", {"fail": 1}))
    completed.append(flow.send("single.happened", {}))
    completed.append(flow.send("thing.happened", {"sleep": 2}))
    failed = [flow.send("thing.happened", {"reject": True})]
    flow.wait_for_status(failed[0], "failed")
    # their times are in whole seconds, as the queries read them
    wait_until(lambda: flow.message(completed[-1])["status"] == "completed", 20, "the slow one")
    failed.append(flow.send("thing.happened", {"fail": 9}, max_retries=2))
    flow.send("thing.happened", {}, delay=3600)
    for message_id in completed:
        flow.wait_for_status(message_id, "completed")
    flow.wait_for_status(failed[1], "failed")

    def ask(query):
        return mariadb_server.execute(f"USE {flow.settings.database.name}", query)

    statistics = {row[1]: row for row in ask(QUEUE_STATISTICS)}
    assert {status: row[0::2] for status, row in statistics.items() if status != "completed"} == {
        "failed": ("source", 2),
        "pending": ("source", 1),
    }
    assert statistics["completed"][2] == 8
    assert 2 / 8 <= statistics["completed"][3] <= 1.5
    assert statistics["pending"][3] is None
    rows = ask(FAILED_MESSAGES)
    assert [(row[0], *row[2:5]) for row in rows] == [
        (failed[1], "thing.happened", "told to fail, attempt 3", 2),
        (failed[0], "thing.happened", "told to reject", 0),
    ]
    performance = {row[0]: row for row in ask(PERFORMANCE)}
    assert {kind: row[3] for kind, row in performance.items()} == {
        "thing.happened": 7,
        "single.happened": 1,
    }
    assert performance["thing.happened"][2] in (2, 3)
    assert 0.28 <= performance["thing.happened"][1] <= 1.5


def test_what_is_completed_leaves_nothing_in_redis(flow_on, mariadb_log, redis_server):
    redis_server.empty()
    flow = flow_on({"QUEUE_PROVIDER": "redis", **redis_server.environment, **mariadb_log})
    flow.run(TALLY)
    with redis_server.client(1) as client:
        before = set(client.scan_iter())

        for start in range(0, 10_000, 500):
            flow.send_many([("unit.sent", {"n": n}) for n in range(start, start + 500)])
        flow.wait_for_counts(120, completed=10_000)

        def left():
            return set(client.scan_iter()) - before

        wait_until(lambda: {key.rpartition(":")[2] for key in left()} == {"settled"}, 10, left)
        assert all(0 < client.ttl(key) <= 60 for key in left())
    redis_server.empty()


def test_a_handler_that_outlasts_its_lease_runs_once(broker_flow):
    flow = broker_flow
    flow.run_twice(TALLY, QUEUE_LEASE_SECONDS="1")

    message_id = flow.send("unit.sent", {"n": 1, "sleep": 5})

    message = flow.wait_for_status(message_id, "completed")
    assert [effect["what"] for effect in flow.effects.all()] == ["ran", "done"]
    [delivery] = message["deliveries"]
    assert (delivery["attempts"], delivery["takeovers"]) == (1, 0)


LEASE_SECONDS = 2


@pytest.fixture(scope="module")
def impatient_server():
    """A RabbitMQ that takes back what is not settled in 4 s."""
    server = RabbitMQServer("consumer_timeout = 4000")
    server.start()
    yield server
    server.close()


@pytest.fixture
def impatient(flow_on, mariadb_log, impatient_server):
    """The server, and a flow on it."""
    server = impatient_server
    flow = flow_on(
        {
            "QUEUE_PROVIDER": "rabbitmq",
            "QUEUE_LEASE_SECONDS": str(LEASE_SECONDS),
            "RABBITMQ_CONSUMER_TIMEOUT_SECONDS": "4",
            **server.environment,
            **mariadb_log,
        }
    )
    return flow, server


def test_a_handler_may_take_longer_than_rabbitmq_waits(impatient):
    flow, _ = impatient
    flow.run_twice(TALLY)

    message_id = flow.send("unit.sent", {"n": 1, "sleep": 12})

    message = flow.wait_for_status(message_id, "completed")
    assert [effect["what"] for effect in flow.effects.all()] == ["ran", "done"]
    [delivery] = message["deliveries"]
    assert (delivery["attempts"], delivery["takeovers"]) == (1, 0)
    assert not any("unreachable" in worker.output() for worker in flow.processes)


def test_who_dies_with_what_rabbitmq_has_no_more_is_replaced_within_the_lease(impatient):
    flow, server = impatient
    workers = {worker.pid: worker for worker in flow.run_twice(TALLY)}
    message_id = flow.send("unit.sent", {"n": 1, "sleep": 8})
    [first] = flow.effects.wait_for(1, what="ran")
    wait_until(lambda: not messages_in(server), 10, "the delivery to be moved to the log")

    workers[first["pid"]].kill()
    died = monotonic()

    _, second = flow.effects.wait_for(2, what="ran")
    seconds = monotonic() - died
    print(f"replaced after {seconds:.1f} s, with a lease of {LEASE_SECONDS} s")
    assert second["pid"] != first["pid"]
    assert seconds < LEASE_SECONDS + 1
    message = flow.wait_for_status(message_id, "completed")
    assert message["deliveries"][0]["takeovers"] == 1


def messages_in(server):
    """Return how many messages RabbitMQ has, handed out or not."""
    listed = server.control("list_queues", "--no-table-headers", "messages")
    return sum(map(int, listed.split()))


WAITING = 3_000
"""Retries that wait, each for a time of its own."""

A_CALL = 500


def test_delays_on_rabbitmq_are_kept_and_hold_up_nothing(flow_on, mariadb_log, rabbitmq_server):
    broker = {**rabbitmq_server.environment, "RABBITMQ_VHOST": rabbitmq_server.new_vhost()}
    flow = flow_on({"QUEUE_PROVIDER": "rabbitmq", **broker, **mariadb_log})
    flow.run(RECORDER)
    times = random.Random(1)
    for _ in range(0, WAITING, A_CALL):
        # of minutes and hours: none is due before the end
        waits = [10 ** times.uniform(2.5, 4) for _ in range(A_CALL)]
        flow.send_many([("single.happened", {"retry_after": wait}) for wait in waits])
    flow.wait_for_counts(60 + WAITING / 100, retry=WAITING)

    longer = send_each(flow, "longer", 5, delay=20)
    at_once = send_each(flow, "at once", 100, is_awaited=True)
    second = send_each(flow, "second", 20, delay=1)
    retried = send_each(flow, "retried", 20, retry_after=1)
    numbers = itertools.count()

    def have_long_ones_run():
        # beside them, what never had to wait: both meet what else the machine does meanwhile
        at_once.update(send_each(flow, f"beside {next(numbers)}", 1, is_awaited=True))
        return longer.keys() <= {each["n"] for each in flow.effects.all(what="ran")}

    wait_until(have_long_ones_run, 60, "what has a delay of 20 s", every=0.05)
    flow.wait_for_counts(90, completed=45 + len(at_once), retry=WAITING)

    runs = {(x["n"], x["attempt"]): x["at"] for x in flow.effects.all(what="ran")}
    late = sorted(runs[name, 1] - sent for name, sent in at_once.items())
    seconds = [runs[name, 1] - sent for name, sent in second.items()]
    seconds += [runs[name, 2] - runs[name, 1] for name in retried]
    long_ones = [runs[name, 1] - sent for name, sent in longer.items()]
    p99 = late[len(late) * 99 // 100 - 1]
    print(f"while {WAITING} wait: at once after {late[50]:.3f} s, at p99 {p99:.3f} s; ", end="")
    print(f"1 s after {min(seconds):.2f} to {max(seconds):.2f} s, ", end="")
    print(f"20 s after {min(long_ones):.2f} to {max(long_ones):.2f} s")
    # far less than any of those that wait
    assert p99 < PROMPTLY
    # what is due is at its place in time, and then as late as what never had to wait
    slowest = late[-1]
    assert all(1 <= each <= 1.5 + slowest for each in seconds)
    assert all(20 <= each <= 20 * 1.02 + slowest for each in long_ones)


def send_each(flow, name, count, delay=None, is_awaited=False, **payload):
    """Dispatch so many events, with a name each; return when each was dispatched."""
    sent = {}
    for number in range(count):
        effects = flow.effects.path.stat().st_size
        sent[f"{name} {number}"] = time()
        flow.send("single.happened", {"n": f"{name} {number}", **payload}, delay=delay)
        if is_awaited:
            wait_until(lambda size=effects: flow.effects.path.stat().st_size > size, 10, "a run")
    return sent
