"""The fleet that benchmarks/moving.py moves: who dispatches steadily, and who handles."""

import itertools
import os
from pathlib import Path

import eventlet
from nameko.testing.services import dummy
from nameko.timer import timer

from shared.errors import Reject
from shared.events import EventDispatcher, event_handler

EFFECTS = os.environ["EFFECTS"]
MENDED = Path(EFFECTS + ".mended")
"""Once it is there, what is broken succeeds."""

HOLD_SECONDS = float(os.environ.get("HOLD_SECONDS", "0"))
PER_TICK = int(os.environ.get("PER_TICK", "10"))
TICK_SECONDS = 0.1


def note(*words):
    """Append a line: the account that is not the log's."""
    descriptor = os.open(EFFECTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


class Ticker:
    """What it dispatched it writes down, once it is stored."""

    name = "ticker"

    dispatch = EventDispatcher()
    numbers = itertools.count()

    @timer(interval=TICK_SECONDS)
    def tick(self):
        some = [f"{os.getpid()}-{next(self.numbers)}" for _ in range(PER_TICK)]
        self.dispatch.many([("tick.sent", {"n": n}) for n in some])
        note("sent", *some)


class Source:
    name = "source"

    dispatch = EventDispatcher()

    @dummy
    def send(self, events, options):
        return self.dispatch.many(events, **options)


class Crew:
    name = "crew"

    @event_handler("ticker", "tick.sent")
    def tick(self, payload):
        note("tick", payload["n"])

    @event_handler("source", "work.sent")
    def work(self, payload):
        # slow until the move is over, so that there is something to move
        if not MENDED.exists():
            eventlet.sleep(HOLD_SECONDS)
        note("work", payload["n"])

    @event_handler("source", "work.put_off")
    def later(self, payload):
        note("later", payload["n"])

    @event_handler("source", "work.broken", max_retries=0)
    def broken(self, payload):
        if not MENDED.exists():
            raise Reject("told to")
        note("broken", payload["n"])
