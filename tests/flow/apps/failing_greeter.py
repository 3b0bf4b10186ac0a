"""A greeter on ours that puts off whatever comes, for a few seconds."""

from shared.errors import Retry
from shared.events import event_handler


class Greeter:
    name = "greeter"

    @event_handler("source", "thing.happened")
    def note(self, payload):
        raise Retry("not now", after=5)
