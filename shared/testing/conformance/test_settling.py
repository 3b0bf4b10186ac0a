"""How leases end: by being settled, by running out, by being taken over."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

import pytest

from shared.testing.conformance.lab import LEASE_SECONDS, Worker, elapsed, seqs
from shared.testing.conformance.process import Process
from shared.testing.conformance.test_waiting import CLOCK_SECONDS
from shared.types import Lease, SettleAction, Settlement, Subscription

NewProcess = Callable[..., Process]


class TestSettling:
    def test_acknowledged_is_gone(self, worker: Worker, other: Worker) -> None:
        worker.dispatch("placed", 2)
        assert worker.acknowledge(*worker.reserve()) == []
        assert worker.reserve() == []
        assert other.reserve() == []

    def test_nothing(self, worker: Worker) -> None:
        assert worker.provider.settle([]) == []

    def test_retried_comes_again_after_its_delay(self, worker: Worker) -> None:
        sent = worker.dispatch("placed")
        leases = worker.reserve()
        with elapsed(0.3 - CLOCK_SECONDS, 0.3 + worker.lab.promptly):
            assert worker.retry(*leases, delay=0.3) == []
            [lease] = worker.reserve_within(30)
        assert seqs([lease]) == seqs(sent)
        assert lease.delivery.attempts == 1

    def test_retried_without_delay_comes_again_at_once(self, worker: Worker) -> None:
        sent = worker.dispatch("placed")
        worker.retry(*worker.reserve(), delay=0)
        assert seqs(worker.reserve_within(worker.lab.promptly)) == seqs(sent)

    def test_a_retry_that_waits_holds_nobody_up(self, worker: Worker) -> None:
        sent = worker.dispatch("placed", 2)
        worker.retry(*worker.reserve(1), delay=3600)
        assert seqs(worker.reserve()) == seqs(sent[1:])

    def test_a_dead_letter_does_not_come_again(self, worker: Worker, other: Worker) -> None:
        worker.dispatch("placed")
        assert worker.dead_letter(*worker.reserve()) == []
        assert other.reserve() == []

    def test_released_is_first_again(self, worker: Worker, other: Worker) -> None:
        sent = worker.dispatch("placed", 3)
        first = worker.reserve(1)
        assert worker.release(*first) == []
        leases = other.reserve()
        is_first = worker.lab.released_is_first
        assert seqs(leases) == seqs(sent if is_first else [*sent[1:], sent[0]])
        assert [lease.delivery.attempts for lease in leases] == [0, 0, 0]

    def test_many_at_once_each_in_its_own_way(self, worker: Worker, other: Worker) -> None:
        sent = worker.dispatch("placed", 8)
        leases = worker.reserve()
        actions = list(SettleAction) * 2
        ended = [Settlement(*each, 0.0) for each in zip(leases, actions, strict=True)]
        assert worker.settle(*ended) == []
        back = (SettleAction.RETRY, SettleAction.RELEASE)
        expected = [each.seq for each, action in zip(sent, actions, strict=True) if action in back]
        assert sorted(seqs(other.reserve_within(worker.lab.promptly, 4))) == expected

    def test_twice_is_refused_and_changes_nothing(self, worker: Worker) -> None:
        worker.dispatch("placed", 4)
        one, two, three, four = leases = worker.reserve()
        assert worker.acknowledge(one) == []
        assert worker.retry(two, delay=3600) == []
        assert worker.dead_letter(three) == []
        assert worker.retry(four, delay=3600) == []
        assert worker.retry(*leases, delay=0) == leases
        assert worker.release(*leases) == leases
        assert worker.reserve() == []

    def test_refuses_only_what_is_to_be_refused(self, worker: Worker) -> None:
        worker.dispatch("placed", 3)
        one, two, three = worker.reserve()
        worker.acknowledge(two)
        assert worker.acknowledge(one, two, three) == [two]
        assert worker.reserve() == []


class TestFencing:
    def test_who_lost_a_lease_can_no_longer_settle(self, worker: Worker, other: Worker) -> None:
        """Given leases that were taken over, and whose new holder is done with one of them."""
        worker.dispatch("placed", 5)
        lost = worker.reserve()
        worker.lab.lose_leases(worker)
        held = other.reserve_within(LEASE_SECONDS + worker.lab.promptly, 5)
        assert seqs(held) == seqs(lost)
        assert all(new.token > old.token for new, old in zip(held, lost, strict=True))
        other.retry(held[4], delay=3600)
        # when the old holder settles them, each in another way
        actions = [*SettleAction, SettleAction.RETRY]
        stale = [
            Settlement(lease, action, 0.0) for lease, action in zip(lost, actions, strict=True)
        ]
        # then each is refused, nothing comes back, and the new holder has all of them
        assert worker.settle(*stale) == lost
        assert worker.reserve() == []
        assert other.acknowledge(*held[:4]) == []
        assert worker.reserve() == []

    def test_who_lost_a_lease_has_lost_it_before_another_has_it(
        self, worker: Worker, other: Worker
    ) -> None:
        """Given two leases that ran out, and somebody else who had room for one of them."""
        worker.dispatch("placed", 2)
        first, second = worker.reserve()
        worker.lab.lose_leases(worker)
        [held] = other.reserve_within(LEASE_SECONDS + worker.lab.promptly)
        assert held.delivery.seq == first.delivery.seq
        # the log may still believe it, since nobody else began; the provider may not
        late = [Settlement(second, SettleAction.ACKNOWLEDGE)]
        assert worker.provider.settle(late) == late
        assert worker.extend(second) == [second]
        assert seqs(other.reserve()) == seqs([second])

    def test_tokens_grow(self, worker: Worker, other: Worker) -> None:
        worker.dispatch("placed")
        tokens = []
        for each in (worker, other, worker):
            [lease] = each.reserve()
            tokens.append(lease.token)
            each.release(lease)
        for each in (worker, other):
            [lease] = each.reserve_within(worker.lab.promptly)
            tokens.append(lease.token)
            each.retry(lease, delay=0)
        assert tokens == sorted(set(tokens))
        assert tokens[0] > 0


class TestLeases:
    def test_run_out_when_nobody_renews_them(self, worker: Worker, other: Worker) -> None:
        skip_unless_leases_expire(worker)
        sent = worker.dispatch("placed", 2)
        with elapsed(LEASE_SECONDS - CLOCK_SECONDS, LEASE_SECONDS + worker.lab.promptly):
            worker.reserve()
            assert seqs(other.reserve_within(30, 2)) == seqs(sent)

    def test_last_as_long_as_they_are_renewed(self, worker: Worker, other: Worker) -> None:
        skip_unless_leases_expire(worker)
        worker.dispatch("placed", 2)
        kept, left = worker.reserve()

        def renew() -> None:
            assert worker.extend(kept) == []

        deadline = monotonic() + 1.5 * LEASE_SECONDS
        assert seqs(renewing_until_taken_over(worker, other, kept)) == seqs([left])
        other.reserves_nothing_for(deadline - monotonic(), meanwhile=renew)
        assert worker.acknowledge(kept) == []

    def test_are_renewed_for_a_full_term(self, worker: Worker, other: Worker) -> None:
        skip_unless_leases_expire(worker)
        worker.dispatch("placed")
        leases = worker.reserve()
        other.reserves_nothing_for(LEASE_SECONDS / 2, meanwhile=lambda: None)
        with elapsed(LEASE_SECONDS - CLOCK_SECONDS, LEASE_SECONDS + worker.lab.promptly):
            worker.extend(*leases)
            other.reserve_within(30)

    def test_that_are_lost_are_said_to_be_and_no_others(
        self, worker: Worker, other: Worker
    ) -> None:
        worker.dispatch("placed", 2)
        taken_over, settled = worker.reserve()
        worker.acknowledge(settled)
        worker.lab.lose_leases(worker)
        held = other.reserve_within(LEASE_SECONDS + worker.lab.promptly)
        worker.dispatch("placed")
        [mine] = worker.reserve()
        assert worker.extend(taken_over, mine, settled) == [taken_over, settled]
        assert worker.extend() == []
        assert worker.acknowledge(mine, settled, taken_over) == [settled, taken_over]
        assert other.extend(*held) == []
        assert other.acknowledge(*held) == []

    def test_end_with_a_killed_process(
        self, worker: Worker, placed: Subscription, new_process: NewProcess
    ) -> None:
        sent = worker.dispatch("placed", 3)
        process = new_process(placed)
        assert process.ask("reserve", 3) == seqs(sent)
        process.kill()
        with elapsed(at_most=LEASE_SECONDS + worker.lab.promptly):
            leases = worker.reserve_within(30, 3)
        assert sorted(seqs(leases)) == seqs(sent)
        assert [lease.delivery.attempts for lease in leases] == [0, 0, 0]
        assert worker.acknowledge(*leases) == []


def skip_unless_leases_expire(worker: Worker) -> None:
    if not worker.provider.capabilities.leases_expire:
        pytest.skip("the provider's leases end with the connection alone")


def renewing_until_taken_over(holder: Worker, taker: Worker, kept: Lease) -> list[Lease]:
    """Renew ``kept`` for as long as it takes until another lease of ``holder`` runs out."""
    deadline = monotonic() + LEASE_SECONDS + holder.lab.promptly
    while not (taken := taker.reserve()):
        assert monotonic() < deadline
        assert holder.extend(kept) == []
        taker.wait(LEASE_SECONDS / 5)
    return taken


class TestSeveralConsumers:
    def test_get_different_deliveries(self, worker: Worker, other: Worker) -> None:
        sent = worker.dispatch("placed", 20)
        mine, theirs = [], []
        for _ in range(5):
            mine += worker.reserve(2)
            theirs += other.reserve(2)
        assert sorted(seqs([*mine, *theirs])) == seqs(sent)

    def test_get_each_of_a_thousand_once(
        self, worker: Worker, placed: Subscription, new_process: NewProcess
    ) -> None:
        processes = [new_process(placed) for _ in range(2)]
        sent = worker.dispatch("placed", 500)
        for process in processes:
            process.tell("consume", 10, 1000)
        sent += worker.dispatch("placed", 500)
        (mine, mine_refused), (theirs, theirs_refused) = (p.answer() for p in processes)
        assert sorted([*mine, *theirs]) == seqs(sent)
        assert mine_refused == theirs_refused == []
        # both had a part of it, or nothing was tried
        assert min(len(mine), len(theirs)) > 0
        assert worker.finished() == 1000
