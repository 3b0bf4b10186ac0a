"""The provider itself: one Lua script an operation, in ``lua/``.

What there is of a queue is written down in ``lua/_queue.lua``. Its keys share a prefix
and, as a hash tag, the queue's name, so that a cluster keeps them on one node. Redis' own
clock decides what is due. Who waits is woken by pub/sub.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import compress
from time import monotonic
from typing import Any

from shared.errors import ProviderError
from shared.native import select as wait_readable
from shared.providers.base import Capabilities, QueueProvider, SubscriptionStats
from shared.providers.redis.connected import Connected
from shared.providers.redis.rpc import RedisRpc
from shared.providers.redis.scripts import script
from shared.providers.redis.servers import preload
from shared.providers.redis.wire import (
    MOST_AT_ONCE,
    PLACES,
    Batch,
    Command,
    Keys,
    Wanted,
    batches_of,
    encoded,
    facts_of,
    leases_of,
    line_of,
    lost_of,
    milliseconds,
    order_of,
    with_shares,
)
from shared.providers.rpc import RpcTransport
from shared.settings import Settings
from shared.types import Delivery, Lease, Settlement, Subscription

SETTLED_MS = 60_000
"""How long settled deliveries are remembered: somebody whose publishing got no answer does it
again within seconds."""

SETTLED_MOST = 10_000
"""How many settled deliveries are remembered of a queue: about 1 MB."""


class RedisProvider(Connected, QueueProvider):
    """See the module's docstring."""

    capabilities = Capabilities(lists=True)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        preload()
        self._keys = Keys(settings.redis_prefix)
        self._mine: dict[int, Subscription] = {}
        # when, by this process's own clock, something becomes due of itself
        self._due = math.inf
        self._turns = 0

    @classmethod
    def rpc_transport(cls, settings: Settings) -> RpcTransport:
        return RedisRpc(settings)

    def initialize(self) -> None:
        self._connect_anew()

    def close(self) -> None:
        self._disconnect()

    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        # nothing to make: a queue is there with what is in it
        self._mine |= {subscription.id: subscription for subscription in subscriptions}
        self._connect()

    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> list[Delivery]:
        batches = batches_of(deliveries, lambda d: d, lambda d: len(d.message.body) + 500)
        self._run([self._publication(batch) for batch in batches])
        return []

    def published(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing: the script that queued them woke who consumes."""

    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        if not hungry:
            wait_readable([interrupt], [], [], max(timeout, 0))
            return
        if self._mine and self._listener is None:
            return  # deaf: the next reserve listens again, or says what is wrong
        deadline = monotonic() + min(timeout, self._due - monotonic())
        if self._listener is None:
            wait_readable([interrupt], [], [], max(deadline - monotonic(), 0))
            return
        with self._deaf_on_errors():
            self._listener.wait(deadline, interrupt, self._mine.keys())

    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        self._hear()
        self._due = math.inf
        leases: list[Lease] = []
        hungry = wanted = self._in_turn(self._by_queue(limits))
        turn = self._turns // max(len(hungry), 1)
        while hungry and (left := limit - len(leases)) > 0:
            asked = [each for each in with_shares(hungry, left) if each.share > 0]
            answers = self._run([self._reservation(each, turn) for each in asked])
            for each, answer in zip(asked, answers, strict=True):
                leases += each.take(answer)
                self._note_due(answer[0])
            # who got less than its share has no more
            hungry = [each for each in hungry if each.has_more]
        self._forget_unreadable([each for each in wanted if each.unreadable])
        return sorted(leases, key=order_of)

    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        batches = batches_of(settlements, lambda x: x.lease.delivery)
        answers = self._run([self._settling(batch) for batch in batches])
        return lost_of(settlements, batches, answers)

    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        self._hear()
        batches = batches_of(leases, lambda lease: lease.delivery)
        answers = self._run([self._extension(batch) for batch in batches])
        return lost_of(leases, batches, answers)

    def get_queue_stats(self, subscriptions: Sequence[Subscription]) -> list[SubscriptionStats]:
        by_queue: dict[str, list[int]] = {}
        for each in subscriptions:
            by_queue.setdefault(each.queue, []).append(each.id)
        asked = [script("stats", self._keys.of(*each)) for each in by_queue.items()]
        counts: dict[int, list[int]] = {}
        for ids, answer in zip(by_queue.values(), self._run(asked), strict=True):
            rows = zip(*[iter(answer)] * len(PLACES), strict=True)
            counts |= zip(ids, map(list, rows), strict=True)
        return [SubscriptionStats(each.subscriber, *counts[each.id]) for each in subscriptions]

    def health_check(self) -> bool:
        # a cluster may have lost some of its nodes: those that matter are asked
        queues = {subscription.queue for subscription in self._mine.values()} or {""}
        keys = [self._keys.health(queue) for queue in queues]
        try:
            # writes nothing, and yet is refused by who is full or takes no writes
            self._run([Command(key, ("SETRANGE", key, 0, "")) for key in keys])
        except ProviderError:
            return False
        return True

    def pause(self, subscription: Subscription) -> None:
        self._set_paused(subscription, True)

    def resume(self, subscription: Subscription) -> None:
        self._set_paused(subscription, False)

    def is_paused(self, subscription: Subscription) -> bool:
        key = self._keys.paused(subscription.queue)
        return bool(self._run([Command(key, ("SISMEMBER", key, subscription.id))])[0])

    def peek(self, subscription: Subscription, limit: int) -> list[Delivery]:
        keys = self._keys.of(subscription.queue, [subscription.id])
        [answer] = self._run([script("peek", keys, subscription.id, limit)])
        leases, _ = leases_of(answer)
        return [lease.delivery for lease in leases]

    def purge(self, subscription: Subscription) -> int:
        return self._remove(subscription, "waiting", "scheduled")

    def forget(self, subscription: Subscription) -> None:
        self._remove(subscription, *PLACES)
        key = self._keys.paused(subscription.queue)
        self._run([Command(key, ("SREM", key, subscription.id))])
        self._mine.pop(subscription.id, None)

    def holds(self, subscription: Subscription, seqs: Sequence[int]) -> set[int]:
        keys = self._keys.of(subscription.queue, [subscription.id])
        chunks = [seqs[i : i + MOST_AT_ONCE] for i in range(0, len(seqs), MOST_AT_ONCE)]
        answers = self._run([script("holds", keys, subscription.id, *chunk) for chunk in chunks])
        found = [is_here for answer in answers for is_here in answer]
        return set(compress(seqs, found))

    def drop_scheduled(
        self,
        subscriptions: Sequence[Subscription],
        is_over: Callable[[Sequence[int]], Set[int]],
    ) -> int:
        dropped = 0
        for each in subscriptions:
            place = PLACES.index("scheduled") - len(PLACES)
            key = self._keys.of(each.queue, [each.id])[place]
            [found] = self._run([Command(key, ("ZRANGE", key, 0, -1))])
            seqs = [int(seq) for seq in found]
            if seqs and is_over(seqs) >= set(seqs):
                dropped += self._remove(each, "scheduled")
        return dropped

    def _forget_unreadable(self, found: Sequence[Wanted]) -> None:
        """Let go of what nobody can handle: an audit finds that it is missing, and repairs it."""
        commands = []
        for queue, its in ((each.queue, its) for each in found for its in each.unreadable):
            self.notices.append(
                f"redis has no readable envelope of delivery {its.seq} of {queue}: it is missing "
                "until an audit repairs that"
            )
            keys = self._keys.of(queue, [its.subscription_id])
            line = line_of(1, its.seq, its.token, "forget", 0)
            channel = self._keys.channel(queue)
            commands.append(script("settle", keys, channel, SETTLED_MS, SETTLED_MOST, line))
        self._run(commands)

    # --- what is said to Redis

    def _publication(self, batch: Batch[Delivery]) -> Command:
        args = [
            value
            for place, delivery in batch.placed()
            for value in (line_of(place, *facts_of(delivery)), encoded(delivery.message))
        ]
        channel = self._keys.channel(batch.queue)
        return script("publish", self._keys_of(batch), channel, *args)

    def _reservation(self, wanted: Wanted, turn: int) -> Command:
        args = [value for each in wanted.limits.items() for value in each]
        keys = self._keys.of(wanted.queue, list(wanted.limits))
        return script("reserve", keys, self._lease_ms, wanted.share, turn, *args)

    def _settling(self, batch: Batch[Settlement]) -> Command:
        args = [
            line_of(place, x.lease.delivery.seq, x.lease.token, x.action, milliseconds(x.delay))
            for place, x in batch.placed()
        ]
        channel = self._keys.channel(batch.queue)
        return script("settle", self._keys_of(batch), channel, SETTLED_MS, SETTLED_MOST, *args)

    def _extension(self, batch: Batch[Lease]) -> Command:
        args = [line_of(place, x.delivery.seq, x.token) for place, x in batch.placed()]
        return script("extend", self._keys_of(batch), self._lease_ms, *args)

    def _keys_of(self, batch: Batch[Any]) -> list[str]:
        return self._keys.of(batch.queue, batch.subscriptions)

    @property
    def _lease_ms(self) -> int:
        return milliseconds(self.settings.lease)

    def _remove(self, subscription: Subscription, *places: str) -> int:
        removed = 0
        while True:
            keys = self._keys.of(subscription.queue, [subscription.id])
            [count] = self._run([script("purge", keys, subscription.id, *places)])
            removed += count
            if count < MOST_AT_ONCE:
                return removed

    def _set_paused(self, subscription: Subscription, is_paused: bool) -> None:
        key = self._keys.paused(subscription.queue)
        commands = [Command(key, ("SADD" if is_paused else "SREM", key, subscription.id))]
        if not is_paused:
            wake = ("PUBLISH", self._keys.channel(subscription.queue), subscription.id)
            commands.append(Command(key, wake))
        self._run(commands)

    # --- whose turn it is

    def _in_turn(self, wanted: list[Wanted]) -> list[Wanted]:
        """Begin with another queue each time: who is first may get all there is room for."""
        self._turns += 1
        start = self._turns % max(len(wanted), 1)
        return wanted[start:] + wanted[:start]

    def _by_queue(self, limits: Mapping[int, int]) -> list[Wanted]:
        wanted: dict[str, Wanted] = {}
        for subscription_id, most in limits.items():
            if subscription_id in self._mine:
                queue = self._mine[subscription_id].queue
                wanted.setdefault(queue, Wanted(queue)).limits[subscription_id] = most
        return list(wanted.values())

    def _channels(self) -> set[str]:
        return {self._keys.channel(each.queue) for each in self._mine.values()}

    def _note_due(self, milliseconds: int) -> None:
        if milliseconds >= 0:
            self._due = min(self._due, monotonic() + milliseconds / 1000)
