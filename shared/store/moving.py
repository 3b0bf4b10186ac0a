"""Moving deliveries from one provider to another: what the log knows of it, and what it decides.

A delivery moves by becoming ready in the log, where whoever is connected to the new provider
finds it and publishes it. So it is never given to a provider directly, and a copy that stays
behind in the old one does no harm: whoever gets it asks the log first.

A provider in the log's own tables has what is ready, and what has a time. Of any other, what is
neither ready nor in anybody's hands is there, and ``provider`` says in which of the two it is: in
the new one if that is noted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    and_,
    bindparam,
    case,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
    update,
)

from shared.database import Transaction
from shared.lifecycle import FINAL, WAITING, DeliveryStatus
from shared.statements import Prepared
from shared.store import adoption, subscriptions
from shared.store.log import seconds_until
from shared.store.summary import lock, refresh
from shared.tables import deliveries
from shared.tables import subscriptions as subscription_table
from shared.types import Lease, Subscription

MOST_AT_ONCE = 500
"""Deliveries that move in one transaction: others write meanwhile."""

c = deliveries.c

_SEQS: Any = bindparam("seqs", expanding=True)
_IDS: Any = bindparam("ids", expanding=True)
_NOW = bindparam("now", type_=c.available_at.type)
_TO = bindparam("to", type_=c.provider.type)
_LIMIT = bindparam("limit", type_=Integer)
_ID = bindparam("id", type_=c.subscription_id.type)

_IS_WAITING = or_(*[c.status == status for status in sorted(WAITING)])
# what SQLite has in its index
_IS_OPEN = c.status != literal_column("'completed'")
_IS_ELSEWHERE = and_(_IS_OPEN, _IS_WAITING, c.ready == false(), c.lease_expires_at.is_(None))
_IS_NOT_THERE = or_(c.provider.is_(None), c.provider != _TO)
_IS_TIMED = c.available_at.is_not(None)


@dataclass(frozen=True, slots=True)
class Route:
    """From which provider to which.

    :param from_log: the old one works in the log's tables.
    :param to_log: the new one does.
    """

    old: str
    new: str
    from_log: bool = False
    to_log: bool = False

    @property
    def _kind(self) -> str:
        return "from_log" if self.from_log else "to_log" if self.to_log else "apart"


def _of_old(kind: str) -> ColumnElement[bool]:
    """Return the SQL for what the old provider has that waits."""
    if kind == "to_log":
        # what has a time is found by the new one when that comes
        return and_(_IS_ELSEWHERE, ~_IS_TIMED)
    if kind == "from_log":
        return and_(_IS_ELSEWHERE, _IS_TIMED, _IS_NOT_THERE)
    return and_(_IS_ELSEWHERE, _IS_NOT_THERE)


def _kinds(statement: Any) -> dict[str, Prepared]:
    return {kind: Prepared(statement(_of_old(kind))) for kind in ("from_log", "to_log", "apart")}


_PAGE = _kinds(
    lambda its: (
        select(c.seq)
        .where(c.subscription_id == _ID, c.seq > bindparam("after"), its)
        .order_by(c.seq)
        .limit(_LIMIT)
    )
)
_PAGE_TIMED = _kinds(
    lambda its: (
        select(c.seq)
        .where(c.subscription_id == _ID, c.seq > bindparam("after"), its, _IS_TIMED)
        .order_by(c.seq)
        .limit(_LIMIT)
    )
)
_COUNT = _kinds(
    lambda its: (
        select(c.subscription_id, func.count().label("total"))
        .where(c.subscription_id.in_(_IDS), its)
        .group_by(c.subscription_id)
    )
)
_ARE_OF_OLD = _kinds(lambda its: select(c.seq).where(c.seq.in_(_SEQS), its))
_COUNT_READY = Prepared(
    select(c.subscription_id, func.count().label("total"))
    .where(c.subscription_id.in_(_IDS), c.ready == true())
    .group_by(c.subscription_id)
)
_MAKE_READY = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), _IS_ELSEWHERE)
    # the token moves on, so that a copy that stays behind is known to be one
    .values(ready=True, lease_token=c.lease_token + 1, provider=None)
)
_FORGET_OTHERS = Prepared(
    update(deliveries)
    .where(c.subscription_id == _ID, _IS_TIMED, c.provider.is_not(None))
    .values(provider=None)
)
_STATES = Prepared(
    select(
        c.seq,
        c.message_id,
        c.status,
        c.ready,
        c.lease_expires_at,
        c.available_at,
        c.provider,
    ).where(c.seq.in_(_SEQS))
)
_HOLD = Prepared(
    update(deliveries)
    .where(
        c.seq.in_(_SEQS),
        c.status == DeliveryStatus.PROCESSING,
        c.lease_expires_at.is_(None),
    )
    .values(lease_expires_at=bindparam("until"))
)
_MARK = Prepared(update(deliveries).where(c.seq.in_(_SEQS)).values(provider=_TO))

_IS_TAKEN = or_(
    and_(_IS_WAITING, c.lease_expires_at.is_(None)),
    c.status == DeliveryStatus.PROCESSING,
    c.status == DeliveryStatus.COMPLETED,
)
_UNMARKED = Prepared(
    select(subscription_table.c.source, func.count().label("total"))
    .select_from(deliveries)
    .join(subscription_table, subscription_table.c.id == c.subscription_id)
    .where(c.seq > bindparam("after"), c.provider.is_(None), c.ready == false(), _IS_TAKEN)
    .group_by(subscription_table.c.source)
)
_NEWEST = Prepared(select(func.max(c.seq).label("seq")))

# --- what the provider in the log's tables leaves to the new one

_DUE = Prepared(
    select(c.seq)
    .where(
        c.subscription_id.in_(_IDS),
        c.available_at <= _NOW,
        c.ready == false(),
        c.lease_expires_at.is_(None),
        _IS_WAITING,
        _IS_NOT_THERE,
    )
    .limit(MOST_AT_ONCE)
)
_NEXT_DUE = Prepared(
    select(func.min(c.available_at).label("at")).where(
        c.subscription_id.in_(_IDS), c.available_at > _NOW
    )
)
_TAKEN_OVER = Prepared(
    select(c.seq, c.message_id).where(
        c.subscription_id.in_(_IDS), c.ready == true(), c.status == DeliveryStatus.PROCESSING
    )
)
_WAIT_AGAIN = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), c.ready == true(), c.status == DeliveryStatus.PROCESSING)
    .values(
        status=case(
            (c.attempts > 0, literal(DeliveryStatus.RETRY.value)),
            else_=literal(DeliveryStatus.PENDING.value),
        ),
        lease_token=c.lease_token + 1,
    )
)


def inherit(tx: Transaction, subscription_ids: Sequence[int], to: str) -> float:
    """Have the log give to ``to`` what the provider in its tables has, as that comes due.

    What is ready is published as it is; what that provider took over from a worker that died
    waits again.

    :returns: seconds until the next time that anything may be due.
    """
    ids = {"ids": subscription_ids}
    taken_over = _TAKEN_OVER.fetch(tx, ids)
    if taken_over:
        touched = {row.message_id for row in taken_over}
        lock(tx, touched)
        _WAIT_AGAIN.change(tx, {"seqs": [row.seq for row in taken_over]})
        refresh(tx, touched)
    due = [row.seq for row in _DUE.fetch(tx, {**ids, "now": tx.now, "to": to})]
    if due:
        _MAKE_READY.change(tx, {"seqs": due})
    [soonest] = _NEXT_DUE.fetch(tx, {**ids, "now": tx.now})
    return float("inf") if soonest.at is None else seconds_until(tx, soonest.at)


# --- what an operator has carried over


def page(
    tx: Transaction, subscription_id: int, route: Route, after: int, *, timed_alone: bool
) -> list[int]:
    """Return the next 500 that wait at the old provider for one subscription, by the log.

    :param after: the number that the page before ended with.
    :param timed_alone: only what has a time: the rest is taken out of the old provider.
    """
    wanted = (_PAGE_TIMED if timed_alone else _PAGE)[route._kind]
    values = {"id": subscription_id, "after": after, "limit": MOST_AT_ONCE, "to": route.new}
    return [row.seq for row in wanted.fetch(tx, values)]


def make_ready(tx: Transaction, seqs: Sequence[int]) -> int:
    """Have those of these published that wait at a provider; return how many."""
    return _MAKE_READY.count_changed(tx, {"seqs": seqs}) if seqs else 0


def forget_others(tx: Transaction, subscription_id: int) -> None:
    """Note that what has a time is the new provider's, which works in these tables."""
    _FORGET_OTHERS.change(tx, {"id": subscription_id})


def take_out(
    tx: Transaction, leases: Sequence[Lease], route: Route, max_retries: int, held_for: float
) -> int:
    """Make ready what was just reserved from the old provider; all of it may be removed there.

    Copies of what is elsewhere by now are left alone. What a worker has in hand is leased to it
    in the log for ``held_for`` seconds; from one that died it is taken over then.

    :param max_retries: as for :func:`shared.store.log.append`, for what a plain dispatcher sent.
    :returns: how many became ready.
    """
    numbered = adoption.adopt(tx, leases, max_retries)
    lock(tx, {lease.delivery.message.id for lease in numbered})
    states = _STATES.fetch(tx, {"seqs": [lease.delivery.seq for lease in numbered]})
    move = [row.seq for row in states if _is_left(row, route)]
    orphans = [row.seq for row in states if row.status == DeliveryStatus.PROCESSING]
    if move:
        _MAKE_READY.change(tx, {"seqs": move})
    if orphans:
        _HOLD.change(tx, {"seqs": orphans, "until": tx.later(held_for)})
    refresh(tx, {row.message_id for row in states if row.status not in FINAL})
    return len(move)


def _is_left(state: Any, route: Route) -> bool:
    """Whether nobody but the old provider has a delivery."""
    if state.status not in WAITING or state.ready or state.lease_expires_at is not None:
        return False
    if route.to_log:
        return state.available_at is None
    return bool(state.provider != route.new)


def mark(tx: Transaction, seqs: Sequence[int], to: str | None) -> None:
    """Note which provider has these."""
    _MARK.change(tx, {"seqs": seqs, "to": to})


def of_old(tx: Transaction, seqs: Collection[int], route: Route) -> set[int]:
    """Return which of these wait at the old provider, and nowhere else."""
    values = {"seqs": list(seqs), "to": route.new}
    return {row.seq for row in _ARE_OF_OLD[route._kind].fetch(tx, values)} if seqs else set()


def newest(tx: Transaction) -> int:
    """Return the number of the newest delivery."""
    [row] = _NEWEST.fetch(tx, {})
    return int(row.seq or 0)


def unmarked(tx: Transaction, after: int) -> dict[str, int]:
    """Count what was published after a delivery by whom the settings of the move are not known.

    Who has them notes with each that the new provider has it. So this is of use only where that
    one is apart from the log.

    :returns: by the service that dispatched them.
    """
    return {row.source: int(row.total) for row in _UNMARKED.fetch(tx, {"after": after})}


def ready_counts(tx: Transaction, ids: Sequence[int]) -> dict[int, int]:
    """Count by subscription what is ready: to be published, or to be reserved."""
    rows = _COUNT_READY.fetch(tx, {"ids": ids}) if ids else []
    return {row.subscription_id: int(row.total) for row in rows}


def seen(connection: Connection, route: Route) -> tuple[list[Subscription], int]:
    """Return who gets events, and how much the old provider has of it in the log's tables."""
    active = subscriptions.active(connection)
    if not route.from_log or not active:
        return active, 0
    values = {"ids": [each.id for each in active], "to": route.new}
    found = [_COUNT_READY.statement, _COUNT["from_log"].statement]
    rows = [row for each in found for row in connection.execute(each, values)]
    return active, sum(int(row.total) for row in rows)
