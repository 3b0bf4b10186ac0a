"""A service on ours among plain ones; its handler does what the payload says."""

import eventlet

from shared.events import Backoff, MessageContext, event_handler
from tests.flow.apps.recorder import record


class Newcomer:
    name = "company"

    message = MessageContext()

    @event_handler("auth_events", "user.registered", max_retries=2, backoff=Backoff(0.05, 2, 0.2))
    def handle_user_registered(self, payload):
        attempt = self.message.attempt
        record(handler="company", payload=payload, attempt=attempt, id=self.message.id)
        if attempt <= payload.get("fail", 0):
            raise ValueError("told to fail")
        if "sleep" in payload:
            eventlet.sleep(payload["sleep"])
        record(handler="company-done", payload=payload, id=self.message.id)
