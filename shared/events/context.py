"""What a handler may know of the message that it handles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nameko.extensions import DependencyProvider

from shared.types import Lease, Priority


@dataclass(frozen=True, slots=True)
class Message:
    """A message as its handler sees it.

    :param attempt: 1 for the first.
    :param created_at: naive UTC: when it was stored.
    """

    id: str
    queue: str
    type: str
    subscriber: str
    attempt: int
    priority: Priority
    metadata: Mapping[str, Any]
    created_at: datetime | None


class MessageContext(DependencyProvider):
    """Injects the :class:`Message` that is being handled; ``None`` in other entrypoints.

    A handler of batches is given a list of them.

    Example::

        class Greeter:
            name = "greeter"
            message = MessageContext()

            @event_handler("auth_events", "user.registered")
            def greet(self, payload):
                print(self.message.id, self.message.attempt)
    """

    def get_dependency(self, worker_ctx: Any) -> Message | None:
        return getattr(worker_ctx, "message_context", None)

    @staticmethod
    def of(lease: Lease, subscriber: str) -> Message:
        """Make the view of a leased message."""
        message = lease.delivery.message
        return Message(
            id=message.id,
            queue=message.queue,
            type=message.type,
            subscriber=subscriber,
            attempt=lease.delivery.attempts + 1,
            priority=message.priority,
            metadata=message.metadata,
            created_at=message.created_at,
        )
