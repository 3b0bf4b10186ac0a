"""The service that operations talk to."""

from __future__ import annotations

import hmac
from functools import partial
from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin.schemas import PublishSchema
from shared.events import MessageLog, QueueService
from shared.settings import Settings
from shared.web import Problem, bearer_token
from shared.web import http as unguarded


def _check_token(request: Request, settings: Settings) -> None:
    if settings.admin_auth == "none":
        return
    token = (bearer_token(request) or "").encode()
    # every token is compared, so that the time tells nothing
    matches = [hmac.compare_digest(token, known.encode()) for known in settings.admin_tokens]
    if not any(matches):
        raise Problem(401, "unauthorized", "A bearer token of QUEUE_ADMIN_TOKENS is needed")


http = partial(unguarded, guard=_check_token)


class QueueAdminService:
    """Publishes, counts, retries, and says how the queue is."""

    name = "queue_admin"

    queue = QueueService()
    log = MessageLog()

    @http("POST", "/queue/publish", schema=PublishSchema)
    def publish(self, _request: Request, body: dict[str, Any]) -> Any:
        """Publish one message on behalf of the service whose queue it is."""
        return 202, {"messageId": self.queue.publish(**body)}

    @http("GET", "/queue/stats/<queue>")
    def stats(self, _request: Request, queue: str) -> Any:
        """Count the messages of a queue, and the deliveries of each subscription."""
        stats = self.queue.get_queue_stats(queue)
        if stats is None:
            raise Problem(404, "queue-not-found", "No such queue", detail=f"no queue {queue}")
        return stats

    @http("GET", "/queue/messages/<message_id>")
    def message(self, _request: Request, message_id: str) -> Any:
        """Show one message, its deliveries, and each attempt that failed."""
        return self.log.message(message_id)

    @http("POST", "/queue/retry/<message_id>")
    def retry(self, _request: Request, message_id: str) -> Any:
        """Let the failed deliveries of a message run again."""
        retried = self.queue.retry_message(message_id)
        return 202, {"messageId": message_id, "retried": retried}

    @unguarded("GET", "/queue/health")
    def health(self, _request: Request) -> Any:
        """Say whether provider and database answer, and all waiting work has a consumer."""
        health = self.queue.health()
        return (200 if health["status"] == "healthy" else 503), health
