"""A service whose handlers do what the payload says, and record each time they ran."""

import json
import os
import time

import eventlet

from shared.errors import Reject, Retry
from shared.events import Backoff, EventDispatcher, MessageContext, event_handler

FAST = Backoff(base=0.05, factor=2, cap=1)


def record(**effect):
    line = json.dumps({**effect, "pid": os.getpid(), "at": time.time()}) + "\n"
    descriptor = os.open(os.environ["EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


class Recorder:
    name = "recorder"

    message = MessageContext()
    dispatch = EventDispatcher()

    def note(self, handler, payload, what="ran"):
        record(
            handler=handler,
            what=what,
            id=self.message.id,
            n=payload.get("n"),
            attempt=self.message.attempt,
        )

    @event_handler("source", "thing.happened", backoff=FAST)
    def first(self, payload):
        self.note("first", payload)
        self.obey(payload)
        self.note("first", payload, "done")

    @event_handler("source", "thing.happened")
    def second(self, payload):
        self.note("second", payload)

    @event_handler("source", "single.happened", backoff=FAST, timeout=0.3)
    def timed(self, payload):
        self.note("timed", payload)
        self.obey(payload)
        self.note("timed", payload, "done")

    @event_handler("source", "chain.begun")
    def forward(self, payload):
        self.note("forward", payload)
        self.dispatch("chain.ended", payload)

    @event_handler("recorder", "chain.ended")
    def end_of_chain(self, payload):
        record(handler="end_of_chain", what="ran", stack=self.message.metadata["nameko"])

    @event_handler("source", "stubborn.happened", requeue_on_error=True, backoff=FAST)
    def stubborn(self, payload):
        self.note("stubborn", payload)
        self.obey(payload)

    def obey(self, payload):
        if self.message.attempt <= payload.get("fail", 0):
            raise ValueError(f"told to fail, attempt {self.message.attempt}")
        if payload.get("reject"):
            raise Reject("told to reject")
        if self.message.attempt == 1 and "retry_after" in payload:
            raise Retry(after=payload["retry_after"])
        if "sleep" in payload:
            eventlet.sleep(payload["sleep"])
        if "burn" in payload:
            end = time.monotonic() + payload["burn"]
            while time.monotonic() < end:
                pass
