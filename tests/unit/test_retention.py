"""What is removed of a message log, and what is not, on either database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update

from shared.events.direct import DirectClient
from shared.events.retention import EVERY_SECONDS, TIMER, Pruner, prune_when_due
from shared.lifecycle import DeliveryStatus
from shared.settings import load_settings
from shared.store import audit, repair, replay, retention, subscriptions, timers
from shared.tables import (
    alerts,
    attempts,
    audit_log,
    causes,
    deliveries,
    failures,
    messages,
    removed,
)
from shared.tables import timers as timers_table
from shared.types import Delivery, Lease, new_message_id
from tests.unit.message_log import COMPLETED, FAILED, RETRY, Log, event
from tests.unit.test_queuectl import queuectl

OLD = 40.0
"""Days; by default completed messages are kept for 30."""

MANY = 10_000


class Site:
    """A queue, and who removes what is old of it."""

    def __init__(self, store: Log, **env: str) -> None:
        self.store = store
        self.mine = store.subscribe()
        self.client = DirectClient(load_settings({**store.config, **env}))

    def make(self, *statuses: DeliveryStatus | None, days: float = OLD) -> Delivery:
        """Store a message whose one delivery came by these statuses, that long ago."""
        [delivery] = self.store.append(event())
        for token, status in enumerate(statuses, 1):
            if status is not None:
                self.store.attempt(delivery, status, token=token)
        self.age(delivery.message.id, days)
        return delivery

    def age(self, message_id: str, days: float) -> None:
        def step(tx: Any) -> None:
            at = tx.now - timedelta(days=days)
            its = {"created_at": at, "processed_at": at}
            tx.connection.execute(update(messages).where(messages.c.id == message_id).values(its))

        self.store.do(step)

    def alert(self, ended: float) -> int:
        """Store an alert that was over that many days ago; return its id."""

        def step(tx: Any) -> int:
            at = tx.now - timedelta(days=ended)
            its = {
                "queue_name": "orders", "rule": "dead_letters", "status": "resolved",
                "threshold": 1, "looks": 0, "began_at": at, "ended_at": at,
            }  # fmt: skip
            return int(tx.connection.execute(insert(alerts).values(its)).inserted_primary_key[0])

        return self.store.do(step)

    def pruner(self) -> Pruner:
        return Pruner(self.client, self.client, "ada")

    def prune(self) -> dict[str, Any]:
        with self.something_newer():
            return self.pruner().prune()._asdict()

    @contextmanager
    def something_newer(self) -> Iterator[None]:
        """Have there be a newer delivery for a while: the newest is never removed."""
        its_id = new_message_id()
        message = {"queue_name": "other", "message_type": "x", "payload": "{}", "id": its_id}
        delivery = {
            "message_id": its_id, "subscription_id": self.mine.id, "status": "completed",
            "processed_at": func.current_timestamp(), "priority_rank": 2,
        }  # fmt: skip
        is_its = messages.c.id == its_id, deliveries.c.message_id == its_id
        self.store.do(lambda tx: tx.connection.execute(insert(messages).values(message)))
        self.store.do(lambda tx: tx.connection.execute(insert(deliveries).values(delivery)))
        yield
        self.store.do(lambda tx: tx.connection.execute(delete(deliveries).where(is_its[1])))
        self.store.do(lambda tx: tx.connection.execute(delete(messages).where(is_its[0])))

    @property
    def ids(self) -> set[str]:
        return {row.id for row in self.store.rows(messages)}

    def count(self, table: Any) -> int:
        counted = select(func.count()).select_from(table)
        return self.store.do(lambda tx: tx.connection.execute(counted).scalar_one())

    @property
    def account(self) -> audit.Account:
        [account] = self.store.do(lambda tx: audit.accounts(tx.connection))
        return account


@pytest.fixture
def site(store: Log) -> Iterator[Site]:
    made = Site(store)
    yield made
    made.client.close()


@pytest.fixture
def dead_site(store: Log) -> Iterator[Site]:
    made = Site(store, QUEUE_KEEP_DEAD_DAYS="20")
    yield made
    made.client.close()


class TestPruning:
    def test_removes_what_was_completed_long_ago_with_all_that_is_of_it(self, site: Site) -> None:
        cause, old = site.make(COMPLETED), site.make(RETRY, COMPLETED)
        site.store.do(
            lambda tx: tx.connection.execute(
                insert(causes).values(message_id=old.message.id, cause_id=cause.message.id)
            )
        )
        before = site.account

        assert site.prune() == {"messages": 2, "deliveries": 2}

        assert site.ids == set()
        assert [site.count(table) for table in (deliveries, attempts, causes)] == [0, 0, 0]
        after = site.account
        assert after == before._replace(removed=2)
        assert after.dispatched == after.completed + after.dead + after.discarded + after.waiting
        assert site.prune() == {"messages": 0, "deliveries": 0}

    def test_leaves_everything_else(self, site: Site) -> None:
        kept = [
            site.make(COMPLETED, days=29.9),
            site.make(FAILED),
            site.make(RETRY),
            site.make(),
        ]
        [running] = site.store.append(event())
        site.store.start(Lease(running, 1))
        site.age(running.message.id, OLD)
        site.make(COMPLETED)

        assert site.prune()["messages"] == 1

        assert site.ids == {each.message.id for each in (*kept, running)}
        assert site.count(failures) == 1

    def test_leaves_what_came_to_its_end_lately(self, site: Site) -> None:
        late = site.make(COMPLETED)
        site.store.do(
            lambda tx: tx.connection.execute(update(messages).values(processed_at=tx.now))
        )
        assert site.prune()["messages"] == 0
        assert site.ids == {late.message.id}

    def test_leaves_what_waits_for_anybody(self, dead_site: Site) -> None:
        """A message is failed by one delivery, while another waits."""
        site = dead_site
        site.store.subscribe(subscriber="slow.note")
        first, _ = site.store.append(event())
        site.store.attempt(first, FAILED)
        site.age(first.message.id, OLD)
        assert site.store.message(first.message.id).status == "failed"

        assert site.prune()["messages"] == 0

        assert site.count(deliveries) == 2

    def test_leaves_what_a_broker_may_yet_bring(self, site: Site) -> None:
        """Without its row the copy would be taken for a stranger's, and run."""
        [cancelled] = site.store.append(event(delay=3600 * 24 * 90))
        site.store.do(repair.cancel, cancelled.message.id)
        site.age(cancelled.message.id, OLD)
        [early] = site.store.append(event(delay=3600 * 24 * 90))
        now = site.store.do(lambda tx: tx.now)
        [again] = site.store.do(repair.reschedule, early.message.id, now)
        site.store.attempt(again, COMPLETED)
        self.put_forward(site, early)
        assert {site.store.message(each).status for each in site.ids} == {"completed"}

        assert site.prune()["messages"] == 0

        assert site.ids == {cancelled.message.id, early.message.id}

    def test_leaves_the_newest_delivery_whose_number_would_come_again(self, site: Site) -> None:
        first, second = site.make(COMPLETED), site.make(COMPLETED)

        assert site.pruner().count().messages == 1
        assert site.pruner().prune() == (1, 1)

        assert site.ids == {second.message.id}
        third = site.make(COMPLETED)
        assert first.seq < second.seq < third.seq
        assert site.pruner().prune() == (1, 1)
        assert site.ids == {third.message.id}

    def test_removes_what_was_replayed(self, site: Site) -> None:
        done, discarded = site.make(COMPLETED), site.make(FAILED)
        site.store.do(repair.discard_message, discarded.message.id)
        for _ in range(2):
            self.replay(site, done)
        self.replay(site, discarded)
        assert site.account.discarded == 1

        assert site.prune() == {"messages": 2, "deliveries": 5}

        assert site.ids == set()

    def test_leaves_what_was_replayed_and_then_rescheduled(self, site: Site) -> None:
        done = site.make(COMPLETED)
        again = self.replay(site, done, status=None)
        now = site.store.do(lambda tx: tx.now)
        [late] = site.store.do(repair.reschedule, done.message.id, now)
        site.store.attempt(late, COMPLETED)
        self.put_forward(site, done)
        assert site.store.delivery(again.seq).status == "discarded"

        assert site.prune()["messages"] == 0

    def put_forward(self, site: Site, its: Delivery) -> None:
        """Have it be for a time long ago: nothing tells any more when the first copy comes."""
        site.age(its.message.id, OLD)
        is_it = messages.c.id == its.message.id
        site.store.do(
            lambda tx: tx.connection.execute(
                update(messages).where(is_it).values(scheduled_at=messages.c.created_at)
            )
        )

    def replay(
        self, site: Site, old: Delivery, status: DeliveryStatus | None = COMPLETED
    ) -> Delivery:
        mark = site.store.do(lambda tx: replay.newest(tx.connection))
        [again] = site.store.do(replay.replay, site.mine.id, [old.message.id], mark)
        if status is not None:
            site.store.attempt(again, status, token=2)
        site.age(old.message.id, OLD)
        return again

    def test_removes_dead_letters_only_where_that_is_wanted(self, store: Log) -> None:
        by_default, asked = Site(store), Site(store, QUEUE_KEEP_DEAD_DAYS="20")
        old, new = asked.make(FAILED), asked.make(FAILED, days=19.9)
        assert by_default.prune()["messages"] == 0
        assert asked.prune() == {"messages": 1, "deliveries": 1}
        assert old.message.id not in asked.ids
        assert asked.ids == {new.message.id}
        assert (asked.count(failures), asked.count(attempts)) == (1, 1)
        assert asked.account[2:] == (2, 0, 2, 0, 0, 0, 1)
        by_default.client.close()
        asked.client.close()

    def test_keeps_all_for_ever_where_that_is_wanted(self, store: Log) -> None:
        site = Site(store, QUEUE_KEEP_COMPLETED_DAYS="0")
        site.make(COMPLETED)
        assert site.prune()["messages"] == 0
        site.client.close()

    def test_leaves_what_somebody_retries_meanwhile(self, dead_site: Site) -> None:
        site = dead_site
        old = site.make(FAILED)
        [stretch] = [
            each
            for each in site.client.read(
                lambda c: retention.stretches(
                    c, retention.Kept(30, 20), site.store.do(lambda tx: tx.now)
                )
            )
            if each.status == "failed"
        ]
        site.store.do(repair.retry_message, old.message.id)
        assert site.store.do(retention.remove, stretch, [old.message.id]) == (0, 0)
        # nor once it has come to another end
        site.store.attempt(old, COMPLETED, token=2)
        assert site.store.do(retention.remove, stretch, [old.message.id]) == (0, 0)
        assert site.ids == {old.message.id}

    def test_removes_what_nobody_was_subscribed_to(self, store: Log) -> None:
        site = Site(store)
        store.do(subscriptions.retire, [site.mine.id])
        unrouted = event()
        assert store.append(unrouted) == []
        site.age(unrouted.id, OLD)
        assert site.prune() == {"messages": 1, "deliveries": 0}
        site.client.close()


class TestMany:
    def fill(self, site: Site, count: int) -> None:
        def step(tx: Any) -> None:
            at = tx.now - timedelta(days=OLD)
            ids = [new_message_id() for _ in range(count)]
            its = {
                "queue_name": "orders", "message_type": "placed", "payload": "{}",
                "status": "completed", "created_at": at, "processed_at": at,
            }  # fmt: skip
            tx.connection.execute(insert(messages), [{**its, "id": each} for each in ids])
            done = {
                "subscription_id": site.mine.id, "status": "completed", "processed_at": at,
                "priority_rank": 2, "attempts": 1,
            }  # fmt: skip
            tx.connection.execute(insert(deliveries), [{**done, "message_id": x} for x in ids])

        site.store.do(step)

    def test_go_in_small_steps_and_one_entry_of_the_audit_log(self, site: Site) -> None:
        self.fill(site, MANY)
        kept = [site.make(FAILED), site.make(COMPLETED, days=1), site.make()]
        before = site.account
        steps: list[int] = []

        def say(done: retention.Removed) -> bool:
            steps.append(done.messages)
            return True

        pruner = Pruner(site.client, site.client, "ada", say)

        assert pruner.prune()._asdict() == {"messages": MANY, "deliveries": MANY}

        most = retention.BATCH
        assert [n for n in steps if n < MANY] == list(range(most, MANY, most))
        assert site.ids == {each.message.id for each in kept}
        assert site.account == before._replace(removed=MANY)
        [entry] = site.store.rows(audit_log)
        assert (entry.actor, entry.action) == ("ada", "prune")
        assert str(MANY) in entry.detail

    def test_go_on_only_as_long_as_that_is_wanted(self, site: Site) -> None:
        self.fill(site, 2 * retention.BATCH)
        pruner = Pruner(site.client, site.client, "ada", lambda _: False)
        with site.something_newer():
            assert pruner.prune().messages == retention.BATCH
        assert len(site.ids) == retention.BATCH

    def test_are_counted_and_stay(self, site: Site) -> None:
        self.fill(site, 450)
        with site.something_newer():
            assert site.pruner().count().messages == 450
        assert len(site.ids) == 450
        assert site.count(removed) == site.count(audit_log) == 0


class TestTimer:
    def test_is_due_an_hour_after_the_first_start_and_once_an_hour(self, site: Site) -> None:
        site.make(COMPLETED)
        assert prune_when_due(site.client, site.client, "queue_admin") is None
        [timer] = site.store.rows(timers_table)
        now = site.store.do(lambda tx: tx.now)
        assert EVERY_SECONDS - 60 < (timer.next_at - now).total_seconds() <= EVERY_SECONDS
        self.make_due(site)

        with site.something_newer():
            done = prune_when_due(site.client, site.client, "queue_admin")

        assert done is not None
        assert done._asdict() == {"messages": 1, "deliveries": 1}
        shown = site.store.do(lambda tx: timers.shown(tx.connection, TIMER))
        assert shown["lastResult"] == {"messages": 1, "deliveries": 1}
        assert shown["lastRunAt"] < shown["nextRunAt"]
        site.make(COMPLETED)
        assert prune_when_due(site.client, site.client, "queue_admin") is None

    @pytest.mark.parametrize("was_due", [True, False])
    def test_is_noted_as_well_when_somebody_removes_before_it_is_due(
        self, site: Site, was_due: bool
    ) -> None:
        if was_due:
            assert prune_when_due(site.client, site.client, "queue_admin") is None
        site.make(COMPLETED)
        site.alert(ended=OLD)
        new = site.alert(ended=1)

        with site.something_newer():
            done = queuectl("prune", env=site.store.config)

        assert (done.exit_code, done.output) == (0, "1 messages removed\n")
        assert [row.id for row in site.store.rows(alerts)] == [new]
        shown = site.client.read(timers.shown, TIMER)
        assert shown["lastResult"] == {"messages": 1, "deliveries": 1}
        assert shown["lastRunAt"] < shown["nextRunAt"]
        assert prune_when_due(site.client, site.client, "queue_admin") is None

    def test_is_not_changed_by_who_only_counts(self, site: Site) -> None:
        old = site.alert(ended=OLD)
        assert queuectl("prune", "--dry-run", env=site.store.config).exit_code == 0
        assert [row.id for row in site.store.rows(alerts)] == [old]
        assert site.store.rows(timers_table) == []

    def make_due(self, site: Site) -> None:
        site.store.do(lambda tx: tx.connection.execute(update(timers_table).values(next_at=tx.now)))
