"""Ramps: dead letters of a group that are retried in steps of 1, 10, 100 and so on.

A step begins when nothing of the one before is under way any more, and only while nothing fails
as before. Each move is one transaction, that begins with taking the ramp: whoever comes second
finds that it is not due. What was retried is noted in the same transaction, so that a ramp goes on
where it was, whoever dies.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, or_, select, update

from shared.database import Transaction
from shared.errors import (
    NothingToChangeError,
    NothingToRetryError,
    RampNotFoundError,
    RampRunningError,
)
from shared.lifecycle import WAITING, DeliveryStatus
from shared.statements import Prepared
from shared.store import failures, repair, trail
from shared.store.queries import iso
from shared.store.trail import Deed
from shared.tables import deliveries, ramp_deliveries, ramps
from shared.tables import failures as failures_table
from shared.types import Delivery

FACTOR = 10
"""How many times as many dead letters a step has as the one before."""

USUAL_RATE = 50
"""Dead letters a second, where nobody said anything else: what a small service can take beside
what else it does."""

HIGHEST_RATE = 10_000
"""The most that may be asked for."""

BATCH = 200
"""Dead letters that one transaction retries: others wait for it meanwhile."""

LOOK_SECONDS = 0.5
"""How often it is looked whether all of a step has ended."""

MOST_LISTED = 100
"""Ramps of one answer, the newest."""

r = ramps.c
rd = ramp_deliveries.c
f = failures_table.c
d = deliveries.c

UNDER_WAY = (*sorted(WAITING), DeliveryStatus.PROCESSING)


class RampStatus(StrEnum):
    """How a ramp is."""

    RUNNING = "running"
    COMPLETED = "completed"
    """All dead letters that it was for have run again."""
    STOPPED = "stopped"
    """They fail as before."""
    CANCELLED = "cancelled"


_ADD = Prepared(insert(ramp_deliveries), [column.name for column in rd])
_IS_STEP = (rd.ramp_id == bindparam("id"), rd.step == bindparam("step"))
_UNDER_WAY = Prepared(
    select(rd.delivery_seq)
    .select_from(ramp_deliveries)
    .join(deliveries, d.seq == rd.delivery_seq)
    .where(*_IS_STEP, or_(*[d.status == status for status in UNDER_WAY]))
    .limit(1)
)
_CAME_BACK = Prepared(
    select(func.count().label("number"))
    .select_from(ramp_deliveries)
    .join(failures_table, f.delivery_seq == rd.delivery_seq)
    .where(*_IS_STEP, f.fingerprint == bindparam("group"))
)
_FAILED_SINCE = Prepared(
    select(func.count().label("number")).where(
        f.fingerprint == bindparam("group"), f.failed_at > bindparam("since")
    )
)


def start(tx: Transaction, group: str, actor: str, rate: int) -> int:
    """Begin a ramp; return its id.

    :param rate: dead letters a second.
    :raises NothingToRetryError: when there is no such group.
    :raises RampRunningError: when the group has a ramp that runs.
    """
    running = tx.connection.execute(select(r.id).where(r.running == group)).scalar()
    if running is not None:
        raise RampRunningError(f"ramp {running} of the group {group} runs")
    total = failures.size(tx.connection, group)
    if not total:
        raise NothingToRetryError(f"no dead letter is in the group {group}")
    values = {
        "fingerprint": group,
        "status": RampStatus.RUNNING.value,
        "running": group,
        "started_by": actor[:255],
        "rate": rate,
        "total": total,
        "step": 1,
        "released": 0,
        "next_at": tx.now,
        "started_at": tx.now,
    }
    added = tx.connection.execute(insert(ramps).values(**values))
    [ramp_id] = added.inserted_primary_key or (0,)
    detail = {"ramp": ramp_id, "rate": rate, "deadLetters": total}
    trail.note(tx, Deed(actor, "ramp", f"failure group {group}", detail))
    return int(ramp_id)


def cancel(tx: Transaction, ramp_id: int, actor: str) -> None:
    """End a ramp; what it retried goes on.

    :raises RampNotFoundError: when there is none of that id.
    :raises NothingToChangeError: when it has ended.
    """
    row = _row(tx.connection, ramp_id)
    if not _end(tx, row, RampStatus.CANCELLED, f"Cancelled by {actor}."):
        raise NothingToChangeError(f"ramp {ramp_id} has ended")
    trail.note(tx, Deed(actor, "cancel", f"ramp {ramp_id}"))


def due(connection: Connection, now: datetime) -> tuple[list[int], float | None]:
    """Return the ramps that are to be looked after, and in how many seconds the next one is."""
    found = connection.execute(
        select(r.id, r.next_at).where(r.running.is_not(None)).order_by(r.id)
    ).all()
    later = [(row.next_at - now).total_seconds() for row in found if row.next_at > now]
    return [row.id for row in found if row.next_at <= now], min(later, default=None)


def advance(tx: Transaction, ramp_id: int) -> list[Delivery]:
    """Do what is next for a ramp, if that is due; return what runs again, to be published."""
    taken = select(ramps).where(r.id == ramp_id, r.running.is_not(None), r.next_at <= tx.now)
    row = tx.connection.execute(taken.with_for_update(skip_locked=True)).first()
    if row is None:
        return []
    # in this order: what has ended by now is among the failures by now, if it failed
    is_under_way = bool(_UNDER_WAY.fetch(tx, {"id": row.id, "step": row.step}))
    if said := _trouble(tx, row):
        _end(tx, row, RampStatus.STOPPED, said)
        return []
    if row.released < row.step:
        return _release(tx, row, is_under_way)
    if is_under_way:
        _set(tx, row, next_at=tx.later(LOOK_SECONDS))
    else:
        _set(tx, row, step=row.step * FACTOR, released=0)
    return []


def _trouble(tx: Transaction, row: Any) -> str | None:
    """Say what failed as before, if anything did."""
    group = row.fingerprint
    its = {"id": row.id, "step": row.step, "group": group}
    [back] = _CAME_BACK.fetch(tx, its)
    if back.number:
        return f"Stopped in the step of {row.step}: {back.number} of {row.released} failed again."
    # messages that came meanwhile tell as much
    [new] = _FAILED_SINCE.fetch(tx, {"group": group, "since": row.started_at})
    if new.number:
        return f"Stopped in the step of {row.step}: {new.number} more failed in the same way."
    return None


def _release(tx: Transaction, row: Any, is_under_way: bool) -> list[Delivery]:
    """Retry as many as are due of a step; end with the last of the group."""
    wanted = min(row.step - row.released, row.rate, BATCH)
    seqs = failures.seqs_of(tx.connection, row.fingerprint, wanted, of_the_living=True)
    again = repair.retry(tx, seqs)
    if again:
        _ADD.change_many(
            tx, [{"ramp_id": row.id, "step": row.step, "delivery_seq": x.seq} for x in again]
        )
        if not row.released:
            detail = {"ramp": row.id, "step": row.step}
            target = f"failure group {row.fingerprint}"
            trail.note(tx, Deed(row.started_by, "retry", target, detail))
        next_at = tx.later(len(again) / row.rate)
        _set(tx, row, released=row.released + len(again), next_at=next_at)
    elif is_under_way or seqs:
        _set(tx, row, next_at=tx.later(LOOK_SECONDS))
    else:
        _complete(tx, row)
    return again


def _complete(tx: Transaction, row: Any) -> None:
    counts = _counts(tx.connection, [row.id])[row.id]
    done, all_ = counts[DeliveryStatus.COMPLETED], sum(counts.values())
    said = [f"{done} of the {all_} that were retried have completed"]
    if counts[DeliveryStatus.FAILED]:
        said.append(f"{counts[DeliveryStatus.FAILED]} failed otherwise")
    if left := failures.size(tx.connection, row.fingerprint):
        said.append(f"{left} are of subscriptions that were retired")
    _end(tx, row, RampStatus.COMPLETED, f"{'; '.join(said)}.")


def _end(tx: Transaction, row: Any, status: RampStatus, reason: str) -> bool:
    # another ramp may retry the same ones, and the retention removes them
    counts = _told(tx.connection, row, _counts(tx.connection, [row.id])[row.id])
    values = {
        "status": status.value,
        "running": None,
        "ended_at": tx.now,
        "reason": reason,
        "counts": json.dumps(counts),
    }
    return _set(tx, row, **values)


def _set(tx: Transaction, row: Any, **values: Any) -> bool:
    its = r.id == row.id, r.running.is_not(None)
    return tx.connection.execute(update(ramps).where(*its).values(**values)).rowcount > 0


# --- looking


def list_ramps(connection: Connection, limit: int = MOST_LISTED) -> list[dict[str, Any]]:
    """Return the ramps, the newest first, ``limit`` at most."""
    rows = connection.execute(select(ramps).order_by(r.id.desc()).limit(limit)).all()
    counts = _counts(connection, [row.id for row in rows if row.counts is None])
    return [_shown(connection, row, counts[row.id]) for row in rows]


def ramp(connection: Connection, ramp_id: int) -> dict[str, Any]:
    """Return how far a ramp is.

    :raises RampNotFoundError: when there is none of that id.
    """
    row = _row(connection, ramp_id)
    return _shown(connection, row, _counts(connection, [ramp_id])[ramp_id])


def _row(connection: Connection, ramp_id: int) -> Any:
    # SQLite raises for what is larger
    found = connection.execute(select(ramps).where(r.id == ramp_id)) if ramp_id < 1 << 63 else None
    row = found.first() if found is not None else None
    if row is None:
        raise RampNotFoundError(f"no ramp {ramp_id}")
    return row


def _counts(connection: Connection, ramp_ids: Sequence[int]) -> dict[int, dict[str, int]]:
    """Count by status what each of these ramps retried."""
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    found = connection.execute(
        select(rd.ramp_id, d.status, func.count().label("number"))
        .select_from(ramp_deliveries)
        .join(deliveries, d.seq == rd.delivery_seq)
        .where(rd.ramp_id.in_(ramp_ids))
        .group_by(rd.ramp_id, d.status)
    )
    for row in found:
        counts[row.ramp_id][row.status] = row.number
    return counts


def _told(connection: Connection, row: Any, counts: dict[str, int]) -> dict[str, int]:
    """Return what has become of the dead letters of a ramp."""
    return {
        "retried": sum(counts.values()),
        "completed": counts[DeliveryStatus.COMPLETED],
        "failed": counts[DeliveryStatus.FAILED],
        "waiting": sum(counts[status] for status in UNDER_WAY),
        "remaining": failures.size(connection, row.fingerprint),
    }


def _shown(connection: Connection, row: Any, counts: dict[str, int]) -> dict[str, Any]:
    told = json.loads(row.counts) if row.counts else _told(connection, row, counts)
    return {
        "id": row.id,
        "fingerprint": row.fingerprint,
        "status": row.status,
        "startedBy": row.started_by,
        "rate": row.rate,
        "total": row.total,
        "step": row.step,
        **told,
        "startedAt": iso(row.started_at),
        "endedAt": iso(row.ended_at),
        "sentence": row.reason or f"In the step of {row.step}: {row.released} retried.",
    }
