"""What travels between the provider and Redis: names of keys, commands, batches, envelopes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, NamedTuple, TypeVar

from shared.types import Delivery, Envelope, Lease, Priority

MOST_AT_ONCE = 1000
"""Deliveries in one call of a script: nobody else is served meanwhile."""

MOST_BYTES_AT_ONCE = 4 << 20
"""Bytes of envelopes in one call of a script."""

PLACES = ("waiting", "scheduled", "leases", "dead")
"""The sorted sets of a subscription, in the order of ``lua/_queue.lua``."""

LEASE_LOST = -1
"""What scripts return for a lease that somebody else has; as in ``lua/_queue.lua``."""

T = TypeVar("T")


class Keys:
    """The names of all keys."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def channel(self, queue: str) -> str:
        return self._key(queue, "wake")

    def health(self, queue: str) -> str:
        """Return the name of a key that there never is."""
        return self._key(queue, "health")

    def paused(self, queue: str) -> str:
        return self._key(queue, "paused")

    def rpc(self, queue: str) -> list[str]:
        """Return KEYS, as ``lua/rpc_send.lua`` says."""
        return [self._key(queue, "rpc-declared"), self._key(queue, "rpc")]

    def rpc_channel(self, queue: str) -> str:
        return self._key(queue, "rpc-wake")

    def of(self, queue: str, subscription_ids: Iterable[int]) -> list[str]:
        """Return KEYS, as ``lua/_queue.lua`` says."""
        shared = ("messages", "deliveries", "settled", "paused")
        own = [f"{each}:{place}" for each in subscription_ids for place in PLACES]
        return [self._key(queue, name) for name in (*shared, *own)]

    def _key(self, queue: str, name: str) -> str:
        return f"{self._prefix}:{{{queue}}}:{name}"


@dataclass(slots=True)
class Command:
    """One command, and a key that says which node of a cluster it is for."""

    key: str
    args: tuple[Any, ...]


@dataclass(slots=True)
class Batch(Generic[T]):
    """What one call of a script is about: all of one queue."""

    queue: str
    items: list[T] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """For each item, which of the subscriptions it belongs to, counted from 1."""
    indices: list[int] = field(default_factory=list)
    """For each item, where it stood in what the caller gave."""
    numbers: dict[int, int] = field(default_factory=dict)
    size: int = 0

    @property
    def subscriptions(self) -> list[int]:
        return list(self.numbers)

    def add(self, index: int, item: T, subscription_id: int, size: int) -> None:
        self.items.append(item)
        self.places.append(self.numbers.setdefault(subscription_id, len(self.numbers) + 1))
        self.indices.append(index)
        self.size += size

    def placed(self) -> Iterator[tuple[int, T]]:
        """Go through the items, each with its place."""
        return zip(self.places, self.items, strict=True)

    def has_room(self, size: int) -> bool:
        return len(self.items) < MOST_AT_ONCE and self.size + size <= MOST_BYTES_AT_ONCE


def batches_of(
    items: Sequence[T],
    delivery_of: Callable[[T], Delivery],
    size_of: Callable[[T], int] = lambda _: 0,
) -> list[Batch[T]]:
    """Part items by queue, in their order, and into what one call of a script may take."""
    made: list[Batch[T]] = []
    open_ones: dict[str, Batch[T]] = {}
    for index, item in enumerate(items):
        delivery, size = delivery_of(item), size_of(item)
        queue = delivery.message.queue
        batch = open_ones.get(queue)
        if batch is None or (batch.items and not batch.has_room(size)):
            batch = open_ones[queue] = Batch(queue)
            made.append(batch)
        batch.add(index, item, delivery.subscription_id, size)
    return made


def lost_of(
    items: Sequence[T], batches: Iterable[Batch[T]], answers: Iterable[list[int]]
) -> list[T]:
    """Return the items whose lease was lost, in their order."""
    lost = [
        index
        for batch, codes in zip(batches, answers, strict=True)
        for index, code in zip(batch.indices, codes, strict=True)
        if code == LEASE_LOST
    ]
    return [items[index] for index in sorted(lost)]


@dataclass(slots=True)
class Wanted:
    """What is to be reserved of one queue: the most for each subscription, and altogether."""

    queue: str
    limits: dict[int, int] = field(default_factory=dict)
    share: int = 0
    has_more: bool = True
    unreadable: list[Unreadable] = field(default_factory=list)

    def take(self, answer: list[Any]) -> list[Lease]:
        """Read what was reserved, and note whether there may be more."""
        leases, unreadable = leases_of(answer[1:])
        self.unreadable += unreadable
        got = [lease.delivery.subscription_id for lease in leases]
        got += [each.subscription_id for each in unreadable]
        for each in got:
            self.limits[each] -= 1
        self.has_more = len(got) == self.share and any(x > 0 for x in self.limits.values())
        return leases


def with_shares(wanted: list[Wanted], total: int) -> list[Wanted]:
    """Give each queue as much of ``total`` as it has of the subscriptions."""
    count, place = sum(len(each.limits) for each in wanted), 0
    for each in wanted:
        places = range(place, place + len(each.limits))
        place += len(each.limits)
        share = sum(total // count + (place < total % count) for place in places)
        each.share = min(share, MOST_AT_ONCE)
    return wanted


def line_of(*words: Any) -> str:
    """Return an argument of a script: words with blanks between."""
    return " ".join(map(str, words))


def facts_of(delivery: Delivery) -> tuple[Any, ...]:
    """Return what ``lua/publish.lua`` is told of a delivery, beside its envelope."""
    return (
        delivery.subscription_id,
        delivery.seq,
        delivery.token,
        delivery.attempts,
        delivery.message.priority.rank,
        milliseconds(delivery.delay),
        delivery.message.id,
    )


def encoded(envelope: Envelope) -> str:
    """Return an envelope as a line of JSON, and its payload, untouched, as what follows."""
    head = {
        "id": envelope.id,
        "queue": envelope.queue,
        "type": envelope.type,
        "priority": envelope.priority,
        "max_retries": envelope.max_retries,
        "scheduled_at": envelope.scheduled_at and envelope.scheduled_at.isoformat(),
        "created_at": envelope.created_at and envelope.created_at.isoformat(),
        "metadata": dict(envelope.metadata),
    }
    return f"{json.dumps(head, separators=(',', ':'))}\n{envelope.body}"


def _decoded(text: str) -> Envelope:
    """Read an envelope.

    :raises ValueError, KeyError, TypeError: when it is none.
    """
    head, _, body = text.partition("\n")
    values = json.loads(head)
    for name in ("scheduled_at", "created_at"):
        values[name] = values[name] and datetime.fromisoformat(values[name])
    values["priority"] = Priority(values["priority"])
    made = Envelope(body=body, **values)
    texts = (made.id, made.queue, made.type)
    if not all(isinstance(text, str) for text in texts) or not isinstance(made.metadata, dict):
        raise TypeError("a value is of another type than it may be")
    return made


class Unreadable(NamedTuple):
    """A lease of what nobody can handle: its envelope is gone, or is none."""

    seq: int
    subscription_id: int
    token: int


def leases_of(flat: Sequence[str | None]) -> tuple[list[Lease], list[Unreadable]]:
    """Read leases from what a script answered: for each a line, and an envelope."""
    leases, unreadable = [], []
    for line, envelope in zip(flat[::2], flat[1::2], strict=True):
        seq, subscription_id, token, attempts = map(int, str(line).split())
        try:
            message = _decoded(envelope or "")
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable.append(Unreadable(seq, subscription_id, token))
        else:
            leases.append(Lease(Delivery(seq, subscription_id, message, attempts), token))
    return leases, unreadable


def order_of(lease: Lease) -> tuple[int, int]:
    """Return by what leases are sorted: priority, then dispatch."""
    return lease.delivery.message.priority.rank, lease.delivery.seq


def milliseconds(seconds: float) -> int:
    """Return whole milliseconds, none of them negative."""
    return max(round(seconds * 1000), 0)
