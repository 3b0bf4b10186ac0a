"""The steps of a ramp, one by one, on either database."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from sqlalchemy import delete, update

from shared.database import Database
from shared.errors import NothingToRetryError, RampRunningError
from shared.native import sleep
from shared.store import failures, ramps, repair, subscriptions
from shared.tables import ramp_deliveries
from shared.tables import ramps as ramps_table
from shared.types import Delivery, Failure
from tests.unit.message_log import COMPLETED, FAILED, Log, event

BOOM = Failure("ValueError", "boom", "", "shop.sell")
OTHER = Failure("KeyError", "other", "", "shop.sell")
GROUP = failures.fingerprint("ValueError", "shop.sell")


class Ramp:
    """A group of dead letters and its ramp."""

    def __init__(self, store: Log, count: int, rate: int = 1000) -> None:
        self.store = store
        self.subscription = store.subscribe()
        self.dead = [self.fail() for _ in range(count)]
        self.id = store.do(ramps.start, GROUP, "ada", rate)
        self.tokens: dict[int, int] = {}

    def fail(self, failure: Failure = BOOM) -> Delivery:
        [delivery] = self.store.append(event())
        self.store.attempt(delivery, FAILED, failure)
        return delivery

    def advance(self) -> list[Delivery]:
        """Do what is next, as if it were due."""
        self.store.do(
            lambda tx: tx.connection.execute(
                update(ramps_table).values(next_at=tx.now).where(ramps_table.c.id == self.id)
            )
        )
        return self.store.do(ramps.advance, self.id)

    def run(self, delivery: Delivery, status: Any, failure: Failure | None = None) -> None:
        token = self.tokens[delivery.seq] = self.tokens.get(delivery.seq, 1) + 1
        self.store.attempt(delivery, status, failure, token=token)

    @property
    def shown(self) -> dict[str, Any]:
        return self.store.do(lambda tx: ramps.ramp(tx.connection, self.id))


def test_goes_up_by_ten_and_only_when_a_step_has_ended(store: Log) -> None:
    ramp = Ramp(store, 15)
    sizes = []
    while ramp.shown["status"] == "running":
        new = ramp.advance()
        sizes.append(len(new))
        if new:
            assert ramp.advance() == []  # they are under way
            assert ramp.shown["waiting"] == len(new)
        for each in new:
            ramp.run(each, COMPLETED)
    assert [size for size in sizes if size] == [1, 10, 4]
    assert (ramp.shown["status"], ramp.shown["completed"]) == ("completed", 15)


def test_counts_stay_those_of_its_end(store: Log) -> None:
    """Given another ramp for the same ones, and one of which nothing is kept."""
    ramp = Ramp(store, 2)
    [first] = ramp.advance()
    ramp.run(first, FAILED, BOOM)
    ramp.advance()
    stopped = ramp.shown
    assert (stopped["status"], stopped["failed"], stopped["remaining"]) == ("stopped", 1, 2)

    [again] = store.do(repair.retry, [first.seq])
    ramp.run(again, COMPLETED)
    assert ramp.shown == stopped

    store.do(lambda tx: tx.connection.execute(delete(ramp_deliveries)))
    assert ramp.shown == stopped
    assert store.do(lambda tx: ramps.list_ramps(tx.connection)) == [stopped]


def test_stops_when_one_of_many_comes_back(store: Log) -> None:
    ramp = Ramp(store, 30)
    [first] = ramp.advance()
    ramp.run(first, COMPLETED)
    assert ramp.advance() == []
    ten = ramp.advance()
    for each in ten[:9]:
        ramp.run(each, COMPLETED)
    ramp.run(ten[9], FAILED, BOOM)

    assert ramp.advance() == []

    said = "Stopped in the step of 10: 1 of 10 failed again."
    assert (ramp.shown["status"], ramp.shown["sentence"]) == ("stopped", said)
    assert ramp.advance() == []
    assert (ramp.shown["remaining"], ramp.shown["retried"]) == (20, 11)


def test_stops_when_a_new_message_fails_in_the_same_way(store: Log) -> None:
    ramp = Ramp(store, 5)
    [first] = ramp.advance()
    ramp.run(first, COMPLETED)
    sleep(0.005)
    ramp.fail()

    assert ramp.advance() == []

    said = "Stopped in the step of 1: 1 more failed in the same way."
    assert ramp.shown["sentence"] == said


def test_goes_on_past_what_fails_otherwise(store: Log) -> None:
    ramp = Ramp(store, 2)
    [first] = ramp.advance()
    ramp.run(first, FAILED, OTHER)
    ramp.advance()
    [second] = ramp.advance()
    ramp.run(second, COMPLETED)
    while ramp.shown["status"] == "running":
        ramp.advance()
    said = "1 of the 2 that were retried have completed; 1 failed otherwise."
    assert (ramp.shown["status"], ramp.shown["sentence"]) == ("completed", said)


def test_leaves_what_nobody_would_handle(store: Log) -> None:
    ramp = Ramp(store, 2)
    store.do(subscriptions.retire, [ramp.subscription.id])
    while ramp.shown["status"] == "running":
        assert ramp.advance() == []
    assert ramp.shown["sentence"].endswith("; 2 are of subscriptions that were retired.")


def test_keeps_to_its_rate(store: Log) -> None:
    ramp = Ramp(store, 30, rate=4)
    [first] = ramp.advance()
    ramp.run(first, COMPLETED)
    ramp.advance()
    assert len(ramp.advance()) == 4
    assert store.do(ramps.advance, ramp.id) == []  # a second is not over
    assert len(ramp.advance()) == 4
    assert store.do(lambda tx: ramps.due(tx.connection, tx.now)[0]) == []
    _, soonest = store.do(lambda tx: ramps.due(tx.connection, tx.now))
    assert soonest is not None
    assert 0 < soonest <= 1


def test_of_a_group_there_is_one_at_a_time(store: Log) -> None:
    ramp = Ramp(store, 2)
    with pytest.raises(RampRunningError):
        store.do(ramps.start, GROUP, "bob", 1)
    store.do(ramps.cancel, ramp.id, "bob")
    assert store.do(ramps.start, GROUP, "bob", 1) != ramp.id
    with pytest.raises(NothingToRetryError):
        store.do(ramps.start, "0" * 16, "bob", 1)


def test_several_at_once_do_not_double_it(store: Log) -> None:
    ramp = Ramp(store, 12)
    [first] = ramp.advance()
    ramp.run(first, COMPLETED)
    ramp.advance()
    taken: list[Delivery] = []

    def advance() -> None:
        database = Database(store.database.engine.url, sleep)
        taken.extend(database.run(lambda tx: ramps.advance(tx, ramp.id)))
        database.close()

    threads = [threading.Thread(target=advance) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert len(taken) == len({each.seq for each in taken}) == 10
    assert ramp.shown["retried"] == 11
