"""Services on plain nameko, which know nothing of ours."""

import json
import os

from nameko.events import EventDispatcher, event_handler
from nameko.extensions import DependencyProvider
from nameko.rpc import rpc


def record(handler, **effect):
    line = json.dumps({"handler": handler, **effect, "pid": os.getpid()}) + "\n"
    descriptor = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


class WorkerData(DependencyProvider):
    def get_dependency(self, worker_ctx):
        return worker_ctx


class AuthEvents:
    name = "auth_events"

    dispatch = EventDispatcher()

    @rpc
    def register(self, payloads):
        for payload in payloads:
            self.dispatch("user.registered", payload)


class Greeter:
    name = "greeter"

    worker = WorkerData()

    @event_handler("auth_events", "user.registered")
    def greet(self, payload):
        record("greet", payload=payload, stack=self.worker.context_data["call_id_stack"])

    @event_handler("source", "thing.happened")
    def note(self, payload):
        record("note", payload=payload, stack=self.worker.context_data["call_id_stack"])
