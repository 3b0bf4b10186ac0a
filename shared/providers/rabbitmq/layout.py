"""The names and arguments of exchanges and queues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

from shared.types import Subscription

TICK_SECONDS = 0.064
"""What delays are rounded up to."""

LARGEST_LEVEL = 25
"""2**25 ticks are 24 days; twice that is more milliseconds than every RabbitMQ takes."""

DELAY_LEVELS = 41
"""How many delay queues there are at most; together they make more than a year."""

LONGEST_NAME_BYTES = 255

OUR_PREFIX = "queue-"
"""What our headers begin with; what begins with ``nameko.`` is a plain handler's context."""

CONTROL = "nameko.control"
"""The exchange by which instances tell each other of pauses."""

DUE = "nameko.due"
"""The exchange where delays end."""

DUE_QUEUES = "nameko.due.queues"
"""The exchange for what is due and goes to one queue alone."""


def exchange_name(source: str) -> str:
    """Return the exchange of a service's events, as nameko names it."""
    return f"{source}.events"


def queue_name(subscription: Subscription) -> str:
    """Return the queue of a subscription, as nameko names it."""
    name = f"evt-{subscription.source}-{subscription.event_type}"
    if subscription.handler_type == "singleton":
        return name
    return f"{name}--{subscription.subscriber}"


def beside(name: str, what: str) -> str:
    """Return the name of a queue that is beside another: its dead letters, its pause."""
    made = f"{name}.{what}"
    if len(made.encode()) <= LONGEST_NAME_BYTES:
        return made
    return f"evt-{sha1(name.encode(), usedforsecurity=False).hexdigest()}.{what}"


def delay_levels(seconds: float) -> list[int]:
    """Return the delay queues that a message goes through, in this order, to wait so long."""
    if seconds <= 0:
        return []  # as most do
    ticks, levels = math.ceil(round(seconds / TICK_SECONDS, 6)), []
    for level in reversed(range(DELAY_LEVELS)):
        if ticks >= _ticks(level):
            ticks -= _ticks(level)
            levels.append(level)
    return levels


def _ticks(level: int) -> int:
    return 1 << min(level, LARGEST_LEVEL)


def delay_header(level: int) -> str:
    return f"{OUR_PREFIX}delay-{level}"


@dataclass(frozen=True, slots=True)
class Layout:
    """What the kind of queue decides."""

    is_quorum: bool

    def kind(self) -> dict[str, Any]:
        """Return what every queue that lasts is declared with."""
        return {"x-queue-type": "quorum"} if self.is_quorum else {}

    def arguments(self, subscription: Subscription) -> dict[str, Any]:
        """Return what the queue of a subscription is declared with."""
        if not subscription.reliable:
            return {"x-max-priority": 3}
        return {
            **(self.kind() or {"x-max-priority": 3}),
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": beside(queue_name(subscription), "dead"),
        }

    def delay(self, level: int) -> str:
        """Return the name of a level's queue, and of its exchange."""
        return f"nameko.{'quorum-' if self.is_quorum else ''}delay.{level}"

    def after(self, level: int) -> str:
        """Return the exchange that comes after a level."""
        return self.delay(level - 1) if level else DUE

    def delay_arguments(self, level: int) -> dict[str, Any]:
        """Return what a level's queue is declared with."""
        safely = {"x-dead-letter-strategy": "at-least-once", "x-overflow": "reject-publish"}
        return {
            **self.kind(),
            "x-message-ttl": round(_ticks(level) * TICK_SECONDS * 1000),
            "x-dead-letter-exchange": self.after(level),
            **(safely if self.is_quorum else {}),
        }
