"""What operations change: dead letters retried or discarded, what waits cancelled or put off.

Each function is one step for many deliveries, within a transaction that the caller opened.
What it returns is to be published: a provider in the log gets it, one apart finds it ready.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, bindparam, insert, select, update

from shared.database import Transaction
from shared.errors import MessageNotFoundError, NothingToChangeError, NothingToRetryError
from shared.lifecycle import WAITING, DeliveryStatus
from shared.statements import Prepared
from shared.store import failures
from shared.store.log import seconds_until, store
from shared.store.summary import lock, refresh
from shared.tables import MESSAGE_COLUMNS, deliveries, envelope_of, messages, subscriptions
from shared.types import Delivery, Envelope

c = deliveries.c

ORIGIN = "origin"
"""The key of the suite's own metadata that holds the id of the message that this one replaces."""

_SEQS: Any = bindparam("seqs", expanding=True)

_RETRY = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), c.status == DeliveryStatus.FAILED)
    .values(
        status=DeliveryStatus.PENDING,
        attempts=0,
        takeovers=0,
        processed_at=None,
        error_type=None,
        error_message=None,
    )
)
_DISCARD = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS))
    .values(
        status=DeliveryStatus.DISCARDED,
        processed_at=bindparam("now"),
        available_at=None,
        ready=False,
        lease_expires_at=None,
    )
)


def retry_message(tx: Transaction, message_id: str) -> list[Delivery]:
    """Let the failed deliveries of a message wait again, attempts counted from zero.

    :raises MessageNotFoundError: when there is no such message.
    :raises NothingToRetryError: when none of its deliveries had failed.
    """
    _lock_one(tx, message_id)
    again = retry(tx, _seqs(tx, message_id, {DeliveryStatus.FAILED}))
    if not again:
        raise NothingToRetryError(f"message {message_id} has no failed delivery to be retried")
    return again


def retry(tx: Transaction, seqs: Sequence[int]) -> list[Delivery]:
    """Let those of these deliveries that have failed wait again, attempts counted from zero."""
    # nobody would ever handle it for a subscription that is retired
    rows = _lock_rows(
        tx, seqs, c.status == DeliveryStatus.FAILED, subscriptions.c.retired_at.is_(None)
    )
    if not rows:
        return []
    again = [row.seq for row in rows]
    _RETRY.change(tx, {"seqs": again})
    failures.remove(tx, again)
    envelopes = envelopes_of(tx, {row.message_id for row in rows})
    refresh(tx, envelopes)
    return [
        Delivery(row.seq, row.subscription_id, envelopes[row.message_id], token=row.lease_token)
        for row in rows
    ]


def discard(tx: Transaction, seqs: Sequence[int]) -> int:
    """Give up those of these deliveries that have failed; return how many."""
    return _discard(tx, _lock_rows(tx, seqs, c.status == DeliveryStatus.FAILED))


def discard_message(tx: Transaction, message_id: str) -> int:
    """Give up the failed deliveries of a message; return how many.

    :raises MessageNotFoundError: when there is no such message.
    :raises NothingToChangeError: when none of its deliveries had failed.
    """
    _lock_one(tx, message_id)
    discarded = discard(tx, _seqs(tx, message_id, {DeliveryStatus.FAILED}))
    if not discarded:
        raise NothingToChangeError(f"message {message_id} has no failed delivery to be discarded")
    return discarded


def cancel(tx: Transaction, message_id: str) -> int:
    """Discard the waiting deliveries of a message; return how many.

    Its row stays, so that a copy that a broker has is settled when it arrives, and not run.

    :raises MessageNotFoundError: when there is no such message.
    :raises NothingToChangeError: when none of its deliveries waits.
    """
    return _discard(tx, _waiting(tx, message_id))


def reschedule(tx: Transaction, message_id: str, scheduled_at: datetime) -> list[Delivery]:
    """Have the waiting deliveries of a message reserved at a time, and not before.

    Each is discarded, and another takes its place, under a number of its own: no broker can
    move what it has, and when that arrives it is settled, and not run.

    :param scheduled_at: naive UTC; one in the past means now.
    :raises MessageNotFoundError: when there is no such message.
    :raises NothingToChangeError: when none of its deliveries waits.
    """
    rows = _waiting(tx, message_id)
    _discard(tx, rows)
    delay = seconds_until(tx, scheduled_at)
    its = messages.c.id == message_id
    tx.connection.execute(update(messages).where(its).values(scheduled_at=scheduled_at))
    envelope = envelopes_of(tx, {message_id})[message_id]
    new = [
        {
            "message_id": message_id,
            "subscription_id": row.subscription_id,
            "status": row.status,
            "attempts": row.attempts,
            "error_type": row.error_type,
            "error_message": row.error_message,
            "priority_rank": row.priority_rank,
            "available_at": scheduled_at if delay else None,
        }
        for row in rows
    ]
    added = [_add(tx, values, envelope) for values in new]
    refresh(tx, [message_id])
    return added


def replace_message(
    tx: Transaction, message_id: str, edited: Envelope, max_retries: int
) -> list[Delivery]:
    """Store a message in place of one, for those whose deliveries of that failed.

    Their failed deliveries are discarded.

    :param max_retries: as for :func:`shared.store.log.append`.
    :raises MessageNotFoundError: when there is no such message.
    :raises NothingToRetryError: when none of its deliveries had failed.
    """
    _lock_one(tx, message_id)
    seqs = _seqs(tx, message_id, {DeliveryStatus.FAILED})
    is_living = subscriptions.c.retired_at.is_(None)
    rows = _lock_rows(tx, seqs, c.status == DeliveryStatus.FAILED, is_living)
    if not rows:
        raise NothingToRetryError(f"message {message_id} has no failed delivery to be replaced")
    _discard(tx, rows)
    return restore(tx, edited, [row.subscription_id for row in rows], max_retries)


def restore(
    tx: Transaction, envelope: Envelope, subscription_ids: Sequence[int], max_retries: int
) -> list[Delivery]:
    """Store a message for these subscriptions alone.

    :param max_retries: as for :func:`shared.store.log.append`.
    """
    store(tx, [envelope], max_retries)
    stored = envelopes_of(tx, {envelope.id})[envelope.id]
    is_later = seconds_until(tx, stored.scheduled_at) > 0
    new = [
        {
            "message_id": stored.id,
            "subscription_id": each,
            "priority_rank": stored.priority.rank,
            "available_at": stored.scheduled_at if is_later else None,
            # as if it had been handed out before: what a broker sends to whoever listens
            # would reach others, too
            "lease_token": 1,
        }
        for each in subscription_ids
    ]
    return [_add(tx, values, stored) for values in new]


def _add(tx: Transaction, values: dict[str, Any], envelope: Envelope) -> Delivery:
    added = tx.connection.execute(insert(deliveries).values(**values))
    [seq] = added.inserted_primary_key or (0,)
    return Delivery(
        seq,
        values["subscription_id"],
        envelope,
        values.get("attempts", 0),
        seconds_until(tx, values.get("available_at")),
        values.get("lease_token", 0),
    )


def failed_seqs(
    tx: Transaction, message_ids: Collection[str], conditions: Sequence[ColumnElement[bool]]
) -> list[int]:
    """Return the failed deliveries of messages that fit the conditions."""
    its = c.message_id.in_(list(message_ids)), c.status == DeliveryStatus.FAILED
    found = select(c.seq).where(*its, *conditions).order_by(c.seq)
    return list(tx.connection.execute(found).scalars())


def _waiting(tx: Transaction, message_id: str) -> list[Any]:
    _lock_one(tx, message_id)
    rows = _lock_rows(tx, _seqs(tx, message_id, WAITING), c.status.in_(WAITING))
    if not rows:
        raise NothingToChangeError(f"message {message_id} has no delivery that waits")
    return rows


def _discard(tx: Transaction, rows: Sequence[Any]) -> int:
    seqs = [row.seq for row in rows]
    if seqs:
        _DISCARD.change(tx, {"seqs": seqs, "now": tx.now})
        failures.remove(tx, seqs)
        refresh(tx, {row.message_id for row in rows})
    return len(seqs)


def _lock_one(tx: Transaction, message_id: str) -> None:
    found = select(messages.c.id).where(messages.c.id == message_id).with_for_update()
    if tx.connection.execute(found).first() is None:
        raise MessageNotFoundError(f"no message {message_id}")


def _seqs(tx: Transaction, message_id: str, statuses: Collection[DeliveryStatus]) -> list[int]:
    its = c.message_id == message_id, c.status.in_(statuses)
    return list(tx.connection.execute(select(c.seq).where(*its).order_by(c.seq)).scalars())


def _lock_rows(tx: Transaction, seqs: Sequence[int], *conditions: ColumnElement[bool]) -> list[Any]:
    """Return the rows of those deliveries that fit, once nobody else changes their messages."""
    if not seqs:
        return []
    ids = tx.connection.execute(select(c.message_id).where(c.seq.in_(seqs))).scalars()
    lock(tx, set(ids))
    # read once they are locked: somebody may have done the same
    return list(
        tx.connection.execute(
            select(deliveries)
            .select_from(deliveries.join(subscriptions))
            .where(c.seq.in_(seqs), *conditions)
            .order_by(c.seq)
        ).all()
    )


def envelopes_of(tx: Transaction, ids: Collection[str]) -> dict[str, Envelope]:
    """Return the envelopes of messages, by their ids."""
    rows = tx.connection.execute(select(*MESSAGE_COLUMNS).where(messages.c.id.in_(list(ids))))
    return {row.id: envelope_of(row) for row in rows}
