"""Delays, and how a consumer that waits is woken."""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic

from eventlet import patcher

from shared.native import select
from shared.testing.conformance.lab import Worker, elapsed, seqs
from shared.testing.conformance.process import Process
from shared.types import Subscription

native_threading = patcher.original("threading")

NewProcess = Callable[..., Process]

CLOCK_SECONDS = 0.005
"""By how much two clocks may disagree that both count to the millisecond."""


class TestDelay:
    def test_is_kept_and_no_longer(self, worker: Worker) -> None:
        with elapsed(0.4 - CLOCK_SECONDS, 0.4 + worker.lab.promptly):
            sent = worker.dispatch("placed", delay=0.4)
            assert seqs(worker.reserve_within(30)) == seqs(sent)

    def test_that_is_over_is_none(self, worker: Worker) -> None:
        sent = worker.dispatch("placed", delay=0)
        assert seqs(worker.reserve()) == seqs(sent)

    def test_far_off_delays_no_other(self, worker: Worker) -> None:
        worker.dispatch("placed", 3, delay=3600)
        near = worker.dispatch("placed", delay=0.3)
        now = worker.dispatch("placed")
        assert seqs(worker.reserve()) == seqs(now)
        with elapsed(at_most=0.3 + worker.lab.promptly):
            assert seqs(worker.reserve_within(30)) == seqs(near)

    def test_orders_what_waits(self, worker: Worker) -> None:
        # so far apart that a busy machine does not find both of them due
        late = worker.dispatch("placed", delay=1.2)
        early = worker.dispatch("placed", delay=0.2)
        assert seqs(worker.reserve_within(30)) == seqs(early)
        assert seqs(worker.reserve_within(30)) == seqs(late)

    def test_is_heard_of_by_who_waits_already(self, worker: Worker, other: Worker) -> None:
        assert worker.reserve() == []
        with elapsed(0.3 - CLOCK_SECONDS, 0.3 + worker.lab.promptly):
            sent = other.dispatch("placed", delay=0.3)
            worker.wait(30)
            assert seqs(worker.reserve_within(30)) == seqs(sent)

    def test_survives_its_dispatcher(self, worker: Worker, new_process: NewProcess) -> None:
        process = new_process()
        sent = process.ask("dispatch", "placed", 1, 0.3)
        process.kill()
        assert seqs(worker.reserve_within(0.3 + worker.lab.promptly)) == sent


class TestWaiting:
    def test_ends_when_another_process_publishes(
        self, worker: Worker, placed: Subscription, new_process: NewProcess
    ) -> None:
        process = new_process()
        for _ in range(10):
            assert worker.reserve() == []
            process.tell("dispatch", "placed", 1, None)
            with elapsed(at_most=worker.lab.promptly):
                leases = worker.reserve_within(30)
            assert seqs(leases) == process.answer()
            # a lease is as long as a few rounds may take
            worker.acknowledge(*leases)

    def test_ends_when_this_process_publishes(self, worker: Worker, other: Worker) -> None:
        assert worker.reserve() == []
        sent = other.dispatch("placed")
        with elapsed(at_most=worker.lab.promptly):
            assert seqs(worker.reserve_within(30)) == seqs(sent)

    def test_misses_nothing_published_before_it_began(self, worker: Worker, other: Worker) -> None:
        for _ in range(3):
            assert worker.reserve() == []
            sent = other.dispatch("placed")
            with elapsed(at_most=worker.lab.promptly):
                worker.wait(30)
                leases = worker.reserve_within(30)
            assert seqs(leases) == seqs(sent)
            worker.acknowledge(*leases)

    def test_ends_when_another_releases(self, worker: Worker, other: Worker) -> None:
        worker.dispatch("placed")
        leases = other.reserve()
        assert worker.reserve() == []
        other.release(*leases)
        other.provider.published([lease.delivery for lease in leases])
        with elapsed(at_most=worker.lab.promptly):
            assert seqs(worker.reserve_within(30)) == seqs(leases)

    def test_ends_when_interrupted(self, worker: Worker) -> None:
        assert worker.reserve() == []
        timer = native_threading.Timer(0.1, worker.interrupt.ring)
        timer.start()
        with elapsed(at_most=0.1 + worker.lab.promptly):
            while not is_readable(worker):
                worker.wait(30)
        timer.join()

    def test_does_not_begin_when_interrupted_before(self, worker: Worker) -> None:
        worker.interrupt.ring()
        with elapsed(at_most=worker.lab.promptly):
            worker.wait(30)

    def test_ends_with_its_time(self, worker: Worker) -> None:
        assert worker.reserve() == []
        with elapsed(at_most=0.2 + worker.lab.promptly):
            worker.wait(0.2)

    def test_costs_little(self, worker: Worker) -> None:
        assert worker.reserve() == []
        before, deadline, waits = os.times(), monotonic() + 1, 0
        while (left := deadline - monotonic()) > 0:
            worker.wait(left)
            waits += 1
            assert worker.reserve() == []
        after = os.times()
        assert after.user + after.system - before.user - before.system < 0.2
        assert waits <= 50

    def test_serves_who_joins_later(self, worker: Worker, new_process: NewProcess) -> None:
        process = new_process()
        [paid] = worker.subscribe("paid")
        process.tell("dispatch", "paid", 1, None)
        with elapsed(at_most=worker.lab.promptly):
            [lease] = worker.reserve_within(30)
        assert lease.delivery.subscription_id == paid.id
        assert [lease.delivery.seq] == process.answer()


class TestNone:
    """Given a worker that may have none of a subscription: its limits are used up."""

    def test_leaves_all_to_others(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        none = {placed.id: 0}
        assert worker.reserve(10, none) == other.reserve() == []
        sent = other.dispatch("placed", 5)
        worker.wait(0.1)
        assert set(seqs(other.reserve())) == set(seqs(sent))
        assert worker.reserve(10, none) == []

    def test_does_not_end_its_wait_again_and_again(
        self, worker: Worker, placed: Subscription
    ) -> None:
        none = {placed.id: 0}
        assert worker.reserve(10, none) == []
        sent = worker.dispatch("placed")
        deadline, waits = monotonic() + 1, 0
        while (left := deadline - monotonic()) > 0:
            worker.wait(left)
            assert worker.reserve(10, none) == []
            waits += 1
        assert waits < 30
        assert seqs(worker.reserve_within(worker.lab.promptly)) == seqs(sent)

    def test_of_more_than_one_gives_back_the_rest(
        self, worker: Worker, other: Worker, placed: Subscription
    ) -> None:
        """Given a worker that waits for five, and may then have one."""
        assert worker.reserve(5) == other.reserve() == []
        worker.wait(0.1)
        sent = other.dispatch("placed", 5)
        worker.wait(worker.lab.promptly)
        [lease] = worker.reserve(1, {placed.id: 1})
        rest = other.reserve_within(worker.lab.promptly, 4)
        assert {*seqs([lease]), *seqs(rest)} == set(seqs(sent))

    def test_holds_for_no_other_subscription(self, worker: Worker, placed: Subscription) -> None:
        [paid] = worker.subscribe("paid")
        worker.dispatch("placed", 3)
        sent = worker.dispatch("paid", 3)
        assert seqs(worker.reserve(10, {placed.id: 0, paid.id: 10})) == seqs(sent)


def is_readable(worker: Worker) -> bool:
    return bool(select([worker.interrupt], [], [], 0)[0])
