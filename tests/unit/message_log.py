"""A message log, as the unit tests use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sqlalchemy import select

from shared.database import Database, Transaction, database_url
from shared.lifecycle import DeliveryStatus
from shared.native import sleep
from shared.settings import load_settings
from shared.store import attempts, log, subscriptions
from shared.store.summary import refresh
from shared.tables import attempts as attempts_table
from shared.tables import deliveries as deliveries_table
from shared.tables import messages as messages_table
from shared.testing.servers import MariaDBServer
from shared.types import (
    Delivery,
    Envelope,
    Failure,
    Lease,
    Outcome,
    Subscription,
    new_message_id,
)

COMPLETED, DISCARDED, FAILED, PENDING, PROCESSING, RETRY = (
    DeliveryStatus.COMPLETED,
    DeliveryStatus.DISCARDED,
    DeliveryStatus.FAILED,
    DeliveryStatus.PENDING,
    DeliveryStatus.PROCESSING,
    DeliveryStatus.RETRY,
)


BOOM = Failure("ValueError", "boom", "Traceback (most recent call last): …")

T = TypeVar("T")


class Log:
    """A message log, with a transaction of its own for each step."""

    def __init__(self, config: Mapping[str, str], server: MariaDBServer | None = None) -> None:
        self.config = config
        self.server = server
        self.database = Database(database_url(load_settings(config)), sleep)

    @property
    def waits_for_a_lock(self) -> bool:
        """Whether any transaction does."""
        assert self.server is not None
        [(_, count)] = self.server.execute("SHOW STATUS LIKE 'Innodb_row_lock_current_waits'")
        return int(count) > 0

    def do(self, step: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run ``step(tx, …)``."""
        with self.database.transaction() as tx:
            return step(tx, *args, **options)

    def rows(self, table: Any, *conditions: Any) -> list[Any]:
        query = select(table).where(*conditions).order_by(*table.primary_key)
        return list(self.do(lambda tx: tx.connection.execute(query).all()))

    def subscribe(
        self, event_type: str = "placed", subscriber: str = "audit.note", *, reliable: bool = True
    ) -> Subscription:
        wanted = Subscription("orders", "shop", event_type, subscriber, reliable=reliable)
        return self.do(subscriptions.register, [wanted])[0]

    def append(self, *envelopes: Envelope, again: bool = False) -> list[Delivery]:
        return self.do(log.append, envelopes, 3, again=again)

    def message(self, message_id: str) -> Any:
        return self.rows(messages_table, messages_table.c.id == message_id)[0]

    def delivery(self, seq: int) -> Any:
        return self.rows(deliveries_table, deliveries_table.c.seq == seq)[0]

    def history(self, seq: int) -> list[Any]:
        return self.rows(attempts_table, attempts_table.c.delivery_seq == seq)

    def start(self, *leases: Lease, worker: str = "host:1") -> attempts.Started:
        """Note that attempts begin, as a turn of the pump does."""

        def step(tx: Transaction) -> attempts.Started:
            started = attempts.start(tx, leases, worker)
            refresh(tx, {lease.delivery.message.id for lease in leases})
            return started

        return self.do(step)

    def record(self, *outcomes: Outcome) -> tuple[list[Outcome], list[Outcome]]:
        """Store how attempts ended, as a turn of the pump does."""

        def step(tx: Transaction) -> tuple[list[Outcome], list[Outcome]]:
            stored, refused = attempts.record(tx, outcomes)
            refresh(tx, {outcome.lease.delivery.message.id for outcome in stored})
            return stored, refused

        return self.do(step)

    def attempt(
        self,
        delivery: Delivery,
        status: DeliveryStatus,
        failure: Failure | None = None,
        delay: float = 0.0,
        token: int = 1,
    ) -> None:
        """Start one attempt and end it."""
        [lease] = self.start(Lease(delivery, token)).run
        assert (lease.delivery.seq, lease.token) == (delivery.seq, token)
        if failure is None and status in (RETRY, FAILED):
            failure = BOOM
        outcome = Outcome(lease, status, failure, delay)
        assert self.record(outcome) == ([outcome], [])


def event(event_type: str = "placed", body: str = "{}", **options: Any) -> Envelope:
    return Envelope(new_message_id(), "orders", event_type, body, **options)
