"""Each provider against one small model of a queue, on real servers, by any order of operations."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from shared.lifecycle import MAX_TAKEOVERS
from shared.native import sleep
from shared.settings import load_settings
from shared.testing.conformance.lab import ProviderLab, Worker, seqs
from shared.types import Delivery, Lease, Priority, SettleAction, Settlement

SECONDS = 3.0
"""Within which a provider has what it has to have: a server may pass it on by itself."""

SOON_SECONDS = 0.01

NEVER_SECONDS = 3600.0

numbers = itertools.count(1)
picks = st.integers(0, 1 << 16)
workers = st.sampled_from([0, 1])


@dataclass(slots=True)
class Known:
    """What the model knows of one delivery."""

    delivery: Delivery
    rank: int
    worker: int | None = None
    lease: Lease | None = None
    takeovers: int = 0

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.delivery.seq


@dataclass(slots=True)
class Queue:
    """The model: where each delivery is, by its number."""

    waiting: dict[int, Known] = field(default_factory=dict)
    soon: dict[int, Known] = field(default_factory=dict)
    """Waits for a time, which is over before the next one reserves."""
    scheduled: dict[int, Known] = field(default_factory=dict)
    leased: dict[int, Known] = field(default_factory=dict)
    expired: dict[int, Known] = field(default_factory=dict)
    """Its lease ran out; it waits from when the next one reserves."""
    dead: int = 0
    stale: list[Lease] = field(default_factory=list)
    """Leases that are over."""
    is_paused: bool = False

    def end(self, known: Known) -> None:
        """Take a delivery out of its worker's hands."""
        self.leased.pop(known.delivery.seq, None)
        assert known.lease is not None
        self.stale.append(known.lease)
        known.lease = known.worker = None

    def become_due(self) -> None:
        """Do what the next one who reserves does first."""
        for known in self.expired.values():
            self.end(known)
        self.waiting |= self.soon | self.expired
        self.soon.clear()
        self.expired.clear()


class ProviderMachine(RuleBasedStateMachine):
    """Two workers of one subscription, which is new for each example."""

    lab: ProviderLab
    pair: list[Worker]

    @initialize()
    def subscribe(self) -> None:
        self.queue = Queue()
        number = next(numbers)
        self.type = f"type-{number}"
        for worker in self.pair:
            worker.declared.clear()
        [self.subscription] = self.pair[0].subscribe(self.type)
        self.pair[1].declare(self.subscription)
        self.can = self.pair[0].provider.capabilities

    # --- publishing

    @rule(count=st.integers(1, 5), priority=st.sampled_from(Priority), worker=workers)
    def publish(self, count: int, priority: Priority, worker: int) -> None:
        sent = self.pair[worker].dispatch(self.type, count, priority=priority)
        self._add(self.queue.waiting, sent, priority)

    @rule(is_soon=st.booleans(), priority=st.sampled_from(Priority))
    def publish_for_later(self, is_soon: bool, priority: Priority) -> None:
        delay = SOON_SECONDS if is_soon else NEVER_SECONDS
        sent = self.pair[0].dispatch(self.type, priority=priority, delay=delay)
        self._add(self.queue.soon if is_soon else self.queue.scheduled, sent, priority)

    @precondition(lambda self: self.queue.waiting and self.can.deduplicates)
    @rule(pick=picks)
    def publish_again(self, pick: int) -> None:
        self.pair[0].publish([chosen(self.queue.waiting, pick).delivery])

    # --- consuming

    @rule(worker=workers, limit=st.integers(1, 6))
    def reserve(self, worker: int, limit: int) -> None:
        self._become_due()
        wanted = 0 if self.queue.is_paused else min(limit, len(self.queue.waiting))
        best = sorted(known.place for known in self.queue.waiting.values())[:wanted]
        first = got = self.pair[worker].reserve(limit)
        deadline = monotonic() + SECONDS
        while len(got) < wanted and monotonic() < deadline:
            sleep(0.005)
            got = got + self.pair[worker].reserve(limit - len(got))
        assert len(got) == wanted
        taken = [self._take(worker, lease) for lease in got]
        if self.can.leases_expire:
            assert len(first) == wanted, "not all at once"
            assert [known.place for known in taken] == best, "not in their order"

    @rule(worker=workers)
    def wait(self, worker: int) -> None:
        its = self.pair[worker]
        its.provider.wait(0.005, its.interrupt.fileno())
        its.provider.wait(0, its.interrupt.fileno(), hungry=False)

    @precondition(lambda self: self.queue.leased)
    @rule(pick=picks, action=st.sampled_from(SettleAction), is_soon=st.booleans())
    def settle(self, pick: int, action: SettleAction, is_soon: bool) -> None:
        known = chosen(self.queue.leased, pick)
        lease, worker = known.lease, known.worker
        assert lease is not None
        assert worker is not None
        delay = SOON_SECONDS if is_soon else NEVER_SECONDS
        assert self.pair[worker].settle(Settlement(lease, action, delay)) == []
        self.queue.end(known)
        match action:
            case SettleAction.RETRY:
                its = self.queue.soon if is_soon else self.queue.scheduled
                its[known.delivery.seq] = known
            case SettleAction.RELEASE:
                self.queue.waiting[known.delivery.seq] = known
            case SettleAction.DEAD_LETTER:
                self.queue.dead += 1

    @precondition(lambda self: self.queue.leased)
    @rule(pick=picks)
    def extend(self, pick: int) -> None:
        known = chosen(self.queue.leased, pick)
        assert known.lease is not None
        assert known.worker is not None
        assert self.pair[known.worker].extend(known.lease) == []

    @precondition(lambda self: self.queue.stale and self.can.leases_expire)
    @rule(pick=picks, worker=workers, action=st.sampled_from(SettleAction))
    def settle_what_is_lost(self, pick: int, worker: int, action: SettleAction) -> None:
        stale = self.queue.stale[pick % len(self.queue.stale)]
        assert self.pair[worker].extend(stale) == [stale]
        assert self.pair[worker].settle(Settlement(stale, action, SOON_SECONDS)) == [stale]

    @rule(worker=workers)
    def lose_leases(self, worker: int) -> None:
        its = [known for known in self.queue.leased.values() if known.worker == worker]
        # one that is taken over once more would be a dead letter
        if any(known.takeovers + 2 >= MAX_TAKEOVERS for known in its):
            return
        self._expire(worker, [known.delivery.seq for known in its])
        for known in its:
            known.takeovers += 1
            del self.queue.leased[known.delivery.seq]
            self.queue.expired[known.delivery.seq] = known

    # --- operations

    @rule(worker=workers)
    def pause(self, worker: int) -> None:
        self.pair[worker].provider.pause(self.subscription)
        self.queue.is_paused = True
        self._learn_of_it()

    @rule(worker=workers)
    def resume(self, worker: int) -> None:
        self.pair[worker].provider.resume(self.subscription)
        self.queue.is_paused = False
        self._learn_of_it()

    @precondition(lambda self: self.can.counts_all)
    @rule(worker=workers)
    def purge(self, worker: int) -> None:
        its = self.queue.waiting, self.queue.soon, self.queue.scheduled
        assert self.pair[worker].provider.purge(self.subscription) == sum(map(len, its))
        for each in its:
            each.clear()

    @precondition(lambda self: self.can.peek)
    @rule(worker=workers, limit=st.integers(1, 6))
    def peek(self, worker: int, limit: int) -> None:
        seen = self.pair[worker].provider.peek(self.subscription, limit)
        places = sorted(known.place for known in self.queue.waiting.values())
        assert seqs(seen) == [seq for _, seq in places][:limit]

    def teardown(self) -> None:
        """Whatever happened: all that has not ended can be had, and nothing else."""
        if not hasattr(self, "can"):
            return
        self.resume(0)
        self._expect_stats()
        self._become_due()
        wanted = self.queue.waiting
        got: set[int] = set()
        deadline = monotonic() + SECONDS
        while len(got) < len(wanted) and monotonic() < deadline:
            for worker in self.pair:
                leases = worker.reserve(100)
                got |= set(seqs(leases))
                assert worker.acknowledge(*leases) == []
            sleep(0.005)
        assert got == wanted.keys()
        for known in list(self.queue.leased.values()):
            assert known.worker is not None
            assert known.lease is not None
            assert self.pair[known.worker].acknowledge(known.lease) == []
        assert self.pair[0].reserve(100) == []
        self.pair[0].provider.forget(self.subscription)
        self.pair[1].provider._mine = self._without_it(self.pair[1].provider)

    # --- within

    def _become_due(self) -> None:
        if self.queue.soon:
            sleep(2 * SOON_SECONDS)
        self.queue.become_due()

    def _add(self, place: dict[int, Known], sent: list[Delivery], priority: Priority) -> None:
        rank = priority.rank if self.can.priorities else 0
        place.update({each.seq: Known(each, rank) for each in sent})

    def _take(self, worker: int, lease: Lease) -> Known:
        seq = lease.delivery.seq
        known = self.queue.waiting.pop(seq, None)
        assert known is not None, f"{seq} does not wait: {self.queue}"
        assert not self.queue.is_paused
        known.worker, known.lease = worker, lease
        self.queue.leased[seq] = known
        return known

    def _learn_of_it(self) -> None:
        """Have both know of a pause: RabbitMQ tells them."""
        if self.can.leases_expire:
            return
        deadline = monotonic() + SECONDS
        for worker in self.pair:
            provider: Any = worker.provider
            while (self.subscription.id in provider._paused) != self.queue.is_paused:
                assert monotonic() < deadline
                provider.health_check()

    def _expire(self, worker: int, lost: list[int]) -> None:
        if not self.can.leases_expire:
            self.lab.lose_leases(self.pair[worker])
            self.pair[worker].provider.initialize()
        elif self.can.joins_log and lost:
            change = text(
                "UPDATE queue_deliveries SET lease_expires_at = '2000-01-01 00:00:00.000'"
                f" WHERE seq IN ({', '.join(map(str, lost))})"
            )
            self.pair[0].database.run(lambda tx: tx.connection.execute(change))
        elif lost:
            server: Any = self.lab.server  # type: ignore[attr-defined]
            with server.client(self.lab.settings.redis_db) as client:
                [key] = client.scan_iter(f"*:{self.subscription.id}:leases")
                assert client.zadd(key, dict.fromkeys(map(str, lost), 1), xx=True, ch=True)

    def _expect_stats(self) -> None:
        if not self.can.counts_all:
            return
        [found] = self.pair[0].provider.get_queue_stats([self.subscription])
        queue = self.queue
        waits = queue.waiting.keys() | queue.soon.keys() | queue.scheduled.keys()
        assert found.waiting + (found.scheduled or 0) == len(waits)
        assert found.active == len(queue.leased) + len(queue.expired)
        assert found.dead == queue.dead

    def _without_it(self, provider: Any) -> Any:
        mine = provider._mine
        if isinstance(mine, dict):
            return {key: each for key, each in mine.items() if key != self.subscription.id}
        return mine - {self.subscription.id}


def chosen(place: dict[int, Known], pick: int) -> Known:
    return list(place.values())[pick % len(place)]


EXAMPLES = {"embedded": 25, "redis": 20, "rabbitmq": 10}


@pytest.mark.parametrize(
    "lab",
    [
        "tests.conformance.labs:EmbeddedOnSQLite",
        "tests.conformance.labs:OnRedis",
        "tests.conformance.labs:OnRabbitMQ",
    ],
    ids=list(EXAMPLES),
    indirect=True,
)
def test_a_provider_is_a_queue(lab: ProviderLab, new_worker: Any) -> None:
    # no lease runs out by itself
    lab.config = {**lab.config, "QUEUE_LEASE_SECONDS": "600"}
    lab.settings = load_settings(lab.config)

    class Machine(ProviderMachine):
        pass

    Machine.lab, Machine.pair = lab, [new_worker(), new_worker()]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=EXAMPLES[lab.settings.provider],
            stateful_step_count=25,
            deadline=None,
            database=None,
            # to shrink takes minutes, with a server
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
