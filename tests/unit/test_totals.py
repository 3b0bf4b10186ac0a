"""What is counted of a long queue, once and for all, on either database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy import event as sqlalchemy_event

from services.queue_admin.service import QueueAdminService
from shared.events.direct import DirectClient
from shared.events.totals import LOOK_SECONDS, PAUSE_SECONDS, TotalsTimer
from shared.lifecycle import MessageStatus
from shared.settings import load_settings
from shared.store import repair, replay, retention, stats, totals
from shared.store.gauges import log_gauges
from shared.store.retention import Stretch
from shared.tables import deliveries, messages
from shared.tables import totals as totals_table
from shared.testing.servers import MariaDBServer
from shared.types import Delivery, new_message_id
from tests.unit.message_log import COMPLETED, FAILED, RETRY, Log, event
from tests.unit.test_store import Meanwhile

STEP = 10
HOUR = 3600.0
STRETCH = Stretch("orders", MessageStatus.COMPLETED, datetime(2037, 1, 1))


class Queue:
    """A queue, of which each ten messages are worth counting."""

    def __init__(self, store: Log) -> None:
        self.store = store
        self.mine = store.subscribe()

    def add(self, count: int, ago: float = HOUR) -> list[str]:
        """Store completed messages, one a second up to so long ago; return their ids."""

        def step(tx: Any) -> list[str]:
            begin = tx.now.replace(microsecond=0) - timedelta(seconds=ago + count)
            times = {new_message_id(): begin + timedelta(seconds=n) for n in range(count)}
            message = {
                "queue_name": "orders", "message_type": "placed", "payload": "{}",
                "status": "completed",
            }  # fmt: skip
            done = {"subscription_id": self.mine.id, "status": "completed", "priority_rank": 2}
            tx.connection.execute(
                insert(messages),
                [
                    {**message, "id": each, "created_at": at, "processed_at": at}
                    for each, at in times.items()
                ],
            )
            tx.connection.execute(
                insert(deliveries),
                [{**done, "message_id": x, "processed_at": at} for x, at in times.items()],
            )
            return list(times)

        return self.store.do(step)

    def add_one(self, *statuses: Any, ago: float = HOUR) -> Delivery:
        """Store a message whose delivery came by these statuses."""
        [delivery] = self.store.append(event())
        for token, status in enumerate(statuses, 1):
            self.store.attempt(delivery, status, token=token)
        self.age(delivery.message.id, ago)
        return delivery

    def add_unrouted(self, ago: float = HOUR) -> str:
        its = event("unheard")
        assert self.store.append(its) == []
        self.age(its.id, ago)
        return its.id

    def age(self, message_id: str, ago: float) -> None:
        def step(tx: Any) -> None:
            at = tx.now - timedelta(seconds=ago)
            its = update(messages).where(messages.c.id == message_id)
            tx.connection.execute(its.values(created_at=at))

        self.store.do(step)

    def count_on(self) -> None:
        """Do what the timer does, until nothing is left."""
        while self.store.do(lambda tx: totals.due(tx.connection, "orders", tx.now)):
            self.store.do(totals.advance, "orders")

    def make_old(self) -> datetime:
        """Have it be time to count anew; return when the count is said to have begun."""
        begun: datetime = self.row.begun_at - timedelta(seconds=totals.AGAIN_SECONDS)
        self.store.do(lambda tx: tx.connection.execute(update(totals_table).values(begun_at=begun)))
        return begun

    @property
    def row(self) -> Any:
        rows = self.store.rows(totals_table)
        return rows[0] if rows else None

    @property
    def stats(self) -> dict[str, Any]:
        found = self.store.do(lambda tx: stats.queue_stats(tx.connection, "orders"))
        assert found is not None
        return found

    @property
    def counted(self) -> dict[str, int]:
        """What one gets who counts all of it."""
        its = select(messages.c.status, func.count()).group_by(messages.c.status)
        rows = self.store.do(lambda tx: tx.connection.execute(its).all())
        alone = ~select(1).where(deliveries.c.message_id == messages.c.id).exists()
        unrouted = (
            select(func.count())
            .select_from(messages)
            .where(alone, messages.c.status == "completed")
        )
        return {
            **dict.fromkeys(map(str, MessageStatus), 0),
            **dict(rows),
            "total": sum(count for _, count in rows),
            "unrouted": self.store.do(lambda tx: tx.connection.execute(unrouted).scalar_one()),
        }

    def check(self) -> None:
        shown, counted = self.stats, self.counted
        assert {name: shown[name] for name in counted} == counted
        with self.store.database.transaction() as tx:
            gauges = log_gauges(tx.connection, joins_log=True).messages
        assert gauges == {("orders", str(x)): counted[x] for x in MessageStatus if counted[x]}


@pytest.fixture
def queue(store: Log, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setattr(totals, "STEP", STEP)
    return Queue(store)


@pytest.fixture
def on_mariadb(
    mariadb_log: Mapping[str, str], mariadb_server: MariaDBServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Queue]:
    """A queue where others write while somebody counts."""
    monkeypatch.setattr(totals, "STEP", STEP)
    made = Log(mariadb_log, mariadb_server)
    yield Queue(made)
    made.database.close()


def test_counts_what_is_old_once(queue: Queue) -> None:
    queue.add(25)
    queue.add_one(COMPLETED)
    queue.add_one(RETRY)
    queue.add_one(FAILED)
    queue.add_one()
    queue.add_unrouted()
    queue.add(3, ago=0)
    queue.check()
    assert queue.row is None

    queue.count_on()

    # what there is of the last minute stays out, and so does what is no whole step
    assert queue.row.messages == 20
    queue.check()
    queue.add(STEP, ago=HOUR / 2)
    queue.count_on()
    # three steps of completed messages, and what else was stored by then
    assert queue.row.messages == 33
    assert queue.row.unrouted == 1
    queue.check()


def test_does_nothing_for_few(queue: Queue) -> None:
    queue.add(STEP - 1)
    queue.add(STEP, ago=0)
    queue.count_on()
    assert queue.row is None
    queue.check()


def test_follows_what_is_counted_through_its_states(queue: Queue) -> None:
    """Given messages before the mark that are not completed: they come to be so, or to fail."""
    waiting, retrying = queue.add_one(ago=2 * HOUR), queue.add_one(RETRY, ago=2 * HOUR)
    queue.add(STEP)
    queue.count_on()
    assert queue.row.messages == STEP + 2
    queue.check()

    queue.store.attempt(waiting, COMPLETED)
    queue.store.attempt(retrying, FAILED, token=2)

    queue.check()
    assert (queue.stats["completed"], queue.stats["failed"]) == (STEP + 1, 1)


def test_waits_for_what_is_on_its_way(queue: Queue) -> None:
    """Given one without a delivery that a broker has not got yet: it may come to be unrouted."""
    queue.add(STEP, ago=2 * HOUR)
    on_its_way = queue.add_unrouted(ago=1.5 * HOUR)
    queue.add(2 * STEP)
    status = {"status": "pending", "processed_at": None}
    its = update(messages).where(messages.c.id == on_its_way)
    queue.store.do(lambda tx: tx.connection.execute(its.values(status)))
    queue.count_on()
    assert queue.row.messages == STEP
    queue.check()

    done = {"status": "completed", "processed_at": datetime(2026, 1, 1)}
    queue.store.do(lambda tx: tx.connection.execute(its.values(done)))
    queue.count_on()

    assert (queue.row.messages, queue.row.unrouted) == (3 * STEP, 1)
    queue.check()


def test_takes_off_what_is_removed(queue: Queue) -> None:
    unrouted = queue.add_unrouted(ago=2 * HOUR)
    old = queue.add(2 * STEP)
    queue.count_on()
    new = queue.add(2, ago=0)
    assert queue.row.messages == 2 * STEP
    # the newest delivery of all is never removed
    queue.add(1, ago=0)

    done = queue.store.do(retention.remove, STRETCH, [unrouted, *old[:3], *new])

    assert done.messages == 6
    assert (queue.row.messages, queue.row.unrouted) == (2 * STEP - 4, 0)
    queue.check()


def test_takes_off_what_gets_a_subscriber(queue: Queue) -> None:
    unrouted = queue.add_unrouted(ago=2 * HOUR)
    late = queue.add_unrouted(ago=0)
    queue.add(STEP)
    queue.count_on()
    assert (queue.row.messages, queue.row.unrouted, queue.stats["unrouted"]) == (STEP, 1, 2)
    its = queue.store.subscribe("unheard", "late.catch_up")

    added = queue.store.do(replay.replay, its.id, [unrouted, late], 0)

    assert len(added) == 2
    assert (queue.row.messages, queue.row.unrouted) == (STEP, 0)
    queue.check()


def test_begins_anew_once_a_day(queue: Queue) -> None:
    """Given messages that were stored before the mark when it was there: they are found then."""
    queue.add(STEP, ago=2 * HOUR)
    queue.add(2 * STEP)
    queue.count_on()
    queue.add(4, ago=3 * HOUR)
    assert queue.stats["total"] == queue.counted["total"] - 4

    begun = queue.make_old()
    queue.count_on()

    assert queue.row.begun_at > begun
    assert queue.row.messages == 3 * STEP
    queue.check()


def test_goes_by_what_is_known_while_it_counts_anew(queue: Queue) -> None:
    unrouted = queue.add_unrouted(ago=3 * HOUR)
    ids = queue.add(3 * STEP, ago=2 * HOUR)
    queue.add(1, ago=0)
    queue.count_on()
    queue.make_old()

    queue.store.do(totals.advance, "orders")

    known, anew = queue.store.rows(totals_table)
    assert (known.messages, anew.messages, anew.unrouted) == (3 * STEP, STEP, 1)
    queue.check()
    # what is removed, or gets a subscriber, comes off both
    queue.store.do(retention.remove, STRETCH, [ids[0], ids[-3]])
    its = queue.store.subscribe("unheard", "late.catch_up")
    queue.store.do(replay.replay, its.id, [unrouted], 0)
    known, anew = queue.store.rows(totals_table)
    assert (known.messages, anew.messages) == (3 * STEP - 2, STEP - 1)
    assert (known.unrouted, anew.unrouted) == (0, 0)
    queue.check()

    queue.count_on()

    assert len(queue.store.rows(totals_table)) == 1
    queue.check()


def test_a_step_has_no_more_of_any_status(queue: Queue) -> None:
    for n in range(3 * STEP):
        queue.add_one(ago=2 * HOUR - n)
    queue.add(STEP)
    queue.store.do(totals.advance, "orders")
    assert queue.row.messages == STEP
    queue.count_on()
    assert queue.row.messages == 4 * STEP
    queue.check()


def test_who_counts_waits_for_who_removes(queue: Queue) -> None:
    ids = queue.add(STEP)
    queue.add(1, ago=0)
    queue.count_on()
    queue.add(2 * STEP, ago=HOUR / 2)

    with queue.store.database.transaction() as tx:
        retention.remove(tx, STRETCH, ids[:3])
        counting = Meanwhile(queue.store, lambda other: other.do(totals.advance, "orders"))
        counting.until_blocked()
    counting.result()

    assert queue.row.messages == 2 * STEP - 3
    queue.check()


def test_who_removes_waits_for_who_counts(queue: Queue) -> None:
    queue.add(STEP)
    queue.count_on()
    ids = queue.add(STEP, ago=HOUR / 2)
    queue.add(1, ago=0)

    with queue.store.database.transaction() as tx:
        totals.advance(tx, "orders")
        removing = Meanwhile(
            queue.store, lambda other: other.do(retention.remove, STRETCH, ids[:3])
        )
        removing.until_blocked()
    removing.result()

    assert queue.row.messages == 2 * STEP - 3
    queue.check()


def test_counts_each_once_whatever_state_it_comes_to(on_mariadb: Queue) -> None:
    """Given messages that are handled, and retried, between any two statements of who counts."""
    queue = on_mariadb
    waiting = [queue.add_one(ago=2 * HOUR) for _ in range(2 * STEP)]
    failed = [queue.add_one(FAILED, ago=2 * HOUR) for _ in range(2 * STEP)]
    at = queue.store.message(failed[0].message.id).created_at
    queue.store.do(lambda tx: tx.connection.execute(update(messages).values(created_at=at)))
    queue.add(STEP)
    other = Log(queue.store.config)

    def move(*_: Any) -> None:
        other.attempt(waiting.pop(), COMPLETED)
        other.do(repair.retry_message, failed.pop().message.id)

    with queue.store.database.transaction() as tx:
        its = tx.connection, "after_cursor_execute", move
        sqlalchemy_event.listen(*its)
        totals.advance(tx, "orders")
        sqlalchemy_event.remove(*its)
    other.database.close()

    assert queue.row.messages == 4 * STEP
    queue.check()


def test_who_counts_first_sees_what_is_being_removed(queue: Queue) -> None:
    """Given nothing counted, so that who removes has nothing to take off, or to wait for."""
    ids = queue.add(2 * STEP)
    queue.add(1, ago=0)

    with queue.store.database.transaction() as tx:
        retention.remove(tx, STRETCH, ids[:3])
        counting = Meanwhile(queue.store, lambda other: other.do(totals.advance, "orders"))
        counting.until_blocked()
    counting.result()
    queue.count_on()

    queue.check()


def test_begins_anew_for_a_queue_that_has_nothing_left(queue: Queue) -> None:
    queue.add(STEP)
    queue.count_on()
    queue.store.do(lambda tx: tx.connection.execute(delete(deliveries)))
    queue.store.do(lambda tx: tx.connection.execute(delete(messages)))

    queue.make_old()

    assert queue.store.do(lambda tx: totals.queues_due(tx.connection, tx.now)) == ["orders"]
    queue.count_on()
    assert queue.row.messages == 0
    assert sum(queue.stats[str(each)] for each in MessageStatus) == 0


def test_looks_at_the_first_alone_of_what_is_on_its_way(
    sqlite_log: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a broker that is away for long: it is looked every few seconds, on the hub."""
    monkeypatch.setattr(totals, "STEP", STEP)
    store = Log(sqlite_log)
    queue = Queue(store)
    queue.add(STEP)

    def work(on_its_way: int) -> int:
        """Return how much SQLite does to see what is due."""
        ids = queue.add(on_its_way, ago=2 * HOUR)
        alone = delete(deliveries).where(deliveries.c.message_id.in_(ids))
        waits = update(messages).where(messages.c.id.in_(ids))
        status = {"status": "pending", "processed_at": None}
        store.do(lambda tx: tx.connection.execute(alone))
        store.do(lambda tx: tx.connection.execute(waits.values(status)))
        steps: list[None] = []

        def step(tx: Any) -> None:
            driver = tx.connection.connection.dbapi_connection
            driver.set_progress_handler(lambda: steps.append(None), 1)
            totals.due(tx.connection, "orders", tx.now)
            driver.set_progress_handler(None, 1)

        store.do(step)
        return len(steps)

    few, many = work(5), work(500)
    store.database.close()

    assert many < 2 * few


def test_what_is_stored_belatedly_is_missed_as_completed_alone(queue: Queue) -> None:
    """Given a clock that was set back: more waits from before the mark than was counted there."""
    ids = queue.add(STEP)
    queue.add(1, ago=0)
    queue.count_on()
    for _ in range(STEP + 2):
        queue.add_one(FAILED, ago=2 * HOUR)
    shown = queue.stats
    assert (shown["completed"], shown["failed"], shown["total"]) == (1, STEP + 2, STEP + 3)

    queue.store.do(retention.remove, STRETCH, ids)

    assert queue.row.messages == 0
    shown = queue.stats
    assert (shown["completed"], shown["failed"], shown["total"]) == (1, STEP + 2, STEP + 3)


def test_what_is_stored_belatedly_and_removed_leaves_no_less_than_none(queue: Queue) -> None:
    queue.add(STEP)
    queue.add(1, ago=0)
    queue.count_on()
    belated = [queue.add_unrouted(ago=2 * HOUR) for _ in range(3)]

    queue.store.do(retention.remove, STRETCH, belated)

    assert queue.row.unrouted == -3
    assert queue.stats["unrouted"] == 0


def test_a_service_counts_on_until_nothing_is_left(queue: Queue) -> None:
    queue.add(3 * STEP)
    assert isinstance(QueueAdminService.counting, TotalsTimer)
    timer: Any = TotalsTimer()
    timer.client = timer.reader = client = DirectClient(load_settings(queue.store.config))

    waits = [timer.carry_on() for _ in range(4)]

    client.close()
    assert waits == [PAUSE_SECONDS] * 3 + [LOOK_SECONDS]
    assert queue.row.messages == 3 * STEP
    queue.check()
