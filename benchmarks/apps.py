"""The services that the benchmarks run."""

import json
import os
import time
from pathlib import Path

import eventlet
from nameko import events as nameko_events
from nameko.testing.services import dummy

from shared.events import EventDispatcher, MessageContext, event_handler

REGISTRATION = {
    "user_id": "7f8a8f2e-0f5b-4d0e-9a55-2f1c0f7a1c11",
    "email": "user@example.com",
    "first_name": "John",
    "last_name": "Doe",
    "role": "user",
    "company_name": "Example",
    "company_domain": "example.com",
}
"""The payload of each event: that of a registration."""


class Producer:
    name = "auth_events"

    dispatch = EventDispatcher()

    @dummy
    def many(self, count, size):
        for _ in range(count // size):
            self.dispatch.many([("user.registered", REGISTRATION)] * size)

    @dummy
    def singly(self, count):
        for _ in range(count):
            self.dispatch("user.registered", REGISTRATION)

    @dummy
    def at_once(self, count, workers):
        pool = eventlet.GreenPool(workers)
        for _ in range(workers):
            pool.spawn(self.singly, count // workers)
        pool.waitall()

    @dummy
    def steadily(self, count, seconds):
        start = time.monotonic()
        for n in range(count):
            time.sleep(max(0, start + n * seconds - time.monotonic()))
            self.dispatch("probe.sent", {"at": time.time()})


class Consumer:
    name = "consumer"

    @event_handler("auth_events", "user.registered")
    def register(self, payload):
        pass

    @event_handler("auth_events", "probe.sent")
    def probe(self, payload):
        with Path(os.environ["PROBES"]).open("a") as file:
            file.write(json.dumps(time.time() - payload["at"]) + "\n")


class Listener:
    """Notes which registrations it heard of, in the order in which it did."""

    name = "listener"

    message = MessageContext()

    @event_handler("auth_events", "user.registered")
    def hear(self, payload):
        with Path(os.environ["PROBES"]).open("a") as file:
            file.write(f"{self.message.id}\n")


class PlainProducer:
    name = "auth_events"

    dispatch = nameko_events.EventDispatcher()

    @dummy
    def many(self, count, size):
        self.singly(count)

    @dummy
    def singly(self, count):
        for _ in range(count):
            self.dispatch("user.registered", REGISTRATION)

    @dummy
    def steadily(self, count, seconds):
        start = time.monotonic()
        for n in range(count):
            time.sleep(max(0, start + n * seconds - time.monotonic()))
            self.dispatch("probe.sent", {"at": time.time()})


COUNT = Path(os.environ.get("PROBES", "/dev/null")).with_name("probes.count")


class PlainConsumer:
    name = "consumer"

    @nameko_events.event_handler("auth_events", "user.registered")
    def register(self, payload):
        with COUNT.open("ab") as file:
            file.write(b".")

    @nameko_events.event_handler("auth_events", "probe.sent")
    def probe(self, payload):
        with Path(os.environ["PROBES"]).open("a") as file:
            file.write(json.dumps(time.time() - payload["at"]) + "\n")
