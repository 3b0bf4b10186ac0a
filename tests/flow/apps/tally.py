"""A service that records each event that it gets, once for each time that it got it."""

import eventlet

from shared.events import MessageContext, event_handler
from tests.flow.apps.recorder import record


class Tally:
    name = "tally"

    message = MessageContext()

    @event_handler("source", "unit.sent")
    def count(self, payload):
        record(id=self.message.id, n=payload["n"], what="ran")
        if "sleep" in payload:
            eventlet.sleep(payload["sleep"])
            record(id=self.message.id, n=payload["n"], what="done")
