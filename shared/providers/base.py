"""What moves deliveries: the interface that every provider has.

A provider carries bytes, a subscription, a priority and a delay. It knows no
schema and no handler, and no database, but for one that says ``joins_log``: it
works in the database of the message log, and its part of each step is done in
the log's own transaction, which it is handed as ``tx``.

A provider instance is used and closed by one native thread. Everything
takes many at once; everything that can fail raises a
:class:`~shared.errors.ProviderError` and no driver's exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from shared.errors import UnsupportedByProviderError
from shared.providers.rpc import RpcTransport
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
    deduplicates: bool = True
    """What is published again is not queued again; else the log sorts the copies out."""
    leases_expire: bool = True
    """A lease ends when nobody renews it; else with the connection of who holds it."""
    counts_all: bool = True
    """Leased and scheduled deliveries can be counted and purged, not waiting ones alone."""
    fans_out: bool = False
    """What is dispatched reaches who listens at the server, whether or not the log knows them."""
    lists: bool = False
    """It can say of each delivery whether it has it (``holds``); else it is counted."""
    nameko_rpc: bool = False
    """Its server is the one that nameko's own RPC is made for."""


@dataclass(frozen=True, slots=True)
class SubscriptionStats:
    """How many deliveries of one subscription are in which state."""

    subscriber: str
    waiting: int
    """May be reserved now."""
    active: int | None
    """Leased; ``None`` where the provider cannot tell."""
    scheduled: int | None
    """Wait for a time, a schedule or the next attempt; ``None`` where it cannot tell."""
    dead: int
    """Dead letters."""


class QueueProvider(ABC):
    """The interface; see the module's docstring for the rules that hold for all of it."""

    capabilities: Capabilities = Capabilities()

    longest_lease: float | None = None
    """Seconds after which a lease is moved to the log, since the server would take it back."""

    def __init__(self, settings: Settings) -> None:
        """Keep the settings. No connection is made here."""
        self.settings = settings
        self.notices: list[str] = []
        """What operations should know. Who calls takes and logs them: it may, this may not."""

    @classmethod
    def rpc_transport(cls, settings: Settings) -> RpcTransport:
        """Make what carries RPC beside the events; it connects in its ``initialize``.

        :raises UnsupportedByProviderError: when this provider carries none.
        """
        raise UnsupportedByProviderError(f"QUEUE_PROVIDER: {settings.provider} carries no RPC")

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
    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> list[Delivery]:
        """Queue deliveries, in their order; each may be reserved after its ``delay``.

        Publishing one again, with the same ``seq``, changes nothing if it ``deduplicates``.
        One that ``fans_out`` sends those without a ``to`` once for each message, to whoever
        listens; among them may be one with neither number, of a message that no
        subscription in the log wants.

        :returns: those for which there is no queue; they were not queued.
        """

    @abstractmethod
    def published(self, deliveries: Sequence[Delivery]) -> None:
        """Wake who consumes, once what was published can be seen (after the commit)."""

    def rejoin(self, subscription: Subscription) -> None:  # noqa: B027 - few have to
        """Have what is new reach the queue of a subscription again, which has got none of it.

        The queue is there: what went ``to`` it alone has arrived.
        """

    @abstractmethod
    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        """Wait until there may be something to reserve; may return sooner.

        What the last ``reserve`` was to have none of does not end it, at least not again and
        again: the subscription has limits, and others may have room for it.

        :param timeout: seconds at most.
        :param interrupt: a file descriptor; readable means that the waiting ends.
        :param hungry: whether there is room for more; else it only keeps its connections,
            and holds nothing back that others could handle.
        """

    @abstractmethod
    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        """Lease what waits: by priority, then in order of dispatch. Does not wait.

        Before that it makes due deliveries ready and takes over those whose lease
        has run out, so that no other process is needed for it.

        :param limits: the most for each subscription id; with 0 nothing is kept back from others.
        :param limit: the most altogether; fewer are returned only if no more are ready.
        """

    @abstractmethod
    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        """End leases; return those refused since the lease was lost (fencing)."""

    @abstractmethod
    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        """Renew leases for another full term from now; return the lost ones."""

    @abstractmethod
    def get_queue_stats(self, subscriptions: Sequence[Subscription]) -> list[SubscriptionStats]:
        """Count what each of these subscriptions has, as the provider sees it."""

    @abstractmethod
    def health_check(self) -> bool:
        """Say whether the provider answers right now. Never raises."""

    @abstractmethod
    def pause(self, subscription: Subscription) -> None:
        """Have nothing more reserved for a subscription, in any process."""

    @abstractmethod
    def resume(self, subscription: Subscription) -> None:
        """Take back a pause."""

    @abstractmethod
    def is_paused(self, subscription: Subscription) -> bool:
        """Say whether a subscription is paused; of one that it consumes, as far as it has heard."""

    @abstractmethod
    def peek(self, subscription: Subscription, limit: int) -> list[Delivery]:
        """Return the next deliveries that would be reserved, without reserving them."""

    @abstractmethod
    def purge(self, subscription: Subscription) -> int:
        """Remove everything that waits for a subscription; return how many it was."""

    @abstractmethod
    def forget(self, subscription: Subscription) -> None:
        """Remove a subscription that was retired, with all that it has."""

    # --- what an audit asks; a provider that cannot answer leaves these as they are

    def holds(self, subscription: Subscription, seqs: Sequence[int]) -> set[int]:
        """Return which of these deliveries of a subscription it has, in whatever state.

        :raises UnsupportedByProviderError: unless it ``lists``.
        """
        raise UnsupportedByProviderError(f"{self.settings.provider} cannot list what it has")

    def count_delayed(self) -> int | None:
        """Count what waits for a time, of all subscriptions together.

        :returns: ``None`` where that cannot be told.
        """
        return None

    def shares(self, subscription: Subscription) -> bool:
        """Say whether others than us take from its queue, too: what is not there they may have."""
        return False

    # --- what a move to another provider asks; one that cannot do it leaves these as they are

    def take_waiting(self, subscription: Subscription, limit: int) -> list[Lease]:
        """Reserve what waits for one subscription, and where it can while that is paused."""
        return self.reserve({subscription.id: limit}, limit)

    def drop_scheduled(
        self,
        subscriptions: Sequence[Subscription],
        is_over: Callable[[Sequence[int]], Set[int]],
    ) -> int:
        """Remove copies of what waits for a time and is over; return how many.

        A copy that stays does no harm: the log is asked before it runs.

        :param is_over: returns those of some deliveries that another provider has, or that ended.
        """
        return 0
