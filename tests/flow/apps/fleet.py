"""A fleet that moves from one provider to another: who dispatches steadily, and who handles."""

import itertools
import os
from pathlib import Path

import eventlet
from nameko.timer import timer

from shared.errors import Reject, Retry
from shared.events import Backoff, EventDispatcher, MessageContext, event_handler
from tests.flow.apps.recorder import record

PER_SECOND = float(os.environ.get("PER_SECOND", "20"))
MENDED = Path(os.environ["EFFECTS"] + ".mended")
"""Once it is there, what is broken succeeds."""

SLOW_SECONDS = float(os.environ.get("SLOW_SECONDS", "0.02"))


class Ticker:
    """Dispatches steadily; what it dispatched it writes down."""

    name = "ticker"

    dispatch = EventDispatcher()
    numbers = itertools.count()

    @timer(interval=1 / PER_SECOND)
    def tick(self):
        n = f"{os.getpid()}-{next(self.numbers)}"
        self.dispatch("task.sent", {"n": n})
        record(what="sent", n=n)


class Crew:
    """Handles what the ticker and the tests dispatch."""

    name = "crew"

    message = MessageContext()

    def note(self, handler, payload):
        record(
            what="ran",
            handler=handler,
            n=payload["n"],
            attempt=self.message.attempt,
            provider=os.environ["QUEUE_PROVIDER"],
        )

    @event_handler("ticker", "task.sent")
    def quick(self, payload):
        self.note("quick", payload)

    @event_handler("source", "task.sent", backoff=Backoff(base=0.05, factor=2, cap=1))
    def slow(self, payload):
        if payload.get("is_broken") and not MENDED.exists():
            raise Reject("told to")
        if "again_in" in payload and self.message.attempt == 1:
            raise Retry(after=payload["again_in"])
        eventlet.sleep(payload.get("sleep", SLOW_SECONDS))
        self.note("slow", payload)

    @event_handler("source", "task.sent")
    def beside(self, payload):
        self.note("beside", payload)

    @event_handler("source", "task.put_off")
    def later(self, payload):
        self.note("later", payload)

    @event_handler("source", "task.halted")
    def halted(self, payload):
        self.note("halted", payload)
