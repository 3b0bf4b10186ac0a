"""Calls that look at messages and repair them."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin import answers
from services.queue_admin.idempotency import dedupe_of
from services.queue_admin.routes import Calls, actor, http
from services.queue_admin.schemas import (
    ListSchema,
    PublishSchema,
    RescheduleSchema,
    ResendSchema,
    RetrySchema,
)


class MessageCalls(Calls):
    """See the module's docstring."""

    @http(
        "POST",
        "/queue/publish",
        schema=PublishSchema,
        answers=answers.Published,
        status=202,
        refusals=[422],
    )
    def publish(self, request: Request, body: dict[str, Any]) -> Any:
        """Publish one message on behalf of the service whose queue it is.

        Sent again with the same ``Idempotency-Key``, it is answered as before, and nothing
        is published.
        """
        message_id = self.operations.publish_as(
            actor(request), **body, dedupe_key=dedupe_of(request, body)
        )
        return 202, {"messageId": message_id}

    @http("GET", "/queue/messages", query=ListSchema, answers=answers.MessageList)
    def messages(self, _request: Request, query: dict[str, Any]) -> Any:
        """List messages, newest first."""
        return self.operations.messages(**query)

    @http("GET", "/queue/messages/<message_id>", answers=answers.Message, refusals=[404])
    def message(self, _request: Request, message_id: str) -> Any:
        """Show one message, its deliveries, each attempt that failed, its cause and effects."""
        return self.operations.message(message_id)

    @http("GET", "/queue/messages/<message_id>/why", answers=answers.Reasons, refusals=[404])
    def why(self, _request: Request, message_id: str) -> Any:
        """Say for each subscription what became of a message, or what it waits for."""
        return self.operations.why(message_id)

    @http(
        "POST",
        "/queue/retry/<message_id>",
        answers=answers.Retried,
        status=202,
        refusals=[404, 409],
    )
    def retry(self, request: Request, message_id: str) -> Any:
        """Let the failed deliveries of a message run again."""
        retried = self.operations.retry_message(actor(request), message_id)
        return 202, {"messageId": message_id, "retried": retried}

    @http("POST", "/queue/retry", schema=RetrySchema, answers=answers.RetriedMany, status=202)
    def retry_matching(self, request: Request, body: dict[str, Any]) -> Any:
        """Let the failed deliveries that fit a filter run again."""
        return 202, self.operations.retry_matching(actor(request), **body)

    @http(
        "POST",
        "/queue/messages/<message_id>/resend",
        schema=ResendSchema,
        answers=answers.Resent,
        status=202,
        refusals=[404, 409],
    )
    def resend(self, request: Request, body: dict[str, Any], message_id: str) -> Any:
        """Send another payload in place of one that failed, to those where it failed."""
        return 202, self.operations.resend(actor(request), message_id, body["payload"])

    @http(
        "POST",
        "/queue/messages/<message_id>/discard",
        answers=answers.Discarded,
        refusals=[404, 409],
    )
    def discard(self, request: Request, message_id: str) -> Any:
        """Give up the failed deliveries of a message."""
        discarded = self.operations.discard_message(actor(request), message_id)
        return {"messageId": message_id, "discarded": discarded}

    @http(
        "POST",
        "/queue/messages/<message_id>/cancel",
        answers=answers.Cancelled,
        refusals=[404, 409],
    )
    def cancel(self, request: Request, message_id: str) -> Any:
        """Discard what waits of a message; what a worker has in hand goes on."""
        cancelled = self.operations.cancel(actor(request), message_id)
        return {"messageId": message_id, "cancelled": cancelled}

    @http(
        "POST",
        "/queue/messages/<message_id>/reschedule",
        schema=RescheduleSchema,
        answers=answers.Rescheduled,
        refusals=[404, 409],
    )
    def reschedule(self, request: Request, body: dict[str, Any], message_id: str) -> Any:
        """Have what waits of a message handled at another time."""
        count = self.operations.reschedule(actor(request), message_id, body["scheduled_at"])
        return {"messageId": message_id, "rescheduled": count}
