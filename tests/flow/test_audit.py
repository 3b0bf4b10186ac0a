"""Brokers that lose what they have, and the audit that puts it right."""

import json

import amqp
import pytest
import requests
from click.testing import CliRunner

from shared.cli import main
from shared.events.audit import Counting
from shared.providers import make_provider
from shared.providers.rabbitmq.layout import delay_levels
from shared.store import subscriptions
from shared.testing.servers import HOST, free_port
from tests.flow.conftest import BACKENDS
from tests.support.metrics import parsed, value
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

RECORDER = "tests.flow.apps.recorder"
BRISK = "tests.flow.apps.brisk"
TALLY = "tests.flow.apps.tally"


def audit(flow, *options):
    """Run ``queuectl audit``; return its status, and its report."""
    done = CliRunner().invoke(main, ["audit", "--json", *options], env=flow.env)
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout)


def things(numbers):
    """Return events that two workers take seconds for."""
    return [("thing.happened", {"n": n, "sleep": 0.04}) for n in numbers]


def by_subscriber(report, key):
    return {each["subscriber"]: each[key] for each in report["subscriptions"] if each["dispatched"]}


def wait_until_balanced(flow):
    wait_until(lambda: audit(flow)[0] == 0, 10, lambda: str(audit(flow)))


@pytest.fixture
def redis_flow(flow_on, request):
    made = flow_on({**BACKENDS["redis"](request), "QUEUE_LEASE_SECONDS": "1"})
    yield made
    request.getfixturevalue("redis_server").empty()


def test_a_redis_that_was_wiped_in_mid_stream_is_filled_again(redis_flow, redis_server):
    flow = redis_flow
    worker = flow.run(BRISK, arguments=("--config", "config.yml"), MAX_WORKERS="2")
    ids = flow.send_many(things(range(60)))
    flow.effects.wait_for(1, handler="first", what="done")
    assert audit(flow)[0] == 0  # under load
    ids += flow.send_many(things(range(60, 120)))
    long = flow.send("single.happened", {"n": 500})
    late = flow.send("thing.happened", {"n": 501}, delay=4)
    again = flow.send("thing.happened", {"n": 502, "retry_after": 4}, priority="urgent")
    flow.wait_for_status(again, "retry")
    flow.effects.wait_for(1, handler="first", n=60)

    redis_server.empty()

    status, report = audit(flow)
    missing = by_subscriber(report, "missing")
    assert (status, report["balanced"]) == (1, False)
    assert missing["recorder.first"] >= 20
    assert report["missing"] == sum(missing.values())
    assert audit(flow, "--repair")[0] == 0
    for message_id in [*ids, long, late, again]:
        flow.wait_for_status(message_id, "completed", 30)
    wait_until_balanced(flow)
    assert [each["attempt"] for each in flow.effects.all(n=502, handler="first", what="ran")] == [
        1,
        2,
    ]
    times = {each["n"]: each["at"] for each in flow.effects.all(handler="second")}
    assert times[501] >= times[0] + 3.9
    assert worker.process.poll() is None


def two_that_wait(flow):
    """Dispatch two events to a worker that is stopped; return their ids."""
    worker = flow.run(BRISK)
    flow.wait_for_status(flow.send("single.happened", {"n": 1}), "completed")
    worker.stop()
    return [flow.send("single.happened", {"n": n}) for n in (2, 3)]


def test_what_was_removed_from_redis_by_hand_is_missed_and_comes_back(redis_flow, redis_server):
    """Given a worker, and of two deliveries that wait one without envelope, one in no place."""
    flow = redis_flow
    bare, placeless = two_that_wait(flow)
    with redis_server.client(1) as client:
        [waiting] = client.keys("*:waiting")
        [messages] = client.keys("*:messages")
        [first, second] = client.zrange(waiting, 0, -1)
        client.hdel(messages, first)
        client.zrem(waiting, second)
    # the log hears a moment later that they were published
    wait_until(lambda: audit(flow)[1]["missing"] == 2, 10, lambda: str(audit(flow)))

    assert audit(flow, "--repair")[0] == 0

    flow.run(BRISK)
    for each in (bare, placeless):
        flow.wait_for_status(each, "completed")


def test_a_worker_that_meets_an_envelope_that_is_gone_goes_on(redis_flow, redis_server):
    """Given a worker that reserves it before any audit."""
    flow = redis_flow
    bare, other = two_that_wait(flow)
    with redis_server.client(1) as client:
        [messages] = client.keys("*:messages")
        client.hdel(messages, min(client.hkeys(messages), key=int))

    worker = flow.run(BRISK)
    flow.wait_for_status(other, "completed")
    assert "no readable envelope" in worker.output()
    assert audit(flow, "--repair")[0] == 0
    flow.wait_for_status(bare, "completed")


def test_a_redis_that_is_down_is_no_balance(redis_flow):
    """Given nothing that waits there."""
    CliRunner().invoke(main, ["db", "upgrade"], env=redis_flow.env, catch_exceptions=False)
    assert audit(redis_flow)[0] == 0
    env = {**redis_flow.env, "REDIS_HOST": HOST, "REDIS_PORT": str(free_port())}
    done = CliRunner().invoke(main, ["audit"], env=env)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Redis at" in done.stderr


def test_where_there_is_no_log_none_is_made(tmp_path):
    done = CliRunner().invoke(main, ["audit"], env={"QUEUE_DATA_DIR": str(tmp_path)})
    assert done.exit_code == 1
    assert "there is no message log; see QUEUE_DATA_DIR" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_its_worker_had_when_redis_was_wiped_is_taken_over(redis_flow, redis_server):
    """Given a worker that dies with the Redis that knew what it had in hand."""
    flow = redis_flow
    worker = flow.run(BRISK)
    message_id = flow.send("single.happened", {"n": 1})
    flow.wait_for_status(message_id, "completed")
    busy = flow.send("thing.happened", {"n": 2, "sleep": 60})
    flow.effects.wait_for(1, n=2, handler="first")
    flow.wait_for_status(busy, "processing")
    worker.kill()
    redis_server.empty()

    assert by_subscriber(audit(flow, "--repair")[1], "missing")["recorder.first"] == 1

    flow.run(BRISK)
    flow.effects.wait_for(2, n=2, handler="first", what="ran", timeout=15)


def test_a_worker_goes_on_with_what_redis_lost(redis_flow, redis_server):
    flow = redis_flow
    flow.run(BRISK)
    message_id = flow.send("thing.happened", {"n": 1, "sleep": 2.5})
    flow.effects.wait_for(1, handler="first", what="ran")
    flow.wait_for_status(message_id, "processing")

    redis_server.empty()
    audit(flow, "--repair")

    flow.wait_for_status(message_id, "completed")
    assert len(flow.effects.all(handler="first", what="ran")) == 1


@pytest.fixture
def rabbit(request, flow_on, monkeypatch):
    # still longer than anything is in hand without the log's knowing
    monkeypatch.setattr(Counting, "seconds", 1.0)
    made = flow_on(BACKENDS["rabbitmq"](request))
    env = made.env
    connection = amqp.Connection(
        f"{HOST}:{env['RABBITMQ_PORT']}",
        env["RABBITMQ_USERNAME"],
        env["RABBITMQ_PASSWORD"],
        virtual_host=env["RABBITMQ_VHOST"],
    )
    connection.connect()
    yield made, connection.channel()
    connection.close()


def test_a_queue_of_rabbitmq_that_was_deleted_is_filled_again(rabbit):
    """Given one of two subscriptions of a type; what the other had is not repeated."""
    flow, channel = rabbit
    arguments = {"arguments": ("--config", "config.yml"), "MAX_WORKERS": "2"}
    flow.run(BRISK, **arguments)
    ids = flow.send_many(things(range(60)))
    flow.effects.wait_for(1, handler="first", what="done")
    assert audit(flow)[0] == 0  # under load
    ids += flow.send_many(things(range(60, 120)))
    late = flow.send("thing.happened", {"n": 501}, delay=3)
    flow.effects.wait_for(1, handler="first", n=60)

    channel.queue_delete("evt-source-thing.happened--recorder.first")

    status, report = audit(flow)
    missing = by_subscriber(report, "missing")
    assert status == 1
    assert missing["recorder.first"] >= 20
    assert missing["recorder.second"] == 0
    assert audit(flow, "--repair")[0] == 0
    for message_id in [*ids, late]:
        flow.wait_for_status(message_id, "completed", 30)
    wait_until_balanced(flow)
    handled = [each["n"] for each in flow.effects.all(handler="second")]
    assert len(handled) == len(set(handled)) == 121


def publish(flow, event_type, payload):
    """Dispatch by queuectl; return the message id, and what is said beside it."""
    command = ["publish", "--json", "source", event_type, json.dumps(payload)]
    done = CliRunner().invoke(main, command, env=flow.env)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["messageId"], done.stderr


@pytest.mark.parametrize("by", ["service", "command"])
def test_what_a_queue_of_rabbitmq_misses_that_is_unbound_comes_at_once(rabbit, by, caplog):
    """Given the one subscription of a type, whose service runs."""
    flow, channel = rabbit
    flow.run(TALLY)
    queue = "evt-source-unit.sent--tally.count"
    channel.queue_unbind(queue, "source.events", "unit.sent")

    if by == "service":
        message_id, errors = flow.send("unit.sent", {"n": 1}), ""
    else:
        message_id, errors = publish(flow, "unit.sent", {"n": 1})

    # of itself it would be tried after half a minute, with the same result
    flow.wait_for_status(message_id, "completed", 10)
    notice = f"{queue}: was not bound to source.events"
    wait_until(lambda: notice in caplog.text + errors, 10, lambda: caplog.text + errors)
    later = amqp.Message(b'{"n": 2}', content_type="application/json")
    channel.basic_publish(later, "source.events", "unit.sent")
    flow.effects.wait_for(1, n=2)


def test_what_waits_for_its_time_in_rabbitmq_keeps_it(rabbit):
    flow, channel = rabbit
    flow.run(BRISK)
    late = flow.send("thing.happened", {"n": 1}, delay=5)
    flow.wait_for_counts(pending=1)
    wait_until(lambda: by_subscriber(audit(flow)[1], "inLog")["recorder.first"] == 0, 5, "it")
    for level in range(delay_levels(5)[0] + 1):
        channel.queue_purge(f"nameko.delay.{level}")

    assert by_subscriber(audit(flow, "--repair")[1], "missing") == {
        "recorder.first": 1,
        "recorder.second": 1,
    }

    message = flow.wait_for_status(late, "completed", 20)
    assert message["deliveries"][0]["startedAt"] >= message["scheduledAt"]


def test_delay_queues_of_rabbitmq_that_were_deleted_are_made_again(rabbit):
    """Given a service that has used them, and whose retries are due at once without them."""
    flow, channel = rabbit
    provider = make_provider(flow.settings)
    provider.initialize()

    def retry_and_wait(n):
        flow.send("single.happened", {"n": n, "retry_after": 60})
        wait_until(lambda: provider.count_delayed() == 1, 10, f"retry {n} in a delay queue")

    flow.run(RECORDER)
    retry_and_wait(1)
    for level in range(delay_levels(60)[0] + 1):
        channel.queue_delete(f"nameko.delay.{level}")
    retry_and_wait(2)
    provider.close()


class Pauses:
    """A subscription that its operator pauses, by a queue_admin that makes no audits."""

    def __init__(self, flow):
        self.flow = flow
        self.address = f"http://{HOST}:{free_port()}"
        self.worker = flow.run(BRISK)
        address = self.address.removeprefix("http://")
        flow.run("services.queue_admin", QUEUE_AUDIT_SECONDS="0", QUEUE_ADMIN_ADDRESS=address)
        wait_until(self._answers, 20, "queue_admin")
        shown = requests.get(f"{self.address}/queue/subscriptions", timeout=10).json()
        [self.id] = [
            each["id"] for each in shown["subscriptions"] if each["subscriber"] == "recorder.first"
        ]

    def _answers(self):
        try:
            return requests.get(f"{self.address}/queue/health", timeout=10).ok
        except requests.ConnectionError:
            return False

    def call(self, word):
        where = f"{self.address}/queue/subscriptions/{self.id}/{word}"
        requests.post(where, timeout=10).raise_for_status()

    def send(self, n):
        """Send what both subscriptions get; return once the one that goes on has handled it."""
        message_id = self.flow.send("thing.happened", {"n": n})
        self.flow.effects.wait_for(1, handler="second", n=n)
        return message_id

    def lasts(self):
        """Whether what was sent waits, and is in the provider's hands."""
        its = audit(self.flow)[1]["subscriptions"]
        [first] = [each for each in its if each["subscriber"] == "recorder.first"]
        return first["inProvider"] == first["waiting"] > 0


def test_a_pause_that_redis_lost_holds_again_after_a_repair(redis_flow, redis_server):
    """Given a Redis that is wiped, and with it what it knew of pauses."""
    flow = redis_flow
    pauses = Pauses(flow)
    pauses.call("pause")
    assert audit(flow)[0] == 0
    ids = [pauses.send(1)]
    wait_until(pauses.lasts, 20, lambda: str(audit(flow)))

    redis_server.empty()

    status, report = audit(flow)
    assert (status, report["balanced"], report["unpaused"]) == (1, False, 1)
    assert audit(flow, "--repair")[0] == 0
    ids.append(pauses.send(2))
    wait_until(pauses.lasts, 20, lambda: str(audit(flow)))
    assert audit(flow)[1]["unpaused"] == 0
    assert flow.effects.all(handler="first") == []

    pauses.call("resume")
    for message_id in ids:
        flow.wait_for_status(message_id, "completed")
    assert audit(flow)[1]["unpaused"] == 0


def test_a_pause_that_rabbitmq_lost_holds_again_after_a_repair(rabbit):
    """Given workers that start anew after the queue was deleted that stands for the pause."""
    flow, channel = rabbit
    pauses = Pauses(flow)
    pauses.call("pause")
    assert audit(flow)[0] == 0
    pauses.worker.kill()

    channel.queue_delete("evt-source-thing.happened--recorder.first.paused")

    assert audit(flow)[1]["unpaused"] == 1
    assert audit(flow, "--repair")[0] == 0
    flow.run(BRISK)
    message_id = pauses.send(1)
    wait_until(pauses.lasts, 20, lambda: str(audit(flow)))
    assert flow.effects.all(handler="first") == []

    pauses.call("resume")
    flow.wait_for_status(message_id, "completed")


@pytest.mark.parametrize("name", ["redis", "rabbitmq"])
def test_a_pause_that_the_provider_alone_has_is_taken_back(request, name):
    """Given a queue_admin that died while it paused: nobody would ever know what is waited for."""
    flow = request.getfixturevalue("redis_flow" if name == "redis" else "rabbit")
    flow = flow if name == "redis" else flow[0]
    pauses = Pauses(flow)
    assert audit(flow)[0] == 0
    with flow.reading() as connection:
        [subscription] = [x for x in subscriptions.active(connection) if x.id == pauses.id]
    provider = make_provider(flow.settings)
    provider.initialize()
    provider.pause(subscription)
    provider.close()
    message_id = pauses.send(1)
    wait_until(pauses.lasts, 20, lambda: str(audit(flow)))

    status, report = audit(flow)
    assert (status, report["withheld"], report["unpaused"]) == (1, 1, 0)
    assert flow.effects.all(handler="first") == []
    assert audit(flow, "--repair")[0] == 0

    flow.wait_for_status(message_id, "completed")
    assert audit(flow)[0] == 0


def test_queue_admin_puts_right_what_a_broker_lost(redis_flow, redis_server):
    flow = redis_flow
    address = f"{HOST}:{free_port()}"
    env = {"QUEUE_AUDIT_SECONDS": "0.3", "QUEUE_ADMIN_ADDRESS": address}
    process = flow.run(RECORDER, "services.queue_admin", **env)
    ids = flow.send_many([("thing.happened", {"n": n}) for n in range(20)], delay=2)
    # of both: what is published after the wipe is not missing
    wait_until(lambda: sum(by_subscriber(audit(flow)[1], "inProvider").values()) == 40, 5, "it")

    redis_server.empty()

    wait_until(lambda: "audit: 40 deliveries missing" in process.output(), 10, process.output)

    def told(name, **labels):
        return value(
            parsed(requests.get(f"http://{address}/metrics", timeout=10).text), name, **labels
        )

    wait_until(lambda: told("audits_total", result="repaired") == 1, 5, "the count")
    assert told("audit_repaired_total", what="delivery") == 40
    assert told("audits_total", result="balanced") > 0
    for message_id in ids:
        flow.wait_for_status(message_id, "completed", 5)
