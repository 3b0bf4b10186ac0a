"""A service whose handlers fail until they are mended, and record each time they ran."""

import os
from pathlib import Path

from shared.events import EventDispatcher, MessageContext, event_handler
from tests.flow.apps.recorder import record


class Patient:
    name = "patient"

    message = MessageContext()
    dispatch = EventDispatcher()

    @event_handler("source", "patient.asked")
    def first(self, payload):
        if payload.get("fail") and not Path(os.environ["MENDED"]).exists():
            refuse(payload)
        record(handler="first", id=self.message.id, payload=payload)

    @event_handler("source", "patient.asked")
    def second(self, payload):
        record(handler="second", id=self.message.id, payload=payload)

    @event_handler("source", "chain.begun")
    def forward(self, payload):
        for _ in range(2):
            self.dispatch("chain.ended", payload)

    @event_handler("patient", "chain.ended")
    def end(self, payload):
        record(handler="end", id=self.message.id, payload=payload)


def refuse(payload):
    kinds = {"value": ValueError, "key": KeyError, "lookup": LookupError}
    raise kinds[payload["fail"]](payload.get("say", "as told"))
