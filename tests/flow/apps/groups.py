"""A second service, and handlers of the other two types."""

import uuid

from shared.events import BROADCAST, SINGLETON, MessageContext, event_handler
from tests.flow.apps.recorder import record


class Groups:
    name = "groups"

    message = MessageContext()
    instance = uuid.uuid4().hex

    @event_handler("source", "group.happened", handler_type=SINGLETON)
    def one(self, payload):
        record(handler="one", n=payload["n"], instance=self.instance)

    @event_handler("source", "group.happened", handler_type=BROADCAST, reliable_delivery=False)
    def everyone(self, payload):
        record(handler="everyone", n=payload["n"], instance=self.instance)

    @event_handler("source", "group.happened")
    def pool(self, payload):
        record(handler="pool", n=payload["n"], instance=self.instance)
