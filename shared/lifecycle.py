"""The states of a delivery and of a message, and the moves between them.

This file alone knows them; ARCHITECTURE.md draws them. Every move is written
to the database as "set B only if still A".
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class DeliveryStatus(StrEnum):
    """What a delivery is doing. The first five are also a message's."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    RETRY = "retry"
    DISCARDED = "discarded"


class MessageStatus(StrEnum):
    """What became of a message, drawn from its deliveries."""

    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"
    RETRY = "retry"


WAITING = frozenset({DeliveryStatus.PENDING, DeliveryStatus.RETRY})
"""States in which a delivery can be reserved."""

FINAL = frozenset({DeliveryStatus.COMPLETED, DeliveryStatus.FAILED, DeliveryStatus.DISCARDED})
"""States that only an operator leaves."""

MOVES: dict[DeliveryStatus, frozenset[DeliveryStatus]] = {
    # reserved; given up by an operator; its instance is gone (unreliable subscription)
    DeliveryStatus.PENDING: frozenset({DeliveryStatus.PROCESSING, DeliveryStatus.DISCARDED}),
    DeliveryStatus.RETRY: frozenset({DeliveryStatus.PROCESSING, DeliveryStatus.DISCARDED}),
    DeliveryStatus.PROCESSING: frozenset(
        {
            DeliveryStatus.COMPLETED,
            DeliveryStatus.RETRY,
            DeliveryStatus.FAILED,
            # handed back unburnt; what is taken over from a dead worker goes on processing
            DeliveryStatus.PENDING,
            DeliveryStatus.DISCARDED,
        }
    ),
    # an operator's retry, attempts counted from zero
    DeliveryStatus.FAILED: frozenset({DeliveryStatus.PENDING, DeliveryStatus.DISCARDED}),
    DeliveryStatus.COMPLETED: frozenset(),
    DeliveryStatus.DISCARDED: frozenset(),
}

MAX_TAKEOVERS = 10
"""A delivery whose workers died this often is taken to be what kills them (P8)."""


def sources_of(after: DeliveryStatus) -> list[DeliveryStatus]:
    """Return the states from which a delivery may become ``after``: the guard of a move."""
    return [before for before, allowed in MOVES.items() if after in allowed]


def message_status(deliveries: Iterable[DeliveryStatus]) -> MessageStatus:
    """Draw a message's status from those of its deliveries.

    A message without any delivery has nobody to wait for and is completed.
    """
    present = set(deliveries)
    for loudest in (MessageStatus.FAILED, MessageStatus.RETRY, MessageStatus.PROCESSING):
        if DeliveryStatus(loudest) in present:
            return loudest
    if present <= {DeliveryStatus.COMPLETED, DeliveryStatus.DISCARDED}:
        return MessageStatus.COMPLETED
    return MessageStatus.PENDING


def retries_made(status: DeliveryStatus, attempts: int) -> int:
    """Return how many retries ``attempts`` burnt attempts mean for ``retry_count``.

    The attempt that completed or failed for good is not followed by a retry.
    """
    return attempts - 1 if status in FINAL and attempts > 0 else attempts


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before an attempt is repeated; times in seconds."""

    base: float = 1.0
    factor: float = 2.0
    cap: float = 300.0

    def ceiling(self, retries: int) -> float:
        """Return the longest wait after ``retries`` retries made, from 0."""
        try:
            return min(self.cap, self.base * self.factor**retries)
        except OverflowError:
            return self.cap

    def delay(self, retries: int) -> float:
        """Return a random wait within ``[0, ceiling]``: full jitter.

        See "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015) for why
        the whole range and not a part of it.
        """
        return random.uniform(0, self.ceiling(retries))  # noqa: S311 - guards no secret
