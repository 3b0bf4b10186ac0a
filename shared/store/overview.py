"""All queues at a glance. Nothing here changes anything.

A page asks every few seconds, of a log that may have millions of messages. So what is open is
counted, which is little, and of what was dispatched only the last minute is, by the index of
queue, status and time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, func, select

from shared.lifecycle import MessageStatus
from shared.store.consumers import list_subscriptions
from shared.store.listing import queues_with_messages
from shared.store.queries import iso
from shared.tables import messages

m = messages.c

RECENT_SECONDS = 60

SLICE_SECONDS = 2
"""How long each of the times is by which the last minute is counted."""

SLICES = RECENT_SECONDS // SLICE_SECONDS

_SUMMED = ("waiting", "scheduled", "active", "dead")


def overview(connection: Connection, now: datetime) -> dict[str, Any]:
    """Return what each queue has to do, and what was dispatched in the last minute."""
    by_queue: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in list_subscriptions(connection, now):
        by_queue[each["queueName"]].append(each)
    names = sorted({*by_queue, *queues_with_messages(connection)})
    recent = _recent(connection, names, now)
    return {
        "at": iso(now),
        "recentSeconds": RECENT_SECONDS,
        "sliceSeconds": SLICE_SECONDS,
        "queues": [
            {"queueName": name, **_open(by_queue[name]), **_shown(recent[name])} for name in names
        ],
    }


def _open(its: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ages = [each["oldestWaitingSeconds"] for each in its]
    return {
        "subscriptions": len(its),
        "paused": sum(each["pausedAt"] is not None for each in its),
        "silent": sum(map(_is_silent, its)),
        **{name: sum(each[name] for each in its) for name in _SUMMED},
        "oldestWaitingSeconds": max((age for age in ages if age is not None), default=None),
    }


def _is_silent(its: Mapping[str, Any]) -> bool:
    """Say whether something waits, and nobody is there who would do it."""
    return its["consumer"] == "silent" and its["waiting"] > 0 and its["pausedAt"] is None


def _recent(
    connection: Connection, queues: Sequence[str], now: datetime
) -> dict[str, dict[str, list[int]]]:
    """Return what was dispatched into each queue: by status, in slices, the oldest first."""
    # messages are stored by the second: this one is not over
    end = now.replace(microsecond=0)
    begin = end - timedelta(seconds=RECENT_SECONDS)
    rows = connection.execute(
        select(m.queue_name, m.status, m.created_at, func.count())
        .where(
            m.queue_name.in_(queues),
            # named, they let the index be gone into for each of them
            m.status.in_(list(MessageStatus)),
            m.created_at >= begin,
            m.created_at < end,
        )
        .group_by(m.queue_name, m.status, m.created_at)
    )
    counts = {queue: {status.value: [0] * SLICES for status in MessageStatus} for queue in queues}
    for queue, status, at, count in rows:
        place = int((at - begin).total_seconds() // SLICE_SECONDS)
        counts[queue][MessageStatus(status).value][place] += count
    return counts


def _shown(counts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    dispatched = sum(map(sum, counts.values()))
    return {"dispatchedPerSecond": round(dispatched / RECENT_SECONDS, 3), "recent": counts}
