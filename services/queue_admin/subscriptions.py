"""Calls for subscriptions and queues."""

from __future__ import annotations

from typing import Any

from werkzeug.wrappers import Request

from services.queue_admin import answers
from services.queue_admin.routes import Calls, actor, http
from services.queue_admin.schemas import LimitsSchema, ReplaySchema, SubscriptionsSchema
from shared.events.totals import TotalsTimer
from shared.store.limits import Limits
from shared.web import Problem


class SubscriptionCalls(Calls):
    """See the module's docstring."""

    counting = TotalsTimer()

    @http("GET", "/queue/stats", answers=answers.Overview)
    def overview(self, _request: Request) -> Any:
        """Show all queues at a glance: what waits, since when, and what came in lately."""
        return self.operations.overview()

    @http("GET", "/queue/stats/<queue>", answers=answers.Stats, refusals=[404])
    def stats(self, _request: Request, queue: str) -> Any:
        """Count the messages of a queue, and the deliveries of each subscription."""
        stats = self.queue.get_queue_stats(queue)
        if stats is None:
            raise _no_queue(queue)
        return stats

    @http(
        "GET",
        "/queue/subscriptions",
        query=SubscriptionsSchema,
        answers=answers.SubscriptionList,
    )
    def subscriptions(self, _request: Request, query: dict[str, Any]) -> Any:
        """Show the subscriptions: who consumes, what waits and since when, who paused."""
        return {"subscriptions": self.operations.subscriptions(query.get("queue"))}

    @http(
        "POST",
        "/queue/subscriptions/<int:subscription_id>/pause",
        answers=answers.Paused,
        refusals=[404],
    )
    def pause(self, request: Request, subscription_id: int) -> Any:
        """Have nothing more handed out for a subscription; what is in hand goes on."""
        return self.operations.pause(actor(request), subscription_id)

    @http(
        "POST",
        "/queue/subscriptions/<int:subscription_id>/resume",
        answers=answers.Paused,
        refusals=[404],
    )
    def resume(self, request: Request, subscription_id: int) -> Any:
        """Take back the pause of a subscription."""
        return self.operations.resume(actor(request), subscription_id)

    @http(
        "PUT",
        "/queue/subscriptions/<int:subscription_id>/limits",
        schema=LimitsSchema,
        answers=answers.Limited,
        refusals=[404],
    )
    def limit(self, request: Request, body: dict[str, Any], subscription_id: int) -> Any:
        """Say how much of a subscription is handled at most; null is without a limit."""
        return self.operations.limit(actor(request), subscription_id, Limits(**body))

    @http(
        "POST",
        "/queue/subscriptions/<int:subscription_id>/retire",
        answers=answers.Retired,
        refusals=[404, 409],
    )
    def retire(self, request: Request, subscription_id: int) -> Any:
        """End a subscription whose handler is gone, and discard what waits for it."""
        return self.operations.retire(actor(request), subscription_id)

    @http(
        "POST",
        "/queue/subscriptions/<int:subscription_id>/replay",
        schema=ReplaySchema,
        answers=answers.Replayed,
        status=202,
        refusals=[404],
    )
    def replay(self, request: Request, body: dict[str, Any], subscription_id: int) -> Any:
        """Deliver messages of a stretch of history to a subscription, and to no other."""
        return 202, self.operations.replay(actor(request), subscription_id, **body)

    @http("POST", "/queue/queues/<queue>/pause", answers=answers.Paused, refusals=[404])
    def pause_queue(self, request: Request, queue: str) -> Any:
        """Pause all subscriptions that a queue has now."""
        return self._pause_queue(request, queue, True)

    @http("POST", "/queue/queues/<queue>/resume", answers=answers.Paused, refusals=[404])
    def resume_queue(self, request: Request, queue: str) -> Any:
        """Take back the pauses of all subscriptions of a queue."""
        return self._pause_queue(request, queue, False)

    def _pause_queue(self, request: Request, queue: str, is_paused: bool) -> Any:
        changed = self.operations.pause_queue(actor(request), queue, is_paused)
        if changed is None:
            raise _no_queue(queue)
        return changed


def _no_queue(queue: str) -> Problem:
    return Problem(404, "queue-not-found", "No such queue", detail=f"no queue {queue}")
