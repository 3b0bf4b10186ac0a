"""Why a message is where it is: for each of its deliveries one sentence, with the evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select

from shared.errors import MessageNotFoundError
from shared.lifecycle import WAITING, DeliveryStatus
from shared.store import limits
from shared.store.consumers import IS_OPEN, is_live
from shared.store.queries import iso
from shared.tables import deliveries, messages, pauses, subscriptions

c = deliveries.c
s = subscriptions.c

MOST_COUNTED = 10_000
"""Deliveries before one that are counted; more are called more."""

_COLUMNS = (
    *deliveries.c,
    s.subscriber,
    s.seen_at,
    s.paused_at,
    pauses.c.paused_by,
    s.retired_at,
)


@dataclass(frozen=True, slots=True)
class Provider:
    """What is known of the provider.

    :param joins_log: whether it works in the log's own tables.
    """

    name: str
    is_up: bool
    joins_log: bool


@dataclass(frozen=True, slots=True)
class Case:
    """One delivery, and what else there is to know of it."""

    connection: Connection
    row: Any
    now: datetime
    provider: Provider


Finding = tuple[str, str, dict[str, Any]]
"""The reason in a word, the sentence, and the evidence."""


def why(
    connection: Connection, message_id: str, now: datetime, provider: Provider
) -> dict[str, Any]:
    """Say for each subscription of a message what became of it, or what it waits for.

    :raises MessageNotFoundError: when there is none of that id.
    """
    status = connection.execute(
        select(messages.c.status).where(messages.c.id == message_id)
    ).scalar()
    if status is None:
        raise MessageNotFoundError(f"no message {message_id}")
    rows = connection.execute(
        select(*_COLUMNS)
        .select_from(deliveries.join(subscriptions))
        .outerjoin(pauses, pauses.c.subscription_id == s.id)
        .where(c.message_id == message_id)
        .order_by(c.seq)
    ).all()
    return {
        "messageId": message_id,
        "status": status,
        "reasons": [_shown(Case(connection, row, now, provider)) for row in rows] or [_nobody()],
    }


def _nobody() -> dict[str, Any]:
    return {
        "subscriber": None,
        "status": None,
        "reason": "unrouted",
        "sentence": "Nobody was subscribed when it was dispatched.",
        "evidence": {},
    }


def _shown(case: Case) -> dict[str, Any]:
    reason, sentence, evidence = next(
        found for each in _QUESTIONS if (found := each(case)) is not None
    )
    return {
        "subscriber": case.row.subscriber,
        "status": case.row.status,
        "reason": reason,
        "sentence": sentence,
        "evidence": evidence,
    }


def _ended(case: Case) -> Finding | None:
    row, at = case.row, iso(case.row.processed_at)
    match row.status:
        case DeliveryStatus.COMPLETED:
            by = {"at": at, "worker": row.worker}
            return "completed", f"Completed at {at} by {row.worker}.", by
        case DeliveryStatus.DISCARDED:
            return "discarded", f"Discarded at {at}.", {"at": at}
        case DeliveryStatus.FAILED:
            said = f"Dead after {_attempts(row)}: {row.error_type}: {row.error_message}"
            return "dead", said, {"at": at, **_error(row)}
    return None


def _running(case: Case) -> Finding | None:
    row = case.row
    if row.status != DeliveryStatus.PROCESSING:
        return None
    since = iso(row.started_at)
    evidence = {"worker": row.worker, "since": since, "leaseUntil": iso(row.lease_expires_at)}
    is_over = row.lease_expires_at is not None and row.lease_expires_at < case.now
    if is_over and not is_live(row.seen_at, case.now):
        said = f"{row.worker} had it since {since} and stopped; nobody is there to take it over."
        return "abandoned", said, evidence
    return "leased", f"{row.worker} has had it in hand since {since}.", evidence


def _retired(case: Case) -> Finding | None:
    if case.row.retired_at is None:
        return None
    at = iso(case.row.retired_at)
    said = f"Its subscription was retired at {at} while it was dispatched; an audit discards it."
    return "retired", said, {"at": at}


def _timed(case: Case) -> Finding | None:
    row, until = case.row, case.row.available_at
    if until is None or until <= case.now:
        return None
    if row.status == DeliveryStatus.RETRY:
        said = (
            f"Waits until {iso(until)} for attempt {row.attempts + 1}; the last one failed: "
            f"{row.error_type}: {row.error_message}"
        )
        return "retrying", said, {"until": iso(until), **_error(row)}
    return "scheduled", f"Scheduled until {iso(until)}.", {"until": iso(until)}


def _paused(case: Case) -> Finding | None:
    row = case.row
    if row.paused_at is None:
        return None
    by, since = row.paused_by or "an operator", iso(row.paused_at)
    return "paused", f"Paused by {by} since {since}.", {"by": row.paused_by, "since": since}


def _unreachable(case: Case) -> Finding | None:
    if case.provider.is_up:
        return None
    name = case.provider.name
    return "unreachable", f"The provider, {name}, does not answer.", {"provider": name}


def _unpublished(case: Case) -> Finding | None:
    row, name = case.row, case.provider.name
    if case.provider.joins_log or not (row.ready or row.lease_expires_at):
        return None
    until = iso(row.lease_expires_at)
    said = f"Waits to be relayed to {name}." if row.ready else f"Is on its way to {name}."
    return "unpublished", said, {"provider": name, "inHandUntil": until}


def _unconsumed(case: Case) -> Finding | None:
    seen = iso(case.row.seen_at)
    if is_live(case.row.seen_at, case.now):
        return None
    since = f"since {seen}" if seen else "and nobody ever did"
    return "silent", f"Nobody consumes this subscription {since}.", {"lastSeenAt": seen}


def _limited(case: Case) -> Finding | None:
    its_id = case.row.subscription_id
    found = limits.usages(case.connection, [its_id], case.now).get(its_id)
    if found is None:
        return None
    its = found.limits
    if found.is_full:
        reason = "concurrency-limited"
        said = f"Limited to {its.concurrency} at once, and workers have {found.held} in hand"
    elif found.is_spent:
        reason, said = "rate-limited", f"Rate-limited to {its.rate:g}/s"
    else:
        return None
    before = sum(_before(case))
    evidence = {**(its.shown() or {}), "inHand": found.held, "before": before}
    verb = "is" if before == 1 else "are"
    return reason, f"{said}; {_many(before)} {verb} before it.", evidence


def _before(case: Case) -> tuple[int, int]:
    """Count those of higher priority, and those of the same that are older."""
    rank, seq = case.row.priority_rank, case.row.seq
    older = and_(c.priority_rank == rank, c.seq < seq)
    return _count(case, c.priority_rank < rank), _count(case, older)


def _behind(case: Case) -> Finding:
    higher, older = _before(case)
    active = _count_where(case, c.status == DeliveryStatus.PROCESSING)
    evidence = {"higherPriority": higher, "older": older, "active": active}
    hands = f"workers have {_many(active)} in hand"
    if not higher and not older:
        return "next", f"It is the next one; {hands}.", evidence
    said = f"Behind {_many(higher)} of higher priority and {_many(older)} older; {hands}."
    return "behind", said, evidence


_QUESTIONS: tuple[Callable[[Case], Finding | None], ...] = (
    _ended,
    _running,
    _retired,
    _timed,
    _paused,
    _unreachable,
    _unpublished,
    _unconsumed,
    _limited,
    _behind,
)
"""What is asked of a delivery, until one of them is the answer."""


def _count(case: Case, is_before: Any) -> int:
    is_due = or_(c.available_at.is_(None), c.available_at <= case.now)
    return _count_where(case, and_(c.status.in_(WAITING), is_before, is_due))


def _count_where(case: Case, condition: Any) -> int:
    its = select(c.seq).where(c.subscription_id == case.row.subscription_id, IS_OPEN, condition)
    counted = select(func.count()).select_from(its.limit(MOST_COUNTED + 1).subquery())
    return case.connection.execute(counted).scalar_one()


def _many(count: int) -> str:
    return f"more than {MOST_COUNTED}" if count > MOST_COUNTED else str(count)


def _attempts(row: Any) -> str:
    if row.takeovers and not row.attempts:
        return f"{row.takeovers} workers that died with it"
    return f"{row.attempts} attempt{'' if row.attempts == 1 else 's'}"


def _error(row: Any) -> dict[str, Any]:
    return {
        "attempts": row.attempts,
        "errorType": row.error_type,
        "errorMessage": row.error_message,
    }
