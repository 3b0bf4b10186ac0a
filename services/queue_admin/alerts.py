"""Calls for alerts and their thresholds, and for what is kept."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin import answers
from services.queue_admin.routes import actor, http
from services.queue_admin.schemas import ThresholdsSchema
from shared.errors import PayloadError
from shared.events.timers import AlertTimer, RetentionTimer


class AlertCalls:
    """See the module's docstring."""

    alerting = AlertTimer()
    retaining = RetentionTimer()

    @http("GET", "/queue/alerts", answers=answers.AlertList)
    def alerts(self, _request: Request) -> Any:
        """Show the alerts that go on, and the newest of those that are over."""
        return self.alerting.alerts()

    @http("GET", "/queue/alerts/thresholds", answers=answers.ThresholdList)
    def thresholds(self, _request: Request) -> Any:
        """Show from when on each queue alerts; 0 means never."""
        return self.alerting.thresholds()

    @http(
        "PUT",
        "/queue/alerts/thresholds/<queue>",
        schema=ThresholdsSchema,
        answers=answers.QueueThresholds,
        refusals=[404],
    )
    def set_thresholds(self, request: Request, body: Any, queue: str) -> Any:
        """Have a queue have thresholds of its own; what is left out is as usual."""
        if body.queue_name not in (None, queue):
            raise PayloadError({"queueName": f"must be {queue}, as in the address, or left out"})
        return self.alerting.set_thresholds(actor(request), queue, body.own)

    @http("GET", "/queue/retention", answers=answers.Retention)
    def retention(self, _request: Request) -> Any:
        """Show what is kept and for how long, and when it was last seen to."""
        return self.retaining.retention()
