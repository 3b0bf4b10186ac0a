"""Servers that are killed, stopped, frozen and started again while events flow."""

import os
import signal
from collections import Counter
from statistics import quantiles
from time import perf_counter

import eventlet
import pytest
import requests

from shared.errors import DispatchError, DispatchUncertainError
from shared.testing.servers import (
    HOST,
    RabbitMQServer,
    RedisServer,
    Server,
    free_port,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

TALLY = "tests.flow.apps.tally"

EVENTS = 5000
A_CALL = 50

SECONDS = 120

DEATHS = 6

SLOWEST_DISPATCH_SECONDS = 1.0
"""At p99, on a machine whose processors others use as well; alone it takes a few milliseconds.
Who waited for the broker would take several seconds."""

KINDS = {
    # each write is on the disk before it is answered: with everysec, one that a running fsync
    # puts off is answered without having left the process, and a kill then loses it
    "redis": lambda: RedisServer("--appendfsync", "always"),
    "rabbitmq": RabbitMQServer,
}


@pytest.fixture(params=list(KINDS))
def broker(request):
    """A broker of the test's own, which it may kill."""
    server = KINDS[request.param]()
    server.start()
    yield server
    server.close()


def on(server):
    """Return the settings for a broker."""
    provider = {RedisServer: "redis", RabbitMQServer: "rabbitmq"}[type(server)]
    return {"QUEUE_PROVIDER": provider, **server.environment}


def kill(server):
    server.kill()


def stop(server):
    # RabbitMQ's own way of stopping is a kill as well
    Server.stop(server)


class Stream:
    """Events that are dispatched all the while, and what came of them."""

    def __init__(self, flow):
        self.flow = flow
        self.sent = {}
        self.uncertain = set()
        self._thread = eventlet.spawn(self._dispatch)

    def _dispatch(self):
        for start in range(0, EVENTS, A_CALL):
            numbers = range(start, start + A_CALL)
            ids = self._stored([("unit.sent", {"n": n}) for n in numbers])
            self.sent |= dict(zip(ids, numbers, strict=True))
            # so long that the servers come and go within the stream
            eventlet.sleep(0.1)

    def _stored(self, events):
        while True:
            try:
                return self.flow.send_many(events)
            except DispatchUncertainError as exc:
                self.uncertain |= set(exc.message_ids)
            except DispatchError:
                eventlet.sleep(0.2)

    @property
    def handled(self):
        """How often a handler ran."""
        path = self.flow.effects.path
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait_for(self, handled):
        wait_until(lambda: self.handled >= handled, SECONDS, lambda: f"{handled}: {self.handled}")

    def check(self, what):
        """See that all were delivered, and print how many were more than once."""
        self._thread.wait()
        wait_until(self._is_completed, SECONDS, lambda: str(self.flow.stats()), every=0.1)
        runs = Counter(effect["id"] for effect in self.flow.effects.all(what="ran"))
        assert self.sent.keys() <= runs.keys() <= self.sent.keys() | self.uncertain
        stats = self.flow.stats()
        assert stats["total"] == stats["completed"] == len(runs)
        print(f"{what}: {len(runs)} events, {runs.total() - len(runs)} runs more than that")

    def _is_completed(self):
        stats = self.flow.stats()
        return stats["completed"] == stats["total"] >= EVENTS


class Health:
    """What queue_admin, a process of its own, says."""

    def __init__(self, flow):
        self._address = f"{HOST}:{free_port()}"
        flow.run("services.queue_admin", QUEUE_ADMIN_ADDRESS=self._address)
        self.wait_for(200)

    def get(self):
        return requests.get(f"http://{self._address}/queue/health", timeout=15)

    def wait_for(self, status):
        wait_until(lambda: self.get().status_code == status, 60, lambda: self.get().text)


def restarts(stream, health, server):
    """Have a server end and start again twice within a stream."""
    for number, end in enumerate((kill, stop), start=1):
        stream.wait_for(EVENTS // 4 * number)
        end(server)
        health.wait_for(503)
        server.start()
        health.wait_for(200)


def test_all_is_delivered_when_the_broker_is_restarted(flow_on, mariadb_log, broker):
    flow = flow_on({**on(broker), **mariadb_log})
    worker = flow.run(TALLY)
    health = Health(flow)
    stream = Stream(flow)

    restarts(stream, health, broker)

    stream.check(type(broker).__name__)
    assert worker.output().count("provider is reachable again") == 2


def test_all_is_delivered_when_the_database_is_restarted(mariadb_flow, broker):
    flow, server = mariadb_flow
    flow.env |= on(broker)
    worker = flow.run(TALLY)
    health = Health(flow)
    stream = Stream(flow)

    restarts(stream, health, server)

    stream.check(f"MariaDB beside {type(broker).__name__}")
    # one that was over before it had anything to store it need not have noticed
    assert worker.output().count("reachable again") >= 1


def test_a_broker_that_is_away_holds_up_no_dispatch(flow_on, mariadb_log, broker):
    flow = flow_on({**on(broker), **mariadb_log})
    worker = flow.run(TALLY, arguments=("--config", "config.yml"), MAX_WORKERS="1")
    flow.send("unit.sent", {"n": 0})

    times = {"up": dispatched(flow, range(1, 200))}
    flow.wait_for_counts(completed=200)
    broker.kill()
    times["down"] = dispatched(flow, range(200, 400))
    broker.start()
    flow.wait_for_counts(completed=400)
    os.kill(broker.process.pid, signal.SIGSTOP)
    times["frozen"] = dispatched(flow, range(400, 600))
    wait_until(lambda: worker.output().count("provider unreachable") == 2, 60, worker.output)
    times["frozen"] += dispatched(flow, range(600, 800))
    os.kill(broker.process.pid, signal.SIGCONT)
    flow.wait_for_counts(completed=800)

    slowest = {state: quantiles(its, n=100)[-1] for state, its in times.items()}
    shown = ", ".join(f"{state} {1000 * p99:.1f} ms" for state, p99 in slowest.items())
    print(f"dispatch at p99, {type(broker).__name__}: {shown}")
    assert max(slowest.values()) < SLOWEST_DISPATCH_SECONDS
    numbers = list(dict.fromkeys(effect["n"] for effect in flow.effects.all(what="ran")))
    assert numbers == list(range(800))


def dispatched(flow, numbers):
    """Dispatch one after the other; return how long each took, in seconds."""
    return [seconds_of(flow.send, "unit.sent", {"n": n}) for n in numbers]


def seconds_of(function, *args):
    began = perf_counter()
    function(*args)
    return perf_counter() - began


def test_a_service_starts_without_its_broker_and_connects_when_it_comes(
    flow_on, mariadb_log, broker
):
    flow = flow_on({**on(broker), **mariadb_log})
    broker.kill()

    worker = flow.run(TALLY, wait=False)
    wait_until(lambda: "provider unreachable" in worker.output(), 20, worker.output)
    wait_until(lambda: "starting services" in worker.output(), 20, worker.output)
    broker.start()

    wait_until(lambda: "queue ready" in worker.output(), 20, worker.output)
    message_id = flow.send("unit.sent", {"n": 1})
    flow.wait_for_status(message_id, "completed")


def test_what_a_dead_process_stored_is_relayed_by_another(flow_on, mariadb_log, broker):
    flow = flow_on({**on(broker), **mariadb_log})
    flow.run("tests.flow.apps.hasty")
    provider = {RedisServer: "OnRedis", RabbitMQServer: "OnRabbitMQ"}[type(broker)]

    for number in range(DEATHS):
        dying = flow.run(
            "tests.flow.apps.dying",
            wait=False,
            QUEUE_PROVIDER=f"tests.flow.apps.dying:{provider}",
            NUMBER=str(number),
        )
        assert dying.process.wait(30) == 9, dying.output()

    # what the last one had in hand is free 2 s later, and looked for each 0.5 s
    wait_until(lambda: flow.stats()["completed"] == flow.stats()["total"], 5, "the relay")
    assert {effect["n"] for effect in flow.effects.all(what="ran")} == set(range(DEATHS))
