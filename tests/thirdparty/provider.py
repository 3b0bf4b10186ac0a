"""A queue in an SQLite file of its own, which all processes of one machine share.

Nothing wakes who waits: it looks. docs/providers.md walks through this file.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from itertools import zip_longest
from time import monotonic
from typing import Any

from shared.errors import ProviderError, ProviderUnavailableError
from shared.native import select as wait_readable
from shared.providers import Capabilities, QueueProvider, SubscriptionStats
from shared.settings import Settings
from shared.types import Delivery, Envelope, Lease, Priority, SettleAction, Settlement, Subscription

POLL_SECONDS = 0.02
"""How often who waits looks, which takes a thousandth of it."""

LOCK_SECONDS = 5.0
"""How long to wait for another process' transaction, which takes milliseconds."""

DONE_SECONDS = 60.0
"""How long what was acknowledged is remembered: who got no answer publishes again within that."""

# state is waiting, leased, dead or done; due is when it may be reserved, when its lease runs
# out, or when it ended
TABLES = """
CREATE TABLE IF NOT EXISTS deliveries (
    message TEXT, subscription INTEGER, seq INTEGER, rank INTEGER, attempts INTEGER,
    token INTEGER, state TEXT, due REAL, envelope TEXT,
    PRIMARY KEY (message, subscription));
CREATE INDEX IF NOT EXISTS in_order ON deliveries (subscription, state, rank, seq);
CREATE INDEX IF NOT EXISTS done ON deliveries (due) WHERE state = 'done';
CREATE TABLE IF NOT EXISTS paused (subscription INTEGER PRIMARY KEY);
"""

# a dead letter comes back; what was acknowledged does where the log knows of its leases
PUBLISH = """
INSERT INTO deliveries VALUES (
    :message, :subscription, :seq, :rank, :attempts, :token, 'waiting', :due, :envelope)
ON CONFLICT (message, subscription) DO UPDATE
    SET state = 'waiting', due = excluded.due, attempts = excluded.attempts,
        token = max(token, excluded.token), envelope = excluded.envelope
    WHERE state = 'dead' OR state = 'done' AND excluded.token > 0
"""

# leases that ran out are work, too
IS_DUE = "subscription = :subscription AND due <= :now AND state"
IS_PAUSED = "EXISTS (SELECT 1 FROM paused WHERE subscription = :subscription)"

LOOK = f"""
SELECT EXISTS (SELECT 1 FROM deliveries WHERE {IS_DUE} = 'waiting') AND NOT {IS_PAUSED}
    OR EXISTS (SELECT 1 FROM deliveries WHERE {IS_DUE} = 'leased')
"""

PEEK = f"SELECT * FROM deliveries WHERE {IS_DUE} = 'waiting' ORDER BY rank, seq LIMIT :limit"

NEXT = PEEK.replace("ORDER", f"AND NOT {IS_PAUSED} ORDER")

# the token moves on at once, so that who held it can no longer settle
TAKE_OVER = f"UPDATE deliveries SET state = 'waiting', token = token + 1 WHERE {IS_DUE} = 'leased'"

LEASE = """
UPDATE deliveries SET state = 'leased', due = :until, token = token + 1
WHERE message = :message AND subscription = :subscription
"""

IS_HELD = """
WHERE message = :message AND subscription = :subscription
    AND token = :token AND state = 'leased'
"""

END = "UPDATE deliveries SET token = token + 1, due = :due, "

ENDS = {
    SettleAction.ACKNOWLEDGE: f"{END} state = 'done', envelope = '' {IS_HELD}",
    SettleAction.RETRY: f"{END} state = 'waiting', attempts = attempts + 1 {IS_HELD}",
    SettleAction.DEAD_LETTER: f"{END} state = 'dead', attempts = attempts + 1 {IS_HELD}",
    SettleAction.RELEASE: f"{END} state = 'waiting' {IS_HELD}",
}

FORGET_DONE = "DELETE FROM deliveries WHERE state = 'done' AND due < :before"

COUNT = """
SELECT sum(state = 'waiting' AND due <= :now), sum(state = 'leased'),
    sum(state = 'waiting' AND due > :now), sum(state = 'dead')
FROM deliveries WHERE subscription = :subscription
"""


class FileProvider(QueueProvider):
    """See the module's docstring."""

    capabilities = Capabilities()

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._file = settings.data_dir / "thirdparty.db"
        self._db: sqlite3.Connection | None = None
        self._mine: set[int] = set()
        # what the last reserve was to have none of: it is nothing to wake for
        self._closed: set[int] = set()
        self._turns = 0

    def initialize(self) -> None:
        self.close()
        with translated():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self._file, timeout=LOCK_SECONDS, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(TABLES)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = None

    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        self._mine |= {subscription.id for subscription in subscriptions}

    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> list[Delivery]:
        now = time.time()
        with self._transaction() as db:
            db.executemany(PUBLISH, [row_of(delivery, now) for delivery in deliveries])
        return []

    def published(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing: who waits looks by itself."""

    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        deadline = monotonic() + timeout
        while not (hungry and self._has_work()) and (left := deadline - monotonic()) > 0:
            pause = min(left, POLL_SECONDS) if hungry else left
            if wait_readable([interrupt], [], [], pause)[0]:
                break

    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        self._closed = {each for each, most in limits.items() if most <= 0}
        with self._transaction() as db:
            waiting = [self._next(db, *each) for each in self._in_turn(limits)]
            # one of each in turn, so that a long queue leaves room for the others
            shared = [row for rows in zip_longest(*waiting) for row in rows if row is not None]
            taken = sorted(shared[:limit], key=lambda row: (row["rank"], row["seq"]))
            until = time.time() + self.settings.lease
            db.executemany(LEASE, [{**row, "until": until} for row in taken])
        return [Lease(delivery_of(row), row["token"] + 1) for row in taken]

    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        now = time.time()
        with self._transaction() as db:
            db.execute(FORGET_DONE, {"before": now - DONE_SECONDS})
            return [
                each
                for each in settlements
                if not changes(db, ENDS[each.action], each.lease, now + each.delay)
            ]

    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        until = time.time() + self.settings.lease
        renew = f"UPDATE deliveries SET due = :due {IS_HELD}"
        with self._transaction() as db:
            return [lease for lease in leases if not changes(db, renew, lease, until)]

    def get_queue_stats(self, subscriptions: Sequence[Subscription]) -> list[SubscriptionStats]:
        with self._transaction() as db:
            counts = [db.execute(COUNT, at(each.id)).fetchone() for each in subscriptions]
        return [
            SubscriptionStats(each.subscriber, *(count or 0 for count in row))
            for each, row in zip(subscriptions, counts, strict=True)
        ]

    def health_check(self) -> bool:
        try:
            with self._transaction():
                return True
        except ProviderError:
            return False

    def pause(self, subscription: Subscription) -> None:
        self._change("INSERT OR IGNORE INTO paused VALUES (:subscription)", subscription)

    def resume(self, subscription: Subscription) -> None:
        self._change("DELETE FROM paused WHERE subscription = :subscription", subscription)

    def is_paused(self, subscription: Subscription) -> bool:
        with self._transaction() as db:
            [(answer,)] = db.execute(f"SELECT {IS_PAUSED}", {"subscription": subscription.id})
            return bool(answer)

    def peek(self, subscription: Subscription, limit: int) -> list[Delivery]:
        with self._transaction() as db:
            found = db.execute(PEEK, {**at(subscription.id), "limit": limit})
            return [delivery_of(row) for row in found]

    def purge(self, subscription: Subscription) -> int:
        return self._change(
            "DELETE FROM deliveries WHERE subscription = :subscription AND state = 'waiting'",
            subscription,
        )

    def forget(self, subscription: Subscription) -> None:
        self._change("DELETE FROM deliveries WHERE subscription = :subscription", subscription)
        self.resume(subscription)
        self._mine.discard(subscription.id)

    # --- within

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with translated():
            if self._db is None:
                raise sqlite3.OperationalError("it is not open")
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db

    def _change(self, statement: str, subscription: Subscription) -> int:
        with self._transaction() as db:
            return db.execute(statement, at(subscription.id)).rowcount

    def _in_turn(self, limits: Mapping[int, int]) -> list[tuple[int, int]]:
        """Begin with another one each time: who is first may get all there is room for."""
        self._turns += 1
        start = self._turns % max(len(limits), 1)
        return [*limits.items()][start:] + [*limits.items()][:start]

    def _next(self, db: sqlite3.Connection, subscription_id: int, limit: int) -> list[Any]:
        db.execute(TAKE_OVER, at(subscription_id))
        return db.execute(NEXT, {**at(subscription_id), "limit": limit}).fetchall()

    def _has_work(self) -> bool:
        """Look, without a lock."""
        with translated():
            if self._db is None:
                raise sqlite3.OperationalError("it is not open")
            mine = self._mine - self._closed
            return any(self._db.execute(LOOK, at(each)).fetchone()[0] for each in mine)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Let no driver's exception out."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as exc:
        raise ProviderUnavailableError(f"the file of the queue: {exc}") from exc
    except sqlite3.Error as exc:
        raise ProviderError(f"the file of the queue: {exc}") from exc


def at(subscription_id: int) -> dict[str, Any]:
    return {"subscription": subscription_id, "now": time.time()}


def changes(db: sqlite3.Connection, statement: str, lease: Lease, due: float) -> bool:
    """Execute a statement for a lease; say whether that was still held."""
    values = {
        "message": lease.delivery.message.id,
        "subscription": lease.delivery.subscription_id,
        "token": lease.token,
        "due": due,
    }
    return db.execute(statement, values).rowcount > 0


def row_of(delivery: Delivery, now: float) -> dict[str, Any]:
    envelope = {each.name: getattr(delivery.message, each.name) for each in fields(Envelope)}
    return {
        "message": delivery.message.id,
        "subscription": delivery.subscription_id,
        "seq": delivery.seq,
        "rank": delivery.message.priority.rank,
        "attempts": delivery.attempts,
        "token": delivery.token,
        "due": now + delivery.delay,
        "envelope": json.dumps(envelope, default=str),
    }


def delivery_of(row: Mapping[str, Any]) -> Delivery:
    values = json.loads(row["envelope"])
    values["priority"] = Priority(values["priority"])
    for name in ("scheduled_at", "created_at"):
        values[name] = values[name] and datetime.fromisoformat(values[name])
    return Delivery(row["seq"], row["subscription"], Envelope(**values), row["attempts"])
