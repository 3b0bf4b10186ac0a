"""What a provider with storage of its own has not got yet, or may not have got.

Such a delivery is in somebody's hands to be published, until ``lease_expires_at``; or
it is ``ready``, to be taken into somebody's hands. Whoever looks after the backlog
makes ready what was in the hands of who died. The provider that works in the log's own
tables uses both columns itself, and needs none of this.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from sqlalchemy import (
    Integer,
    bindparam,
    exists,
    false,
    func,
    literal_column,
    or_,
    select,
    true,
    update,
)

from shared.database import Transaction
from shared.lifecycle import WAITING, DeliveryStatus, MessageStatus
from shared.statements import Prepared
from shared.store import attempts, log
from shared.tables import (
    MESSAGE_COLUMNS,
    SUBSCRIPTION_COLUMNS,
    deliveries,
    envelope_of,
    messages,
    subscription_of,
    subscriptions,
)
from shared.types import Delivery, Envelope

PUBLISH_SECONDS = 30.0
"""How long deliveries may be on their way to the provider before others publish them, too."""

FRESH_SECONDS = 12.0
"""How long others wait with what is newer than what somebody took to publish it: longer than a
provider waits for an answer of its server."""

LATE_SECONDS = 2.0
"""How long after its time a provider may make a delivery ready."""

MOST_AT_ONCE = 500
"""Deliveries taken at once of each subscription."""

c = deliveries.c
_SEQS: Any = bindparam("seqs", expanding=True)
_IDS: Any = bindparam("ids", expanding=True)
_NOW = bindparam("now", type_=c.available_at.type)
_LIMIT = bindparam("limit", type_=Integer)
_IS_WAITING = or_(*[c.status == status for status in sorted(WAITING)])

_PUBLISHED = Prepared(
    update(deliveries).where(c.seq.in_(_SEQS), _IS_WAITING).values(lease_expires_at=None)
)
_PUBLISHED_TO = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), _IS_WAITING)
    .values(lease_expires_at=None, provider=bindparam("to"))
)
_GIVE_BACK = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), _IS_WAITING)
    .values(lease_expires_at=None, ready=True, provider=None)
)
_TAKE_BACK = Prepared(
    update(deliveries)
    .where(c.message_id.in_(_IDS), _IS_WAITING, c.lease_expires_at.is_not(None))
    .values(lease_expires_at=None, ready=True)
)
_SUBSCRIPTIONS = Prepared(select(subscriptions.c.id))
_SUBSCRIPTIONS_OF = Prepared(select(*SUBSCRIPTION_COLUMNS).where(subscriptions.c.id.in_(_IDS)))
_EXPIRED = Prepared(
    select(c.seq, c.status)
    .where(c.subscription_id.in_(_IDS), c.lease_expires_at <= _NOW)
    .limit(MOST_AT_ONCE)
)
_NEXT_EXPIRY = Prepared(
    select(func.min(c.lease_expires_at).label("at")).where(
        c.subscription_id.in_(_IDS), c.lease_expires_at > _NOW
    )
)
_WITH_READY = Prepared(
    select(*SUBSCRIPTION_COLUMNS).where(
        # MariaDB would go through all deliveries, if it was an EXISTS, or any index would do
        select(c.ready)
        .with_hint(deliveries, "FORCE INDEX (ix_queue_deliveries_ready)")
        .where(c.subscription_id == subscriptions.c.id, c.ready == true())
        .limit(1)
        .scalar_subquery()
        .is_not(None)
    )
)
_NEXT = Prepared(
    select(c.message_id)
    .where(c.subscription_id == bindparam("id"), c.ready == true())
    .order_by(c.priority_rank, c.seq)
    .limit(_LIMIT)
)
_OLDEST_IN_HAND = Prepared(
    select(c.subscription_id, func.min(c.seq).label("seq"))
    .where(c.subscription_id.in_(_IDS), c.lease_expires_at > bindparam("since"), _IS_WAITING)
    .group_by(c.subscription_id)
)
_OLDEST_DUE = Prepared(
    select(c.subscription_id, func.min(c.seq).label("seq"))
    .where(
        c.subscription_id.in_(_IDS),
        # what SQLite has in its index
        c.status != literal_column("'completed'"),
        _IS_WAITING,
        c.ready == false(),
        c.lease_expires_at.is_(None),
        or_(
            c.available_at.is_(None), c.available_at <= bindparam("due", type_=c.available_at.type)
        ),
    )
    .group_by(c.subscription_id)
)
_ALL_OF = Prepared(
    select(
        c.seq,
        c.message_id,
        c.subscription_id,
        c.ready,
        c.attempts,
        c.lease_token,
        c.available_at,
        c.priority_rank,
    )
    .where(c.message_id.in_(_IDS))
    .order_by(c.seq)
    .with_for_update(skip_locked=True)
)
_TAKE = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS))
    .values(ready=False, lease_expires_at=bindparam("until"))
)
_ENVELOPES = Prepared(select(*MESSAGE_COLUMNS).where(messages.c.id.in_(_IDS)))
_ALONE = (
    select(*MESSAGE_COLUMNS)
    .where(
        messages.c.status == MessageStatus.PENDING,
        ~exists().where(c.message_id == messages.c.id),
    )
    .order_by(messages.c.created_at, messages.c.id)
    .limit(MOST_AT_ONCE)
    .with_for_update(skip_locked=True)
)
_IS_LEFT = messages.c.updated_at < bindparam("before")
_IS_UNTAKEN = or_(messages.c.updated_at <= messages.c.created_at, _IS_LEFT)
_MARK = Prepared(
    update(messages).where(messages.c.id.in_(_IDS)).values(updated_at=bindparam("now"))
)
_UNMARK = Prepared(
    update(messages)
    .where(messages.c.id.in_(_IDS), messages.c.status == MessageStatus.PENDING)
    .values(updated_at=messages.c.created_at)
)


def oldest_due(tx: Transaction, subscription_ids: Sequence[int]) -> dict[int, int]:
    """Return of each subscription the oldest delivery that the provider should hand out now."""
    due = {"ids": subscription_ids, "due": tx.later(-LATE_SECONDS)}
    return {row.subscription_id: row.seq for row in _OLDEST_DUE.fetch(tx, due)}


def published(tx: Transaction, deliveries: Sequence[Delivery], to: str | None = None) -> None:
    """Note that the provider has them.

    :param to: which one that is, where there are two.
    """
    seqs, alone = _parted(deliveries)
    if seqs and to is None:
        _PUBLISHED.change(tx, {"seqs": seqs})
    elif seqs:
        _PUBLISHED_TO.change(tx, {"seqs": seqs, "to": to})
    if alone:
        log.finish(tx, alone)


def give_back(tx: Transaction, deliveries: Sequence[Delivery]) -> None:
    """Note that the provider may not have them: they are to be published again."""
    seqs, alone = _parted(deliveries)
    if seqs:
        _GIVE_BACK.change(tx, {"seqs": seqs})
    if alone:
        _UNMARK.change(tx, {"ids": alone})


def take_back(tx: Transaction, message_ids: Sequence[str]) -> None:
    """Have what is in the hands of who stored these messages published by who comes first."""
    _TAKE_BACK.change(tx, {"ids": message_ids})


def addressed(tx: Transaction, deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Return deliveries as they go to their subscriptions alone."""
    ids = sorted({each.subscription_id for each in deliveries})
    by_id = {row.id: subscription_of(row) for row in _SUBSCRIPTIONS_OF.fetch(tx, {"ids": ids})}
    known = [each for each in deliveries if each.subscription_id in by_id]
    return [replace(each, to=by_id[each.subscription_id]) for each in known]


def _parted(deliveries: Sequence[Delivery]) -> tuple[list[int], list[str]]:
    """Return the numbers of deliveries, and the ids of messages that have none."""
    return [x.seq for x in deliveries if x.seq], [x.message.id for x in deliveries if not x.seq]


def recover(tx: Transaction) -> float:
    """Make ready what was in the hands of who died: to be published, or handled.

    :returns: seconds until the next time that somebody may be found to have died.
    """
    ids = [row.id for row in _SUBSCRIPTIONS.fetch(tx, {})]
    if not ids:
        return math.inf
    rows = _EXPIRED.fetch(tx, {"ids": ids, "now": tx.now})
    by_status: dict[bool, list[int]] = defaultdict(list)
    for row in rows:
        by_status[row.status == DeliveryStatus.PROCESSING].append(row.seq)
    if by_status[False]:
        _GIVE_BACK.change(tx, {"seqs": by_status[False]})
    if by_status[True]:
        attempts.lose(tx, by_status[True])
    [soonest] = _NEXT_EXPIRY.fetch(tx, {"ids": ids, "now": tx.now})
    return math.inf if soonest.at is None else log.seconds_until(tx, soonest.at)


def take(tx: Transaction) -> list[Delivery]:
    """Take what is ready into one's hands, the oldest first; it is to be published next.

    A message of which nothing was ever handed out goes to whoever listens, as a new one
    does, and all others to their subscriptions alone. What is newer than what another
    process is about to publish is left for the next time.
    """
    subscribed = {row.id: subscription_of(row) for row in _WITH_READY.fetch(tx, {})}
    wanted = {
        each: [row.message_id for row in _NEXT.fetch(tx, {"id": each, "limit": MOST_AT_ONCE})]
        for each in subscribed
    }
    ids = {message_id for its in wanted.values() for message_id in its}
    if not ids:
        return []
    rows = _ALL_OF.fetch(tx, {"ids": list(ids)})
    ids -= _out_of_turn(tx, wanted, rows)
    rows = [row for row in rows if row.message_id in ids]
    ready = [row for row in rows if row.ready and row.subscription_id in subscribed]
    if not ready:
        return []
    touched = {row.message_id for row in rows if not row.ready or row.lease_token or row.attempts}
    until = tx.later(PUBLISH_SECONDS)
    _TAKE.change(tx, {"seqs": [row.seq for row in ready], "until": until})
    envelopes = _envelopes(tx, ids)
    return [
        Delivery(
            row.seq,
            row.subscription_id,
            envelopes[row.message_id].ranked(row.priority_rank),
            attempts=row.attempts,
            delay=log.seconds_until(tx, row.available_at),
            token=row.lease_token,
            to=subscribed[row.subscription_id] if row.message_id in touched else None,
        )
        for row in ready
    ]


def _out_of_turn(
    tx: Transaction, wanted: Mapping[int, Sequence[str]], rows: Sequence[Any]
) -> set[str]:
    """Return the messages that come after one that another process has in hand."""
    ready = {(row.subscription_id, row.message_id): row.seq for row in rows if row.ready}
    since = tx.later(PUBLISH_SECONDS - FRESH_SECONDS)
    oldest = _OLDEST_IN_HAND.fetch(tx, {"ids": list(wanted), "since": since})
    in_hand = {row.subscription_id: row.seq for row in oldest}
    late: set[str] = set()
    for subscription_id, ids in wanted.items():
        # what another takes at this moment is locked, and missing here
        ours = list(takewhile(lambda key: key in ready, [(subscription_id, x) for x in ids]))
        first = min((ready[key] for key in ours), default=0)
        is_late = in_hand.get(subscription_id, first) < first
        late.update(ids if is_late else ids[len(ours) :])
    return late


def waits(tx: Transaction) -> bool:
    """Say whether anything is left to be taken."""
    return bool(_WITH_READY.fetch(tx, {}))


def alone(tx: Transaction, own: Collection[str] = ()) -> list[Delivery]:
    """Take what no subscription wants and was not published yet, the oldest first.

    Its dispatcher died, or it is that of ``own`` ids: it could not publish them so far.
    Nobody else takes what is taken for :data:`PUBLISH_SECONDS`.
    """
    before = {"before": tx.later(-PUBLISH_SECONDS)}
    rows = list(tx.connection.execute(_ALONE.where(_IS_LEFT), before))
    if own:
        its = _ALONE.where(_IS_UNTAKEN, messages.c.id.in_(own))
        rows += tx.connection.execute(its, before)
    by_id = {row.id: row for row in rows}
    if by_id:
        _MARK.change(tx, {"ids": list(by_id), "now": tx.now})
    return [
        Delivery(0, 0, envelope_of(row), delay=log.seconds_until(tx, row.scheduled_at))
        for row in sorted(by_id.values(), key=lambda row: (row.created_at, row.id))
    ]


def _envelopes(tx: Transaction, ids: set[str]) -> dict[str, Envelope]:
    return {row.id: envelope_of(row) for row in _ENVELOPES.fetch(tx, {"ids": list(ids)})}
