"""What a service counts, in plain numbers.

Any lock made after monkey patching is green and must not be contended between threads, so
the way of an event has nothing to do with prometheus-client, whose counters lock. Each
number here is changed by one thread alone, the hub, the pump or the audit; whoever exposes
it reads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from time import monotonic

from shared.lifecycle import DeliveryStatus
from shared.types import Envelope, Subscription

MOST_TYPES = 1000
"""Pairs of queue and event type that are told apart; any caller may make up another one."""

OTHERS = ("other", "other")
"""What is counted of the pairs beyond."""

HANDLER_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Seconds: from a look into memory to a handler that waits for another server's timeout."""

FLUSH_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""Seconds: from a commit on SQLite to the longest wait for its lock."""

EVENT_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Histogram:
    """How many values lie below which bound; one thread alone observes."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def __add__(self, other: Histogram) -> Histogram:
        both = Histogram(self.bounds)
        both.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        both.sum = self.sum + other.sum
        return both


class PumpCounts:
    """What the pump's thread counts; or the hub, of what it stores itself."""

    def __init__(self) -> None:
        self.flush_seconds = Histogram(FLUSH_BOUNDS)
        self.flush_events = Histogram(EVENT_BOUNDS)
        self.lost_leases = 0

    def flushed(self, seconds: float, events: int) -> None:
        """Count one transaction that stored so many events and outcomes."""
        if events:
            self.flush_seconds.observe(seconds)
            self.flush_events.observe(events)


class AuditCounts:
    """What the audits of this process came to; counted by their thread."""

    def __init__(self) -> None:
        self.audits: Counter[str] = Counter()
        self.missing_deliveries = 0
        self.misdrawn_messages = 0

    def ended(self, missing_deliveries: int, misdrawn_messages: int, wrong_pauses: int = 0) -> None:
        """Count one that put right so much."""
        is_repaired = missing_deliveries or misdrawn_messages or wrong_pauses
        self.audits["repaired" if is_repaired else "balanced"] += 1
        self.missing_deliveries += missing_deliveries
        self.misdrawn_messages += misdrawn_messages

    def put_off(self) -> None:
        """Count one that found no answer."""
        self.audits["put_off"] += 1


class ServiceCounts:
    """What one service container counts; but for ``pump``, on the hub."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.pump = PumpCounts()
        self.shortcut = PumpCounts()
        self.dispatched: Counter[tuple[str, str]] = Counter()
        self.handled: Counter[tuple[int, DeliveryStatus]] = Counter()
        self.handler_seconds: list[tuple[Subscription, Histogram]] = []
        # by their ids, once they are registered
        self.subscriptions: dict[int, Subscription] = {}
        # since when what is in the outbox could not be relayed: a monotonic time
        self.outbox_since: float | None = None

    def handler(self, subscription: Subscription) -> Histogram:
        """Return what measures the handler of a subscription."""
        seconds = Histogram(HANDLER_BOUNDS)
        self.handler_seconds.append((subscription, seconds))
        return seconds

    def note_outbox(self, waits: bool) -> None:
        """Note whether anything is to be relayed."""
        if not waits:
            self.outbox_since = None
        elif self.outbox_since is None:
            self.outbox_since = monotonic()

    def count_dispatched(self, envelopes: Iterable[Envelope]) -> None:
        """Count events that are stored."""
        for envelope in envelopes:
            key = (envelope.queue, envelope.type)
            if key not in self.dispatched and len(self.dispatched) >= MOST_TYPES:
                key = OTHERS
            self.dispatched[key] += 1
