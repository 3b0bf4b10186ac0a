"""What moves deliveries: the interface that every provider has.

A provider carries bytes, a subscription, a priority and a delay. It knows no
schema and no handler, and no database, but for one that says ``joins_log``: it
works in the database of the message log, and its part of each step is done in
the log's own transaction, which it is handed as ``tx``.

A provider instance is made, used and closed by one native thread. Everything
takes many at once; everything that can fail raises a
:class:`~shared.errors.ProviderError` and no driver's exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.settings import Settings
from shared.types import Delivery, Lease, Settlement, Subscription


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a provider can do. What it cannot raises UnsupportedByProviderError."""

    joins_log: bool = False
    """Its work is part of the message log's transaction."""
    priorities: bool = True
    """Urgent deliveries overtake normal ones."""
    peek: bool = True
    """Waiting deliveries can be listed without reserving them."""


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """How many deliveries of one subscription are in which state."""

    subscriber: str
    waiting: int
    """May be reserved now."""
    active: int
    """Leased."""
    scheduled: int
    """Wait for a time: a schedule or the next attempt."""
    dead: int
    """Dead letters."""


class QueueProvider(ABC):
    """The interface; see the module's docstring for the rules that hold for all of it."""

    capabilities: Capabilities = Capabilities()

    def __init__(self, settings: Settings) -> None:
        """Keep the settings. No connection is made here."""
        self.settings = settings

    @abstractmethod
    def initialize(self) -> None:
        """Connect; again after a lost connection.

        :raises ProviderUnavailableError: when the server does not answer.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of every connection and file. Never raises."""

    @abstractmethod
    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """Make a queue for each subscription, where there is none, and get woken for it."""

    @abstractmethod
    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> None:
        """Queue deliveries, in their order; each may be reserved after its ``delay``.

        Publishing one again, with the same ``seq``, changes nothing.
        """

    @abstractmethod
    def published(self, deliveries: Sequence[Delivery]) -> None:
        """Wake who consumes, once what was published can be seen (after the commit)."""

    @abstractmethod
    def wait(self, timeout: float, interrupt: int) -> None:
        """Wait until there may be something to reserve.

        :param timeout: seconds at most.
        :param interrupt: a file descriptor; readable means that the waiting ends.
        """

    @abstractmethod
    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        """Lease what waits: by priority, then in order of dispatch. Does not wait.

        Before that it makes due deliveries ready and takes over those whose lease
        has run out, so that no other process is needed for it.

        :param limits: the most for each subscription id.
        :param limit: the most altogether; fewer are returned only if no more are ready.
        """

    @abstractmethod
    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        """End leases; return those refused since the lease was lost (fencing)."""

    @abstractmethod
    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        """Renew leases for another full term from now; return the lost ones."""

    @abstractmethod
    def get_queue_stats(self, queue: str) -> list[SubscriptionStats]:
        """Count what each subscription of a queue has, as the provider sees it."""

    @abstractmethod
    def health_check(self) -> bool:
        """Say whether the provider answers right now. Never raises."""

    @abstractmethod
    def pause(self, subscription_id: int) -> None:
        """Have nothing more reserved for a subscription, in any process."""

    @abstractmethod
    def resume(self, subscription_id: int) -> None:
        """Take back a pause."""

    @abstractmethod
    def peek(self, subscription_id: int, limit: int) -> list[Delivery]:
        """Return the next deliveries that would be reserved, without reserving them."""

    @abstractmethod
    def purge(self, subscription_id: int) -> int:
        """Remove everything that waits for a subscription; return how many it was."""
