"""Limits of subscriptions: how many attempts begin in a second, and how many run at once.

They hold over all processes that consume a subscription, whatever the provider. Each asks here
before it reserves, and notes what it has in hand. Whoever asks takes the row of the limits first,
so that all ask one after the other. A rate is a token bucket by the database's clock: it fills
with time, up to the burst, and each delivery that is reserved takes a token. What a process
got and has not used counts as if it were in the bucket yet, so that nobody gathers more than the
burst.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, Connection, bindparam, delete, insert, select, update

from shared.database import Transaction, exact_now
from shared.statements import Prepared
from shared.tables import limits, permits

HIGHEST_RATE = 10_000.0
LOWEST_RATE = 0.001
MOST_AT_ONCE = 10_000

BURST_SECONDS = 0.1
"""Of how long the burst is, where nobody says: so much later a process may ask than it could."""

AGAIN_SECONDS = 1.0
"""How soon a process asks again at the latest, when others have all that there is."""

SOONEST_SECONDS = 0.01
"""How soon it does at the soonest: what comes in that time is taken together."""

BEHIND_SECONDS = 5.0
"""By how much the clock may have gone back; more, and it was set."""

m = limits.c
p = permits.c

_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_IS_ITS = (p.subscription_id == bindparam("its_id"), p.worker == bindparam("its_worker"))

_LIMITED = Prepared(select(m.subscription_id).where(m.subscription_id.in_(_IDS)))
_LIMITS = Prepared(
    select(*limits.c)
    .where(m.subscription_id.in_(_IDS))
    .order_by(m.subscription_id)
    .with_for_update()
)
_PERMITS = Prepared(
    select(*permits.c).where(p.subscription_id.in_(_IDS)).order_by(p.subscription_id, p.worker)
)
_FILL = Prepared(
    update(limits)
    .where(m.subscription_id == bindparam("its_id"))
    .values(tokens=bindparam("new_tokens"), refilled_at=bindparam("new_refilled_at"))
)
_ADD = Prepared(insert(permits), [column.name for column in permits.c])
_RENEW = Prepared(
    update(permits)
    .where(*_IS_ITS)
    .values(
        held=bindparam("new_held"),
        spare=bindparam("new_spare"),
        expires_at=bindparam("new_expires_at"),
    )
)
_REMOVE = Prepared(delete(permits).where(*_IS_ITS))


class Limits(NamedTuple):
    """What somebody allows; ``None`` is without a limit.

    :param concurrency: deliveries in hand at once.
    :param rate: attempts that begin in a second, retries included.
    :param burst: attempts that may begin together when none did for a while.
    """

    concurrency: int | None = None
    rate: float | None = None
    burst: int | None = None

    @property
    def are_none(self) -> bool:
        """Whether there is no limit."""
        return self.concurrency is None and self.rate is None

    @property
    def depth(self) -> int:
        """How many tokens the bucket takes."""
        return self.burst or max(1, math.ceil((self.rate or 0.0) * BURST_SECONDS))

    def shown(self) -> dict[str, Any] | None:
        """Return them as JSON; ``None`` when there are none."""
        if self.are_none:
            return None
        burst = None if self.rate is None else self.depth
        return {"concurrency": self.concurrency, "rate": self.rate, "burst": burst}


class Ask(NamedTuple):
    """What a process has of a subscription, and what it wants.

    :param held: deliveries in hand.
    :param spare: how many it may reserve already.
    :param used: of those that it could, how many it has reserved since it asked last.
    :param want: how many it wants to be able to reserve.
    """

    subscription_id: int
    held: int
    spare: int = 0
    used: int = 0
    want: int = 0


@dataclass(slots=True)
class Others:
    """What the other processes have, of those whose permits have not run out."""

    held: int = 0
    spare: int = 0
    seconds: float = math.inf
    """Until the first of their permits runs out, unless it is renewed."""


@dataclass(slots=True)
class Grant:
    """What a process gets: ``target`` is how many it may reserve."""

    subscription_id: int
    limits: Limits
    held: int
    target: int
    spare: int
    """What is noted: more than the target until what is too much is known to be unused."""
    tokens: float
    refilled_at: datetime
    others: Others
    was: tuple[int, int, float]
    """What was noted of this process, held and spare, and how many tokens there were by now."""
    is_noted: bool
    is_set_back: bool
    """Whether the clock was: then what is noted of the time is of no use."""

    def use(self, reserved: int, running: int) -> None:
        """Note what was reserved at once, and how many of them run; the rest is given back."""
        self.tokens += max(self.target - reserved, 0)
        self.held, self.target, self.spare = self.held + running, 0, 0

    @property
    def again(self) -> float:
        """Seconds after which it is worth asking again; infinite when there is no need to."""
        if self.target:
            return math.inf
        waits = []
        rate, most = self.limits.rate, self.limits.concurrency
        if rate is not None and self.tokens < 1:
            is_full = self.others.spare >= self.limits.depth
            waits.append(AGAIN_SECONDS if is_full else (1 - self.tokens) / rate)
        if most is not None and self.held + self.others.held + self.others.spare >= most:
            waits.append(min(self.others.seconds, AGAIN_SECONDS))
        return max(SOONEST_SECONDS, *waits) if waits else math.inf


# --- what the pumps do


def limited(tx: Transaction, subscription_ids: Sequence[int]) -> set[int]:
    """Return which of these subscriptions have limits."""
    return {row.subscription_id for row in _LIMITED.fetch(tx, {"ids": subscription_ids})}


def ask(tx: Transaction, worker: str, asks: Sequence[Ask]) -> dict[int, Grant]:
    """Grant what the limits leave; it is to be followed by :func:`keep` in the same transaction.

    What is in hand is taken as it is, also where that is more than there should be. Who has
    more to spare than the limits allow gets less.

    :returns: by subscription; one that has no limits any more is left out.
    """
    ids = [each.subscription_id for each in asks]
    rows = {row.subscription_id: row for row in _LIMITS.fetch(tx, {"ids": ids})}
    # who asked last may have done so by another process's reckoning, and had to be waited for
    now = exact_now(tx) if rows else tx.now
    others: dict[int, Others] = defaultdict(Others)
    own: dict[int, Any] = {}
    for row in _PERMITS.fetch(tx, {"ids": list(rows)}) if rows else ():
        left = (row.expires_at - now).total_seconds()
        if row.worker == worker:
            own[row.subscription_id] = row
        elif left <= 0:
            _REMOVE.change(tx, {"its_id": row.subscription_id, "its_worker": row.worker})
        else:
            its = others[row.subscription_id]
            its.held, its.spare = its.held + row.held, its.spare + row.spare
            its.seconds = min(its.seconds, left)
    return {
        each.subscription_id: _granted(
            now, rows[each.subscription_id], each, others[each.subscription_id], own
        )
        for each in asks
        if each.subscription_id in rows
    }


def _granted(now: datetime, row: Any, asked: Ask, others: Others, own: Mapping[int, Any]) -> Grant:
    its = own.get(asked.subscription_id)
    # whoever finds that it ran out removes it, so that one that is there was given to nobody else
    held, noted = (its.held, its.spare) if its is not None else (0, 0)
    spare = min(asked.spare, noted)
    allowed = Limits(row.concurrency, row.rate, row.burst)
    # until now the bucket had no place for what was spare
    place = allowed.depth - others.spare - noted
    filled, refilled_at = _filled(now, row)
    before = max(0.0, min(filled, place))
    tokens = before + max(noted - asked.used - spare, 0)
    target = max(asked.want, 0)
    if allowed.concurrency is not None:
        left = allowed.concurrency - others.held - others.spare - asked.held
        target = min(target, max(left, 0))
    if allowed.rate is not None:
        # as many as the bucket takes at most, should it be smaller now
        target = min(target, spare + int(tokens), max(allowed.depth - others.spare, 0))
    return Grant(
        asked.subscription_id,
        allowed,
        asked.held,
        target,
        max(target, spare),
        tokens - max(target - spare, 0),
        refilled_at,
        others,
        (held, noted, before),
        its is not None,
        refilled_at < row.refilled_at,
    )


def _filled(now: datetime, row: Any) -> tuple[float, datetime]:
    """Return the tokens that a bucket has by now, if it is deep enough, and when that is."""
    passed = (now - row.refilled_at).total_seconds()
    # the clock may have been put right by a little
    at = row.refilled_at if -BEHIND_SECONDS < passed < 0 else now
    return float(row.tokens) + max(passed, 0.0) * (row.rate or 0.0), at


def keep(tx: Transaction, worker: str, grants: Sequence[Grant], seconds: float) -> None:
    """Note what a process has after :func:`ask`, for so many seconds."""
    for each in grants:
        key = {"its_id": each.subscription_id, "its_worker": worker}
        _, *was = each.was
        is_other = [each.spare, each.tokens] != was or each.is_set_back
        if each.limits.rate is not None and is_other:
            _FILL.change(
                tx,
                {
                    "its_id": each.subscription_id,
                    "new_tokens": each.tokens,
                    "new_refilled_at": each.refilled_at,
                },
            )
        has = {"held": each.held, "spare": each.spare, "expires_at": tx.later(seconds)}
        if not each.held and not each.spare:
            if each.is_noted:
                _REMOVE.change(tx, key)
        elif each.is_noted:
            _RENEW.change(tx, {**key, **{f"new_{name}": value for name, value in has.items()}})
        else:
            named = {"subscription_id": each.subscription_id, "worker": worker, **has}
            _ADD.change(tx, named)


def leave(tx: Transaction, worker: str, subscription_ids: Sequence[int]) -> None:
    """Note that a process has nothing any more."""
    for each in subscription_ids:
        _REMOVE.change(tx, {"its_id": each, "its_worker": worker})


# --- what operations do


def change(tx: Transaction, subscription_id: int, wanted: Limits) -> None:
    """Set the limits of a subscription; without any, whoever waits for them may go on."""
    is_it = m.subscription_id == subscription_id
    if wanted.are_none:
        tx.connection.execute(delete(limits).where(is_it))
        tx.connection.execute(delete(permits).where(p.subscription_id == subscription_id))
        return
    values = {"concurrency": wanted.concurrency, "rate": wanted.rate, "burst": None}
    if wanted.rate is not None:
        values["burst"] = wanted.depth
    old = tx.connection.execute(select(limits).where(is_it).with_for_update()).first()
    if old is None:
        new = {"tokens": wanted.depth, "refilled_at": tx.now}
        tx.connection.execute(
            insert(limits).values(subscription_id=subscription_id, **values, **new)
        )
        return
    # a bucket that is changed stays as full as it was
    filled, _ = _filled(tx.now, old)
    tokens = wanted.depth if old.rate is None else min(filled, wanted.depth)
    tx.connection.execute(
        update(limits).where(is_it).values(tokens=tokens, refilled_at=tx.now, **values)
    )


def remove(tx: Transaction, subscription_ids: Sequence[int]) -> None:
    """Take away all limits of these subscriptions, which are over."""
    # only of those that have some: to delete a row that is not there may lock its neighbours
    for each in limited(tx, subscription_ids):
        change(tx, each, Limits())


def of(connection: Connection, subscription_ids: Sequence[int]) -> dict[int, Limits]:
    """Return the limits of those of these subscriptions that have any."""
    rows = connection.execute(select(limits).where(m.subscription_id.in_(subscription_ids)))
    return {row.subscription_id: Limits(row.concurrency, row.rate, row.burst) for row in rows}


class Usage(NamedTuple):
    """How far limits are used up."""

    limits: Limits
    held: int
    """In hand of all processes, or to be so next."""
    available: float
    """How many may begin now, by the rate."""

    @property
    def is_full(self) -> bool:
        """Whether as many are in hand as may be."""
        return self.limits.concurrency is not None and self.held >= self.limits.concurrency

    @property
    def is_spent(self) -> bool:
        """Whether no attempt may begin now, by the rate."""
        return self.limits.rate is not None and self.available < 1


def usages(
    connection: Connection, subscription_ids: Sequence[int], now: datetime
) -> dict[int, Usage]:
    """Return how far the limits of those of these subscriptions are used up that have any."""
    rows = connection.execute(select(limits).where(m.subscription_id.in_(subscription_ids))).all()
    if not rows:
        return {}
    ids = [row.subscription_id for row in rows]
    held: Counter[int] = Counter()
    spare: Counter[int] = Counter()
    for its in connection.execute(
        select(permits).where(p.subscription_id.in_(ids), p.expires_at > now)
    ):
        held[its.subscription_id] += its.held
        spare[its.subscription_id] += its.spare
    found = {}
    for row in rows:
        its_limits = Limits(row.concurrency, row.rate, row.burst)
        tokens = min(_filled(now, row)[0], its_limits.depth)
        its_id = row.subscription_id
        found[its_id] = Usage(its_limits, held[its_id], tokens + spare[its_id])
    return found
