"""Replay of history to one subscription, on either database."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from services.queue_admin.schemas import ReplaySchema
from shared.errors import PayloadError, SubscriptionNotFoundError
from shared.events.direct import DirectClient, DirectOperations
from shared.settings import load_settings
from shared.store import audit, backlog, repair, replay, stats, subscriptions, trail
from shared.store.gauges import log_gauges
from shared.store.listing import Place
from shared.store.replay import RANK, Stretch
from shared.tables import deliveries as deliveries_table
from shared.tables import messages as messages_table
from shared.types import Delivery, Priority, Subscription
from tests.unit.message_log import BOOM, COMPLETED, FAILED, RETRY, Log, event

START = datetime(2026, 1, 2, 3, 0)


class Desk(DirectOperations):
    """Somebody who replays, and the log that they replay from."""

    def __init__(self, store: Log) -> None:
        settings = load_settings(store.config)
        self.client = DirectClient(settings)
        self.reader = self.client
        self.store = store
        self.stored = 0

    def history(self, count: int = 1, event_type: str = "placed", **options: Any) -> list[Delivery]:
        """Store messages, one a minute; return their deliveries."""
        made = []
        for _ in range(count):
            envelope = event(event_type, **options)
            made += self.store.append(envelope)
            at = START + timedelta(minutes=self.stored)
            self.stored += 1
            self.store.do(
                lambda tx, id_=envelope.id, at=at: tx.connection.execute(
                    update(messages_table).where(messages_table.c.id == id_).values(created_at=at)
                )
            )
        return made

    def ids(self) -> list[str]:
        rows = self.store.rows(messages_table)
        return [row.id for row in sorted(rows, key=lambda row: (row.created_at, row.id))]

    def of(self, its: Subscription) -> list[Any]:
        """Return the deliveries of a subscription, in their order."""
        return self.store.rows(deliveries_table, deliveries_table.c.subscription_id == its.id)

    def run_all(self, its: Subscription, **options: Any) -> dict[str, Any]:
        """Replay to the end; return what was done in all."""
        done = self.replay("ada", its.id, **options)
        while done["nextCursor"]:
            options |= {"cursor": done["nextCursor"], "mark": done["mark"]}
            more = self.replay("ada", its.id, **options)
            done = {**more, **{key: done[key] + more[key] for key in ("messages", "replayed")}}
        return done


@pytest.fixture
def desk(store: Log) -> Iterator[Desk]:
    made = Desk(store)
    yield made
    made.client.close()


def test_a_new_subscription_gets_what_it_never_had_in_order(desk: Desk) -> None:
    desk.store.subscribe(subscriber="old.note")
    desk.history(2)
    desk.store.subscribe("paid", "old.note")
    desk.history(1, "paid")
    desk.history(3)
    ids = [each for each in desk.ids() if desk.store.message(each).message_type == "placed"]
    new = desk.store.subscribe(subscriber="new.note")
    desk.history(1)  # which it gets as everybody does

    done = desk.run_all(new, limit=2)

    assert (done["messages"], done["replayed"]) == (6, 5)
    its = desk.of(new)
    assert [row.message_id for row in its][1:] == ids
    assert {row.priority_rank for row in its[1:]} == {RANK}
    assert {(row.status, row.attempts, bool(row.ready)) for row in its} >= {("pending", 0, True)}
    assert len(desk.store.rows(deliveries_table)) == 7 + 6
    assert desk.run_all(new)["replayed"] == 0


def test_what_waits_does_so_since_it_was_replayed(desk: Desk) -> None:
    """Given messages of long ago: nobody is to be told that work is late by as much."""
    desk.history(3)
    late = desk.store.subscribe(subscriber="late.catch_up")
    desk.run_all(late)
    [shown] = desk.subscriptions("orders")
    assert (shown["id"], shown["waiting"]) == (late.id, 3)
    assert 0 <= shown["oldestWaitingSeconds"] < 60

    desk.store.do(backlog.give_back, [Delivery(x.seq, late.id, event()) for x in desk.of(late)])
    with desk.store.database.transaction() as tx:
        found = log_gauges(tx.connection, joins_log=False)
    [gauges] = found.subscriptions
    assert 0 <= gauges.oldest_waiting < 60
    assert 0 <= found.relay_lag["orders"] < 60


def test_what_nobody_was_subscribed_to_is_routed(desk: Desk) -> None:
    desk.history(3)
    [first, *_] = desk.ids()
    assert desk.store.message(first).status == "completed"
    its = desk.store.subscribe()

    assert desk.run_all(its)["replayed"] == 3

    assert desk.store.message(first).status == "pending"
    found = desk.store.do(lambda tx: stats.queue_stats(tx.connection, "orders"))
    assert found is not None
    assert (found["unrouted"], found["pending"]) == (0, 3)
    assert desk.store.do(lambda tx: audit.misdrawn(tx.connection)) == set()
    assert desk.store.do(lambda tx: audit.elsewhere(tx.connection, is_joined=True)) == []


def test_a_stretch_has_its_first_moment_and_not_its_last(desk: Desk) -> None:
    desk.history(5)
    ids = desk.ids()
    its = desk.store.subscribe()

    done = desk.run_all(its, since=START + timedelta(minutes=1), until=START + timedelta(minutes=3))

    assert done["replayed"] == 2
    assert [row.message_id for row in desk.of(its)] == ids[1:3]


def test_it_goes_on_through_pages_where_many_are_of_one_moment(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_SEARCHED", 3)
    for n in range(10):
        desk.history(1, "placed" if n % 3 else "paid")
        desk.stored = 0
    its = desk.store.subscribe()

    done = desk.run_all(its)

    assert (done["messages"], done["replayed"]) == (6, 6)
    assert [row.message_id for row in desk.of(its)] == [
        each for each in desk.ids() if desk.store.message(each).message_type == "placed"
    ]


class TestAgain:
    def outcomes(self, desk: Desk) -> tuple[Subscription, dict[str, str]]:
        """Have a delivery in each state; return the messages by it."""
        its = desk.store.subscribe()
        made = dict(zip(("completed", "retry", "failed", "pending"), desk.history(4), strict=True))
        desk.store.attempt(made["completed"], COMPLETED)
        desk.store.attempt(made["retry"], RETRY, BOOM, delay=60)
        desk.store.attempt(made["failed"], FAILED)
        [discarded] = desk.history(1)
        desk.store.do(repair.cancel, discarded.message.id)
        return its, {state: x.message.id for state, x in made.items()} | {
            "discarded": discarded.message.id
        }

    def test_not_asked_for_is_nothing_that_it_had(self, desk: Desk) -> None:
        its, _ = self.outcomes(desk)
        assert desk.run_all(its)["replayed"] == 0

    def test_is_what_is_done_with_and_what_is_open_is_left(self, desk: Desk) -> None:
        its, ids = self.outcomes(desk)

        done = desk.run_all(its, again=True)

        assert [row.message_id for row in desk.of(its)][5:] == [ids["completed"], ids["discarded"]]
        assert done["replayed"] == 2
        assert desk.store.message(ids["completed"]).status == "pending"

    def test_goes_on_by_its_mark_without_doubling(self, desk: Desk) -> None:
        its = desk.store.subscribe()
        for each in desk.history(3):
            desk.store.attempt(each, COMPLETED)
        first = desk.replay("ada", its.id, again=True, limit=2)
        rows = desk.store.rows(deliveries_table)
        assert (first["replayed"], first["mark"]) == (2, rows[2].seq)
        for row in rows[3:]:  # handled meanwhile
            desk.store.do(
                lambda tx, seq=row.seq: tx.connection.execute(
                    update(deliveries_table)
                    .where(deliveries_table.c.seq == seq)
                    .values(status="completed", processed_at=tx.now)
                )
            )
        assert desk.run_all(its, again=True, mark=first["mark"])["replayed"] == 1
        assert desk.run_all(its, again=True)["replayed"] == 2  # all but what waits


class TestRepairs:
    def replaced(self, desk: Desk) -> tuple[Delivery, str]:
        """Have a message whose payload was mended for one of two."""
        one = desk.store.subscribe(subscriber="one.note")
        desk.store.subscribe(subscriber="two.note")
        first, second = desk.history(1)
        desk.store.attempt(first, COMPLETED)
        desk.store.attempt(second, FAILED)
        assert first.subscription_id == one.id
        sent = desk.resend("ada", first.message.id, {"mended": True})
        return first, sent["messageId"]

    def test_do_not_go_to_who_handled_the_first_one_well(self, desk: Desk) -> None:
        first, _ = self.replaced(desk)
        assert desk.replay("ada", first.subscription_id)["replayed"] == 0

    @pytest.mark.parametrize("limit", [1, 10])
    def test_do_not_come_beside_the_first_one(self, desk: Desk, limit: int) -> None:
        first, _ = self.replaced(desk)
        new = desk.store.subscribe(subscriber="new.note")
        desk.run_all(new, limit=limit)
        assert [row.message_id for row in desk.of(new)] == [first.message.id]

    def test_come_where_the_first_one_is_not_of_the_stretch(self, desk: Desk) -> None:
        _, mended = self.replaced(desk)
        new = desk.store.subscribe(subscriber="new.note")
        desk.run_all(new, since=START + timedelta(minutes=1))
        assert [row.message_id for row in desk.of(new)] == [mended]


def test_what_is_scheduled_keeps_its_time(desk: Desk) -> None:
    desk.history(1, scheduled_at=datetime(2036, 1, 1))
    its = desk.store.subscribe()

    desk.run_all(its)

    [row] = desk.of(its)
    assert not row.ready
    assert abs(row.available_at - datetime(2036, 1, 1)) < timedelta(seconds=1)


def test_what_is_on_its_way_to_who_listens_at_a_broker_is_left(desk: Desk) -> None:
    desk.history(1)
    desk.store.do(
        lambda tx: tx.connection.execute(
            update(messages_table).values(status="pending", processed_at=None)
        )
    )
    its = desk.store.subscribe()
    assert desk.run_all(its)["replayed"] == 0


def test_a_broker_gets_it_for_that_subscription_alone_and_of_low_priority(store: Log) -> None:
    urgent = event(priority=Priority.URGENT)
    store.append(urgent)
    its = store.subscribe()
    new = store.do(replay.replay, its.id, [urgent.id], 0)
    store.do(backlog.give_back, new)

    [taken] = store.do(backlog.take)

    # by the exchange whoever listens would get it: plain nameko's services, too
    assert (taken.to, taken.token) == (its, 1)
    assert (taken.message.priority, urgent.priority) == (Priority.LOW, Priority.URGENT)
    assert taken.message.id == urgent.id


def test_several_at_once_double_nothing(desk: Desk) -> None:
    desk.history(40)
    ids = desk.ids()
    its = desk.store.subscribe()
    barrier = threading.Barrier(4)
    replayed: list[int] = []

    def run() -> None:
        other = Desk(desk.store)
        other.reader.read(replay.newest)
        barrier.wait()
        replayed.append(other.run_all(its, limit=7)["replayed"])
        other.client.close()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert sum(replayed) == 40
    assert [row.message_id for row in desk.of(its)] == ids


def test_between_a_look_and_the_deliveries_nothing_is_doubled(desk: Desk) -> None:
    desk.history(2)
    its = desk.store.subscribe()
    page = desk.reader.read(replay.look, its, Stretch(), None)
    desk.run_all(its)
    assert desk.store.do(replay.replay, its.id, page.ids, 0) == []


def test_who_is_retired_gets_nothing(desk: Desk) -> None:
    desk.history(2)
    its = desk.store.subscribe()
    page = desk.reader.read(replay.look, its, Stretch(), None)
    desk.store.do(subscriptions.retire, [its.id])

    with pytest.raises(SubscriptionNotFoundError):
        desk.replay("ada", its.id)
    with pytest.raises(SubscriptionNotFoundError):
        desk.store.do(replay.replay, its.id, page.ids, 0)
    with pytest.raises(PayloadError):
        desk.replay("ada", desk.store.subscribe().id, cursor="x")


def test_a_cursor_with_half_a_character_is_none(desk: Desk) -> None:
    cursor = Place(START, "\ud800").cursor()
    with pytest.raises(PayloadError):
        desk.replay("ada", desk.store.subscribe().id, cursor=cursor)


def test_each_transaction_is_small_and_noted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.events.replays.BATCH", 2)
    desk.history(5)
    its = desk.store.subscribe()

    desk.replay("ada", its.id, since=START, limit=1000)

    entries = desk.store.do(lambda tx: trail.entries(tx.connection, None, 100)["entries"])
    assert [each["detail"]["deliveries"] for each in entries] == [1, 2, 2]
    assert entries[0]["target"] == f"subscription {its.id}"
    assert entries[0]["detail"]["from"] == "2026-01-02T03:00:00.000Z"


def test_what_an_answer_ends_with_may_be_sent_back() -> None:
    assert ReplaySchema().load({"mark": None, "cursor": None}) == ReplaySchema().load({})
