"""What the tests need to know of a provider, and what they do with one."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from time import monotonic
from typing import Any, TypeVar

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from shared.database import Database, Transaction, database_url, is_transient
from shared.lifecycle import FINAL, DeliveryStatus
from shared.native import Signal, sleep
from shared.providers import QueueProvider, make_provider
from shared.settings import load_settings
from shared.store import adoption, attempts, backlog, log, subscriptions
from shared.store.summary import refresh
from shared.tables import SUBSCRIPTION_COLUMNS, subscription_of
from shared.tables import deliveries as deliveries_table
from shared.types import (
    Delivery,
    Envelope,
    Failure,
    Lease,
    Outcome,
    Priority,
    SettleAction,
    Settlement,
    Subscription,
    new_message_id,
)

QUEUE = "orders"
SOURCE = "shop"

LEASE_SECONDS = 1.0

TRANSIENT_TRIES = 50
"""How often a step is done again that lost a deadlock: more than anybody loses in a row."""

T = TypeVar("T")


class ProviderLab(ABC):
    """Where one provider is tried: which settings it is made by, and how it is broken.

    A lab is made anew for each test, and once more in each process that a test starts,
    from ``config`` alone.

    :param config: settings, of a message log that has its tables and is empty.
    """

    promptly: float = 2.0
    """Seconds within which a waiting consumer has what it waits for, with room for the
    pauses of a busy machine."""

    can_stop: bool = False
    """Whether there is a server, which :meth:`stop_server` and :meth:`start_server` know."""

    released_is_first: bool = True
    """Whether what is released is reserved first again, and not after all that waits."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.config = {
            "QUEUE_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
            "QUEUE_SOURCES": f"{SOURCE}={QUEUE}",
            **self.options(),
            **config,
        }
        self.settings = load_settings(self.config)

    @classmethod
    def from_fixtures(cls, request: pytest.FixtureRequest) -> ProviderLab:
        """Make the lab of one test, out of whatever fixtures it needs."""
        return cls(request.getfixturevalue("sqlite_log"))

    @abstractmethod
    def options(self) -> Mapping[str, str]:
        """Return the settings that choose the provider, and name its server."""

    def make_provider(self) -> QueueProvider:
        """Make an instance; it is initialised by the test."""
        return make_provider(self.settings)

    def clear(self) -> None:  # noqa: B027 - not each leaves something
        """Remove whatever this test left on the provider's server."""

    def lose_leases(self, worker: Worker) -> None:  # noqa: B027 - most run out by themselves
        """Have a worker lose its leases without noticing, where they do not run out in time."""

    def subscriptions(self) -> list[Subscription]:
        """Return all that the message log knows."""
        database = Database(database_url(self.settings), sleep)
        try:
            with database.transaction() as tx:
                rows = tx.connection.execute(select(*SUBSCRIPTION_COLUMNS)).all()
        finally:
            database.close()
        return [subscription_of(row) for row in rows]

    def stop_server(self) -> None:
        """Take the provider's server away."""
        raise NotImplementedError

    def start_server(self) -> None:
        """Bring the provider's server back, and return once it answers."""
        raise NotImplementedError


def lab_class(name: str) -> type[ProviderLab]:
    """Return the lab that ``package.module:Class`` names."""
    module, _, attribute = name.partition(":")
    found: type[ProviderLab] = getattr(import_module(module), attribute)
    return found


class Worker:
    """What one process has: an instance of the provider, and a connection to the log.

    It takes the steps that the pump takes, in the same order and the same transactions:
    together with the log's where the provider joins it, and else after one another. Made,
    used and closed by one thread.
    """

    def __init__(self, lab: ProviderLab, name: str = "worker") -> None:
        self.lab = lab
        self.name = name
        self.interrupt = Signal()
        self.provider = lab.make_provider()
        self.database = Database(database_url(lab.settings), sleep)
        self._joins_log = self.provider.capabilities.joins_log
        self.declared: list[Subscription] = []

    def open(self, *declared: Subscription) -> Worker:
        """Connect, and declare subscriptions."""
        self.provider.initialize()
        return self.declare(*declared)

    def declare(self, *declared: Subscription) -> Worker:
        """Declare subscriptions; :meth:`reserve` is for them."""
        if declared:
            self.provider.declare(declared)
            self.declared += declared
        return self

    def close(self) -> None:
        """Let go of everything."""
        self.provider.close()
        self.database.close()
        self.interrupt.close()

    # --- subscribing and publishing

    def subscribe(self, *event_types: str, subscriber: str = "audit.note") -> list[Subscription]:
        """Register a subscription for each type in the log, and declare them."""
        wanted = [Subscription(QUEUE, SOURCE, each, subscriber) for each in event_types]
        registered = self._in_log(lambda tx: subscriptions.register(tx, wanted))
        self.declare(*registered)
        return registered

    def store(
        self,
        event_type: str,
        count: int = 1,
        *,
        priority: Priority = Priority.NORMAL,
        delay: float | None = None,
        body: str = "{}",
    ) -> list[Delivery]:
        """Put messages into the log, and do not tell the provider yet."""
        envelopes = [
            Envelope(new_message_id(), QUEUE, event_type, body, priority=priority, delay=delay)
            for _ in range(count)
        ]
        handover = log.IN_LOG
        if not self._joins_log:
            fans_out = self.provider.capabilities.fans_out
            handover = log.Handover(backlog.PUBLISH_SECONDS, fans_out=fans_out)
        return self._in_log(lambda tx: log.append(tx, envelopes, 3, handover=handover))

    def publish(self, deliveries: Sequence[Delivery]) -> None:
        """Tell the provider of deliveries that are in the log."""
        self._with_provider(lambda tx: self.provider.publish(deliveries, tx))
        self.provider.published(deliveries)

    def dispatch(self, event_type: str, count: int = 1, **options: Any) -> list[Delivery]:
        """Put messages into the log and tell the provider, as a dispatch does."""
        deliveries = self.store(event_type, count, **options)
        self.publish(deliveries)
        return deliveries

    # --- consuming

    def reserve(self, limit: int = 100, limits: Mapping[int, int] | None = None) -> list[Lease]:
        """Reserve, and note in the log that attempts begin.

        :param limits: by subscription; by default ``limit`` for each declared one.
        """
        if limits is None:
            limits = {subscription.id: limit for subscription in self.declared}
        if self._joins_log:
            started = self._in_log(
                lambda tx: self._begin(tx, self.provider.reserve(limits, limit, tx))
            )
        else:
            leases = self.provider.reserve(limits, limit)
            started = self._in_log(lambda tx: self._begin(tx, leases))
            self.provider.settle(started.settled)
        return started.run

    def acknowledge(self, *leases: Lease) -> list[Lease]:
        """Settle leases as completed; return the refused ones. The others do alike."""
        return self.settle(*[Settlement(lease, SettleAction.ACKNOWLEDGE) for lease in leases])

    def retry(self, *leases: Lease, delay: float) -> list[Lease]:
        return self.settle(*[Settlement(lease, SettleAction.RETRY, delay) for lease in leases])

    def dead_letter(self, *leases: Lease) -> list[Lease]:
        return self.settle(*[Settlement(lease, SettleAction.DEAD_LETTER) for lease in leases])

    def release(self, *leases: Lease) -> list[Lease]:
        return self.settle(*[Settlement(lease, SettleAction.RELEASE) for lease in leases])

    def settle(self, *settlements: Settlement) -> list[Lease]:
        """Store outcomes and tell the provider, as the pump does; return the refused leases.

        Other than the pump it tells the provider of each, also where the log refused the
        outcome: the provider has to see by itself what it must refuse.
        """
        outcomes = [_outcome(settlement) for settlement in settlements]
        if self._joins_log:
            refused = self._in_log(lambda tx: self._record_and_settle(tx, outcomes, settlements))
        else:
            self._in_log(lambda tx: self._record(tx, outcomes))
            refused = self.provider.settle(settlements)
        return [settlement.lease for settlement in refused]

    def extend(self, *leases: Lease) -> list[Lease]:
        """Renew leases; return the lost ones."""
        return self._with_provider(lambda tx: self.provider.extend(leases, tx))

    def wait(self, timeout: float) -> None:
        """Wait until there may be something to reserve."""
        self.provider.wait(timeout, self.interrupt.fileno())

    def reserve_within(self, seconds: float, count: int = 1) -> list[Lease]:
        """Wait for ``count`` deliveries by the provider's own means, and reserve them."""
        deadline = monotonic() + seconds
        leases = self.reserve(count)
        while len(leases) < count:
            left = deadline - monotonic()
            assert left > 0, f"{len(leases)} of {count} deliveries within {seconds} s"
            self.wait(left)
            leases += self.reserve(count - len(leases))
        return leases

    def reserves_nothing_for(self, seconds: float, meanwhile: Callable[[], Any]) -> None:
        """Call ``meanwhile`` again and again, and see that nothing can be reserved."""
        deadline = monotonic() + seconds
        while (left := deadline - monotonic()) > 0:
            meanwhile()
            assert self.reserve() == []
            self.wait(min(left, LEASE_SECONDS / 5))

    def finished(self) -> int:
        """Count the deliveries that have a final outcome in the log."""
        count = select(func.count()).select_from(deliveries_table)
        is_final = deliveries_table.c.status.in_(FINAL)
        return self._in_log(lambda tx: tx.connection.execute(count.where(is_final)).scalar_one())

    # --- within

    def _begin(self, tx: Transaction, leases: Sequence[Lease]) -> attempts.Started:
        can = self.provider.capabilities
        held_for = None if can.joins_log else 0.0 if can.leases_expire else LEASE_SECONDS
        leases = adoption.adopt(tx, leases, 3)
        started = attempts.start(tx, leases, self.name, held_for=held_for)
        refresh(tx, {lease.delivery.message.id for lease in leases})
        if can.deduplicates:
            assert started.settled == [], "was handed out although its outcome is stored"
        return started

    def _record(self, tx: Transaction, outcomes: Sequence[Outcome]) -> None:
        stored, _ = attempts.record(tx, outcomes)
        if not (self._joins_log or self.provider.capabilities.leases_expire):
            attempts.let_go(tx, stored)
        refresh(tx, {outcome.lease.delivery.message.id for outcome in stored})

    def _record_and_settle(
        self, tx: Transaction, outcomes: Sequence[Outcome], settlements: Sequence[Settlement]
    ) -> list[Settlement]:
        self._record(tx, outcomes)
        return self.provider.settle(settlements, tx)

    def _with_provider(self, step: Callable[[Transaction | None], T]) -> T:
        return self._in_log(step) if self._joins_log else step(None)

    def _in_log(self, step: Callable[[Transaction], T]) -> T:
        for _ in range(TRANSIENT_TRIES):
            try:
                with self.database.transaction() as tx:
                    return step(tx)
            except SQLAlchemyError as exc:
                if not is_transient(exc):
                    raise
        raise AssertionError(f"lost {TRANSIENT_TRIES} deadlocks in a row")


_STATUSES = {
    SettleAction.ACKNOWLEDGE: DeliveryStatus.COMPLETED,
    SettleAction.RETRY: DeliveryStatus.RETRY,
    SettleAction.DEAD_LETTER: DeliveryStatus.FAILED,
    SettleAction.RELEASE: DeliveryStatus.PENDING,
}


def _outcome(settlement: Settlement) -> Outcome:
    failure = Failure("TestError", "the test wanted it")
    return Outcome(settlement.lease, _STATUSES[settlement.action], failure, settlement.delay)


def seqs(deliveries: Sequence[Delivery | Lease]) -> list[int]:
    """Return which deliveries these are."""
    return [(each.delivery if isinstance(each, Lease) else each).seq for each in deliveries]


@contextlib.contextmanager
def elapsed(at_least: float = 0.0, at_most: float = math.inf) -> Iterator[None]:
    """See that what is within takes that many seconds."""
    start = monotonic()
    yield
    seconds = monotonic() - start
    assert at_least <= seconds <= at_most, f"took {seconds:.3f} s, not {at_least} to {at_most}"
