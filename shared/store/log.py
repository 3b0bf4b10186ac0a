"""The message log: what was dispatched, and what became of it.

Each function is one step of an event's way, for many at once, within a
transaction that the caller opened. All moves are guarded: a row changes only if
it is still in a state that ``lifecycle.py`` lets go there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, case, insert, select, update

from shared.database import Transaction
from shared.lifecycle import MessageStatus
from shared.statements import Prepared
from shared.store import causes
from shared.store.subscriptions import FORGOTTEN_AFTER_SECONDS, gets_events, subscribers_of
from shared.tables import OWN_METADATA, deliveries, messages, subscriptions
from shared.types import Delivery, Envelope, Priority

_STORED = Prepared(select(messages.c.id).where(messages.c.id.in_(bindparam("ids", expanding=True))))
_DECIDED = Prepared(_STORED.statement.with_for_update(nowait=True))
_ADD_MESSAGES = Prepared(
    insert(messages), [c.name for c in messages.c if c.name not in ("retry_count", "error_message")]
)
_ADD_DELIVERIES = Prepared(
    insert(deliveries),
    [
        "message_id",
        "subscription_id",
        "priority_rank",
        "available_at",
        "ready",
        "lease_expires_at",
    ],
)
_DELIVERIES_OF = Prepared(
    select(
        deliveries.c.seq,
        deliveries.c.message_id,
        deliveries.c.subscription_id,
        deliveries.c.available_at,
    )
    .where(deliveries.c.message_id.in_(bindparam("ids", expanding=True)))
    .order_by(deliveries.c.seq)
)

_RANK = case(
    *[(messages.c.priority == priority.value, priority.rank) for priority in Priority],
)
_TO_ADD = ["message_id", "subscription_id", "priority_rank", "ready", "lease_expires_at"]
_IS_OPEN = bindparam("is_open", type_=deliveries.c.ready.type)
_UNTIL = bindparam("until", type_=deliveries.c.lease_expires_at.type)
_ADDED = (deliveries.c.seq, deliveries.c.message_id, deliveries.c.subscription_id)
_ADD_FOR_ALL = Prepared(
    insert(deliveries)
    .from_select(
        _TO_ADD,
        select(messages.c.id, subscriptions.c.id, _RANK, _IS_OPEN, _UNTIL)
        # MariaDB may take a queue to be as short as when it opened the table, and go through it
        .with_hint(messages, "FORCE INDEX (PRIMARY)")
        .join(
            subscriptions,
            and_(
                subscriptions.c.queue_name == messages.c.queue_name,
                subscriptions.c.message_type == messages.c.message_type,
            ),
        )
        .where(messages.c.id.in_(bindparam("ids", expanding=True)), gets_events(bindparam("alive")))
        .order_by(messages.c.id, subscriptions.c.subscriber),
    )
    .returning(*_ADDED)
)
# of one message is known what it is: without the join the server has less to do
_ADD_FOR_ONE = Prepared(
    insert(deliveries)
    .from_select(
        _TO_ADD,
        select(
            bindparam("id", type_=messages.c.id.type),
            subscriptions.c.id,
            bindparam("rank", type_=deliveries.c.priority_rank.type),
            _IS_OPEN,
            _UNTIL,
        )
        .where(
            subscriptions.c.queue_name == bindparam("queue"),
            subscriptions.c.message_type == bindparam("type"),
            gets_events(bindparam("alive")),
        )
        .order_by(subscriptions.c.subscriber),
    )
    .returning(*_ADDED)
)
_FINISH = Prepared(
    update(messages)
    .where(
        messages.c.id.in_(bindparam("ids", expanding=True)),
        messages.c.status == MessageStatus.PENDING,
    )
    .values(
        status=MessageStatus.COMPLETED, processed_at=bindparam("at"), updated_at=bindparam("at")
    )
)

# --- dispatch


class Handover(NamedTuple):
    """What becomes of new deliveries once they are stored.

    :param seconds: for which they are in the hands of who dispatches, who publishes them
        next; ``None`` leaves them in the log, for the provider that works in it.
    :param is_open: the provider is away: they are left to be published when it is back.
    :param fans_out: a message that no subscription wants is published, too.
    """

    seconds: float | None = None
    is_open: bool = False
    fans_out: bool = False

    def until(self, tx: Transaction) -> datetime | None:
        """Return how long they are in the hands of who dispatches."""
        return tx.later(self.seconds) if self.seconds and not self.is_open else None


IN_LOG = Handover()


def append(
    tx: Transaction,
    envelopes: Sequence[Envelope],
    max_retries: int,
    *,
    again: bool = False,
    handover: Handover = IN_LOG,
    is_last: bool = False,
) -> list[Delivery]:
    """Store messages and a delivery for each subscription that is known now.

    :param max_retries: what ``queue_messages.max_retries`` says where the dispatch did not.
    :param again: some may be stored already (by an earlier try); those are left alone.
    :param is_last: whether nothing else comes in this transaction, so that it may be committed
        here. Then the caller has to :func:`finish` what no subscription wants, in another one.
    :returns: the new deliveries in their order, to be published.
    """
    if again:
        stored = stored_ids(tx, [envelope.id for envelope in envelopes])
        envelopes = [envelope for envelope in envelopes if envelope.id not in stored]
    if not envelopes:
        return []
    timed = [_with_times(tx, envelope) for envelope in envelopes]
    _ADD_MESSAGES.change_many(tx, [_message_row(tx, e, max_retries) for e in timed])
    causes.note(tx, timed)
    if _can_add_at_once(tx, timed):
        new = _add_at_once(tx, timed, handover, is_last)
    else:
        new = _add_singly(tx, timed, handover)
    routed = {delivery.message.id for delivery in new}
    alone = [envelope for envelope in timed if envelope.id not in routed]
    if handover.fans_out:
        return new + [Delivery(0, 0, e, delay=seconds_until(tx, e.scheduled_at)) for e in alone]
    if alone and not is_last:
        finish(tx, [envelope.id for envelope in alone])
    return new


def finish(tx: Transaction, message_ids: Sequence[str]) -> None:
    """Complete messages that no subscription wants."""
    _FINISH.change(tx, {"ids": message_ids, "at": tx.now})


def _can_add_at_once(tx: Transaction, envelopes: Sequence[Envelope]) -> bool:
    """Whether one statement may find the subscriptions and add the deliveries in their order."""
    ids = [envelope.id for envelope in envelopes]
    is_plain = all(envelope.scheduled_at is None for envelope in envelopes)
    return tx.connection.dialect.insert_returning and is_plain and ids == sorted(ids)


def _add_at_once(
    tx: Transaction, envelopes: Sequence[Envelope], handover: Handover, is_last: bool
) -> list[Delivery]:
    by_id = {envelope.id: envelope for envelope in envelopes}
    values: dict[str, Any] = {
        "alive": tx.later(-FORGOTTEN_AFTER_SECONDS),
        "is_open": handover.is_open,
        "until": handover.until(tx),
    }
    if len(envelopes) == 1:
        [one] = envelopes
        values |= {"id": one.id, "queue": one.queue, "type": one.type, "rank": one.priority.rank}
        rows = _ADD_FOR_ONE.fetch(tx, values, is_last=is_last)
    else:
        rows = _ADD_FOR_ALL.fetch(tx, {**values, "ids": list(by_id)}, is_last=is_last)
    rows.sort(key=lambda row: row.seq)
    return [Delivery(row.seq, row.subscription_id, by_id[row.message_id]) for row in rows]


def _add_singly(
    tx: Transaction, envelopes: Sequence[Envelope], handover: Handover
) -> list[Delivery]:
    subscribers = subscribers_of(tx, envelopes)
    wanted = [(e, id_) for e in envelopes for id_ in subscribers.get((e.queue, e.type), ())]
    if not wanted:
        return []
    add_deliveries(tx, wanted, handover)
    return _new_deliveries(tx, envelopes)


def store(tx: Transaction, envelopes: Sequence[Envelope], max_retries: int) -> None:
    """Store messages that are not yet, and no delivery."""
    stored = stored_ids(tx, [envelope.id for envelope in envelopes])
    new = [_with_times(tx, envelope) for envelope in envelopes if envelope.id not in stored]
    if new:
        rows = [_message_row(tx, envelope, max_retries) for envelope in new]
        _ADD_MESSAGES.change_many(tx, rows)


def add_deliveries(
    tx: Transaction, wanted: Sequence[tuple[Envelope, int]], handover: Handover = IN_LOG
) -> None:
    """Store a delivery for each pair of a stored message and the id of a subscription."""
    until = handover.until(tx)
    _ADD_DELIVERIES.change_many(
        tx,
        [
            {
                "message_id": envelope.id,
                "subscription_id": subscription_id,
                "priority_rank": envelope.priority.rank,
                "available_at": envelope.scheduled_at
                if seconds_until(tx, envelope.scheduled_at)
                else None,
                "ready": handover.is_open,
                "lease_expires_at": until,
            }
            for envelope, subscription_id in wanted
        ],
    )


def stored_ids(tx: Transaction, ids: Sequence[str]) -> set[str]:
    """Return which of these message ids are stored."""
    return {row.id for row in _STORED.fetch(tx, {"ids": ids})}


def decided_ids(tx: Transaction, ids: Sequence[str]) -> set[str]:
    """Return which of these message ids are stored, where no open transaction stores any.

    :raises OperationalError: when one does. Its COMMIT may be on its way to the server yet, or
        wait there, and its client be gone.
    """
    return {row.id for row in _DECIDED.fetch(tx, {"ids": ids})}


def _with_times(tx: Transaction, envelope: Envelope) -> Envelope:
    scheduled_at = envelope.scheduled_at
    if envelope.delay:
        scheduled_at = tx.later(envelope.delay)
    return replace(envelope, scheduled_at=scheduled_at, delay=None, created_at=tx.now)


def _message_row(tx: Transaction, envelope: Envelope, max_retries: int) -> dict[str, Any]:
    return {
        "id": envelope.id,
        "queue_name": envelope.queue,
        "message_type": envelope.type,
        "payload": envelope.body,
        "status": MessageStatus.PENDING,
        "priority": envelope.priority,
        "max_retries": max_retries if envelope.max_retries is None else envelope.max_retries,
        "processed_at": None,
        "scheduled_at": envelope.scheduled_at,
        "metadata": json.dumps(_kept_metadata(envelope), ensure_ascii=False),
        "created_at": tx.now,
        "updated_at": tx.now,
    }


def _kept_metadata(envelope: Envelope) -> dict[str, Any]:
    # The table has one column for it, the default of the setting included: only here
    # can be seen whether the dispatch itself said how often to try.
    if envelope.max_retries is None:
        return dict(envelope.metadata)
    own = {**envelope.metadata.get(OWN_METADATA, {}), "max_retries": envelope.max_retries}
    return {**envelope.metadata, OWN_METADATA: own}


def _new_deliveries(tx: Transaction, envelopes: Sequence[Envelope]) -> list[Delivery]:
    by_id = {envelope.id: envelope for envelope in envelopes}
    rows = _DELIVERIES_OF.fetch(tx, {"ids": list(by_id)})
    return [
        Delivery(
            seq=row.seq,
            subscription_id=row.subscription_id,
            message=by_id[row.message_id],
            delay=seconds_until(tx, row.available_at),
        )
        for row in rows
    ]


def seconds_until(tx: Transaction, time: datetime | None) -> float:
    """Return how far off a time is by the database's clock; 0 for one in the past, or none."""
    return 0.0 if time is None else max(0.0, (time - tx.now).total_seconds())
