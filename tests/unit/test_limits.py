"""Limits of subscriptions, step by step, on either database: the bucket, and permits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from sqlalchemy import update

from shared.database import Transaction
from shared.store import limits, subscriptions
from shared.store.limits import Ask, Grant, Limits
from shared.store.why import Provider, why
from shared.tables import limits as limits_table
from shared.tables import permits as permits_table
from tests.unit.message_log import Log, event
from tests.unit.test_store import Meanwhile

LEASE = 30.0


def test_go_with_a_subscription_that_is_retired(store: Log) -> None:
    """Given another one, which keeps what it has, and the same that comes back later."""
    site, other = Site(store), Site(store, store.subscribe("cancelled").id)
    for each in (site, other):
        each.limit(rate=5, concurrency=3)
        each.ask(held=1, want=1)
    store.do(subscriptions.retire, [site.id])
    for table in (limits_table, permits_table):
        assert [row.subscription_id for row in store.rows(table)] == [other.id]
    assert store.subscribe().id == site.id
    assert store.do(limits.limited, [site.id, other.id]) == {other.id}


class Site:
    """A subscription with limits, and the processes that consume it."""

    def __init__(self, store: Log, subscription_id: int = 0) -> None:
        self.store = store
        self.id = subscription_id or store.subscribe().id

    def limit(self, **wanted: float) -> None:
        self.store.do(limits.change, self.id, Limits(**wanted))  # type: ignore[arg-type]

    def ask(self, worker: str = "a", **asked: int) -> Grant:
        """Ask for what may be reserved, as a process with a carrier does."""
        grants = self.store.do(self.step, worker, [Ask(self.id, **{"held": 0, **asked})])
        return grants[self.id]

    def step(self, tx: Transaction, worker: str, asks: Sequence[Ask]) -> dict[int, Grant]:
        grants = limits.ask(tx, worker, asks)
        limits.keep(tx, worker, list(grants.values()), LEASE)
        return grants

    def reserve(self, want: int, waiting: int, worker: str = "a", held: int = 0) -> int:
        """Ask and reserve in one transaction, as a process does that joins the log."""

        def step(tx: Transaction) -> int:
            grants = limits.ask(tx, worker, [Ask(self.id, held, want=want)])
            reserved = min(grants[self.id].target, waiting)
            grants[self.id].use(reserved, reserved)
            limits.keep(tx, worker, list(grants.values()), LEASE)
            self.again = grants[self.id].again
            return reserved

        return self.store.do(step)

    def pass_time(self, seconds: float) -> None:
        """Have everything noted so much earlier, by the database's clock."""

        def step(tx: Transaction) -> None:
            for table, column in (
                (limits_table, limits_table.c.refilled_at),
                (permits_table, permits_table.c.expires_at),
            ):
                for row in tx.connection.execute(table.select()).all():
                    at = getattr(row, column.name) - timedelta(seconds=seconds)
                    is_it = [key == getattr(row, key.name) for key in table.primary_key]
                    tx.connection.execute(update(table).where(*is_it).values({column: at}))

        self.store.do(step)

    @property
    def permits(self) -> dict[str, tuple[int, int]]:
        return {row.worker: (row.held, row.spare) for row in self.store.rows(permits_table)}


@pytest.fixture
def site(store: Log) -> Site:
    return Site(store)


class TestRate:
    def test_lets_the_burst_begin_and_then_what_time_brings(self, site: Site) -> None:
        site.limit(rate=0.5, burst=5)
        assert site.reserve(want=10, waiting=10) == 5
        assert site.reserve(want=10, waiting=10) == 0
        assert 1.5 < site.again <= 2
        site.pass_time(1.5)
        assert site.reserve(want=10, waiting=10) == 0
        assert 0 < site.again <= 0.5
        site.pass_time(2.5)
        assert site.reserve(want=10, waiting=10) == 2
        site.pass_time(1000)
        assert site.reserve(want=10, waiting=10) == 5

    def test_is_one_for_all_processes(self, site: Site) -> None:
        site.limit(rate=0.01, burst=5)
        assert site.reserve(want=3, waiting=3, worker="a") == 3
        assert site.reserve(want=10, waiting=10, worker="b") == 2

    def test_takes_no_token_for_what_there_is_not(self, site: Site) -> None:
        site.limit(rate=0.01, burst=5)
        assert site.reserve(want=10, waiting=1) == 1
        assert site.again == float("inf")
        assert site.reserve(want=10, waiting=10) == 4

    def test_counts_what_is_spare_as_if_it_were_in_the_bucket(self, site: Site) -> None:
        """Given a process that was given three ahead, and did nothing for long."""
        site.limit(rate=1, burst=5)
        assert site.ask(want=3).target == 3
        site.pass_time(20)
        assert site.ask("b", want=10).target == 2
        # it uses them all at once, and the bucket had no place for more meanwhile
        assert site.ask(held=3, spare=0, used=3, want=10).target == 0

    def test_takes_back_what_was_not_used(self, site: Site) -> None:
        site.limit(rate=0.01, burst=5)
        assert site.ask(want=5).target == 5
        assert site.ask("b", want=5).target == 0
        assert site.ask(held=1, spare=1, used=1, want=1).target == 1
        assert site.ask("b", want=5).target == 3

    def test_that_changes_leaves_the_bucket_as_full_as_it_was(self, site: Site) -> None:
        site.limit(rate=0.01, burst=5)
        assert site.reserve(want=4, waiting=4) == 4
        site.limit(rate=0.02, burst=100)
        assert site.reserve(want=10, waiting=10) == 1
        site.limit()
        site.limit(rate=0.02, burst=7)
        assert site.reserve(want=10, waiting=10) == 7

    def test_goes_on_when_the_clock_was_set_back(self, site: Site) -> None:
        site.limit(rate=1, burst=1)
        assert site.reserve(want=1, waiting=1) == 1
        site.pass_time(-3600)
        assert site.reserve(want=1, waiting=1) == 0
        site.pass_time(1)
        assert site.reserve(want=1, waiting=1) == 1

    def test_has_a_burst_where_nobody_names_one(self) -> None:
        assert [Limits(rate=rate).depth for rate in (0.5, 10, 20, 1000)] == [1, 1, 2, 100]


class TestConcurrency:
    def test_holds_over_all_processes(self, site: Site) -> None:
        site.limit(concurrency=3)
        assert site.reserve(want=2, waiting=2, worker="a") == 2
        assert site.reserve(want=10, waiting=10, worker="b") == 1
        assert site.reserve(want=10, waiting=10, worker="a", held=2) == 0
        assert 0 < site.again <= limits.AGAIN_SECONDS
        assert site.reserve(want=10, waiting=10, worker="a", held=1) == 1

    def test_counts_what_is_spare(self, site: Site) -> None:
        site.limit(concurrency=3)
        assert site.ask("a", want=2).target == 2
        assert site.ask("b", want=10).target == 1
        assert site.ask("a", held=1, spare=1, used=1, want=10).target == 1

    def test_takes_what_is_in_hand_as_it_is(self, site: Site) -> None:
        """Given a limit that comes when there is more in hand than that."""
        site.limit(concurrency=3)
        assert site.ask("a", held=10, want=5).target == 0
        assert site.ask("b", want=5).target == 0
        assert site.ask("a", held=2, want=5).target == 1

    def test_that_shrinks_is_less_to_spare(self, site: Site) -> None:
        site.limit(concurrency=10)
        assert site.ask("a", want=8).target == 8
        site.limit(concurrency=1)
        assert site.ask("a", held=0, spare=8, want=8).target == 1
        # until it is known that it was not used
        assert site.permits == {"a": (0, 8)}
        assert site.ask("a", held=0, spare=1, want=1).target == 1
        assert site.permits == {"a": (0, 1)}

    def test_runs_out_with_the_lease_of_who_died(self, site: Site) -> None:
        site.limit(concurrency=1)
        assert site.reserve(want=1, waiting=1, worker="a") == 1
        site.pass_time(LEASE - 0.5)
        assert site.reserve(want=1, waiting=1, worker="b") == 0
        assert 0 < site.again <= 0.5
        site.pass_time(0.6)
        assert site.reserve(want=1, waiting=1, worker="b") == 1
        assert site.permits == {"b": (1, 0)}

    def test_renewed_is_kept(self, site: Site) -> None:
        site.limit(concurrency=1)
        assert site.reserve(want=1, waiting=1, worker="a") == 1
        site.pass_time(LEASE - 0.5)
        site.ask("a", held=1)
        site.pass_time(LEASE - 0.5)
        assert site.reserve(want=1, waiting=1, worker="b") == 0

    def test_of_who_was_frozen_is_no_longer_to_spare(self, site: Site) -> None:
        site.limit(concurrency=1)
        assert site.ask("a", want=1).target == 1
        site.pass_time(LEASE + 1)
        assert site.ask("b", want=1).target == 1
        assert site.ask("a", spare=1, want=1).target == 0

    def test_is_free_when_who_had_it_leaves(self, site: Site) -> None:
        site.limit(concurrency=1)
        site.ask("a", held=1)
        site.store.do(limits.leave, "a", [site.id])
        assert site.ask("b", want=1).target == 1

    def test_with_a_rate_both_hold(self, site: Site) -> None:
        site.limit(concurrency=4, rate=0.01, burst=3)
        assert site.reserve(want=10, waiting=10, worker="a") == 3
        assert site.reserve(want=10, waiting=10, worker="a", held=3) == 0
        site.limit(concurrency=4, rate=100, burst=3)
        site.pass_time(1)
        assert site.reserve(want=10, waiting=10, worker="a", held=3) == 1

    def test_is_asked_for_one_after_the_other(self, site: Site) -> None:
        site.limit(concurrency=3, rate=0.01, burst=3)
        with site.store.database.transaction() as tx:
            asks = [Ask(site.id, 0, want=2)]
            assert site.step(tx, "a", asks)[site.id].target == 2
            other = Meanwhile(
                site.store, lambda log: Site(log, site.id).reserve(2, waiting=2, worker="b")
            )
            other.until_blocked()
        assert other.result() == 1


def test_what_has_no_limits_is_left_out(site: Site) -> None:
    other = site.store.subscribe("paid")
    site.limit(concurrency=1)
    assert site.store.do(limits.limited, [site.id, other.id]) == {site.id}
    asks = [Ask(site.id, 0, want=1), Ask(other.id, 0, want=1)]
    assert list(site.store.do(site.step, "a", asks)) == [site.id]
    site.limit()
    assert site.store.do(limits.limited, [site.id, other.id]) == set()
    assert site.store.do(site.step, "a", asks) == {}
    assert site.permits == {}


class TestWhy:
    def asked(self, site: Site) -> tuple[str, str]:
        """Return why the last of four events is not handled, and the number before it."""
        [*_, last] = [*self.dispatched(site)]
        shown = site.store.do(
            lambda tx: why(tx.connection, last, tx.now, Provider("embedded", True, True))
        )
        [reason] = shown["reasons"]
        return reason["reason"], reason["sentence"]

    def dispatched(self, site: Site) -> list[str]:
        site.store.do(subscriptions.sign, [site.id])
        return [each.message.id for each in site.store.append(*[event() for _ in range(4)])]

    def test_names_the_rate_that_is_used_up(self, site: Site) -> None:
        site.limit(rate=0.5, burst=1)
        assert self.asked(site)[0] == "behind"
        site.reserve(want=1, waiting=1)
        said = "Rate-limited to 0.5/s; 7 are before it."
        assert self.asked(site) == ("rate-limited", said)
        site.pass_time(4)
        assert self.asked(site)[0] == "behind"

    def test_names_how_many_may_be_in_hand(self, site: Site) -> None:
        site.limit(concurrency=2)
        site.reserve(want=1, waiting=1, worker="a")
        assert self.asked(site)[0] == "behind"
        site.reserve(want=1, waiting=1, worker="b")
        said = "Limited to 2 at once, and workers have 2 in hand; 7 are before it."
        assert self.asked(site) == ("concurrency-limited", said)
        site.pass_time(LEASE + 1)
        assert self.asked(site)[0] == "behind"
