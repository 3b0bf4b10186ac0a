"""The service that operations talk to; its calls are in the modules beside this one."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request, Response

from services.queue_admin import answers
from services.queue_admin.alerts import AlertCalls
from services.queue_admin.failures import FailureCalls
from services.queue_admin.messages import MessageCalls
from services.queue_admin.openapi import page_of, specification
from services.queue_admin.pages import PageCalls
from services.queue_admin.ramps import RampCalls
from services.queue_admin.routes import http, unguarded
from services.queue_admin.schedules import ScheduleCalls
from services.queue_admin.subscriptions import SubscriptionCalls
from shared.events.operations import AuditTimer
from shared.observe.metrics import exposed, log_registry


class QueueAdminService(
    MessageCalls,
    FailureCalls,
    RampCalls,
    SubscriptionCalls,
    AlertCalls,
    ScheduleCalls,
    PageCalls,
):
    """Shows what there is, says why, repairs it, and says how the queue is."""

    name = "queue_admin"

    audited = AuditTimer()

    @http("GET", "/metrics")
    def metrics(self, request: Request) -> Response:
        """Tell Prometheus what the message log holds, and whether its servers answer."""
        provider = self.queue.client.settings.provider
        is_up, gauges, draining = self.queue.gauges()
        registry = log_registry(provider, is_up, gauges, self.audited, draining)
        text, content_type = exposed(registry, request.headers.get("Accept"))
        return Response(text, content_type=content_type)

    @unguarded("GET", "/queue/health", answers=answers.Health)
    def health(self, _request: Request) -> Any:
        """Say whether provider and database answer, and all waiting work has a consumer."""
        health = self.queue.health()
        return (200 if health["status"] == "healthy" else 503), health

    @http("GET", "/openapi.json")
    def openapi(self, _request: Request) -> Any:
        """Describe all calls, as OpenAPI 3.1."""
        return specification(QueueAdminService)

    @http("GET", "/docs")
    def docs(self, _request: Request) -> Response:
        """Show the description of all calls as a page."""
        return page_of(specification(QueueAdminService))
