"""A service that comes late, and records in which order it got what."""

from shared.events import MessageContext, event_handler
from tests.flow.apps.recorder import record


class Late:
    name = "late"

    message = MessageContext()

    @event_handler("source", "patient.asked")
    def catch_up(self, payload):
        record(handler="late", id=self.message.id, n=payload["n"])

    @event_handler("source", "nobody.asked")
    def note(self, payload):
        record(handler="note", id=self.message.id, n=payload["n"])
