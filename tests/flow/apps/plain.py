"""Services as they are written for plain nameko.

They run as they are, and with ``shared.events`` in place of ``nameko.events``: see
``as_if_moved`` in ``tests/flow/plainly.py``.
"""

import json
import os
from pathlib import Path

from nameko.dependency_providers import Config
from nameko.events import BROADCAST, SINGLETON, EventDispatcher, EventHandler, event_handler
from nameko.extensions import DependencyProvider
from nameko.testing.services import dummy


def record(handler, **effect):
    line = json.dumps({"handler": handler, **effect, "pid": os.getpid()}) + "\n"
    descriptor = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


class ExpectedError(Exception):
    pass


class WorkerData(DependencyProvider):
    """What nameko knows of a worker."""

    def get_dependency(self, worker_ctx):
        return worker_ctx


class Noting(EventHandler):
    """Sees what its handlers return and raise, and lets nothing get lost."""

    @property
    def broadcast_identifier(self):
        return "host-1"

    def handle_result(self, message, worker_ctx, result=None, exc_info=None):
        raised = exc_info and exc_info[0].__name__
        record("result", method=worker_ctx.entrypoint.method_name, result=result, raised=raised)
        return super().handle_result(message, worker_ctx, result, exc_info)

    def handle_message_processed(self, message, result=None, exc_info=None):
        if exc_info is not None and isinstance(exc_info[1], ExpectedError):
            exc_info = None
        super().handle_message_processed(message, result, exc_info)


class Requeueing(EventHandler):
    """Says itself what becomes of a message: the first is given back, the next is done with."""

    requeued = 0

    def handle_result(self, message, worker_ctx, result=None, exc_info=None):
        if self.requeued:
            self.queue_consumer.ack_message(message)
        else:
            self.queue_consumer.requeue_message(message)
        self.requeued += 1
        return result, exc_info


noting_handler = Noting.decorator
requeueing_handler = Requeueing.decorator


class Shop:
    name = "shop"

    config = Config()
    dispatch = EventDispatcher()
    dispatch_surely = EventDispatcher(
        retry=True, retry_policy={"max_retries": 5}, use_confirms=True, delivery_mode=2
    )
    dispatcher = EventDispatcher()
    worker = WorkerData()

    @dummy
    def sell(self, event_type, payload):
        self.dispatch(event_type, payload)
        return self.worker.call_id

    @dummy
    def sell_surely(self, event_type, payload):
        self.dispatch_surely(event_type, payload)


class Warehouse:
    name = "warehouse"

    dispatch = EventDispatcher()
    worker = WorkerData()

    def note(self, handler, payload, **more):
        record(handler, payload=payload, instance=id(self.worker.container), **more)

    @event_handler("shop", "item.sold")
    def pack(self, payload):
        self.note("pack", payload)

    @event_handler("shop", "item.counted", handler_type=SINGLETON)
    def count(self, payload):
        self.note("count", payload)

    @event_handler("shop", "shop.opened", handler_type=BROADCAST, reliable_delivery=False)
    def open(self, payload):
        self.note("open", payload)

    @event_handler("shop", "item.seen", reliable_delivery=False)
    def look(self, payload):
        self.note("look", payload)

    @noting_handler("shop", "shop.closed", handler_type=BROADCAST)
    def close(self, payload):
        self.note("close", payload)
        return "closed"

    @noting_handler("shop", "item.broken", requeue_on_error=True)
    def mend(self, payload):
        self.note("mend", payload)
        raise ExpectedError("is not to be mended")

    @requeueing_handler("shop", "item.spilt")
    def wipe(self, payload):
        self.note("wipe", payload)
        raise ValueError("spilt it")

    @event_handler("shop", "item.dropped", requeue_on_error=True)
    def pick_up(self, payload):
        self.note("pick_up", payload)
        file = Path(payload["until"])
        if not file.exists():
            file.touch()
            raise ValueError("dropped it again")

    @event_handler(
        "shop",
        "item.returned",
        expected_exceptions=ExpectedError,
        sensitive_arguments="payload.card",
    )
    def take_back(self, payload):
        self.note("take_back", payload)
        raise ExpectedError("not wanted")

    @event_handler("shop", "item.lost")
    def look_for(self, payload):
        context = self.worker.context_data
        self.note("look_for", payload, stack=context["call_id_stack"], language=self.language())
        self.dispatch("search.begun", payload)

    def language(self):
        return self.worker.context_data.get("language")

    @event_handler("warehouse", "search.begun")
    def search(self, payload):
        context = self.worker.context_data
        self.note("search", payload, stack=context["call_id_stack"], language=self.language())


class Office:
    """Shares its only queue with whoever else counts items."""

    name = "office"

    worker = WorkerData()

    @event_handler("shop", "item.counted", handler_type=SINGLETON)
    def count(self, payload):
        record("count", payload=payload, instance=id(self.worker.container))
