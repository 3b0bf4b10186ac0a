"""All queues at a glance. Nothing here changes anything.

A page asks every few seconds, of a log that may have millions of messages. So what is open is
counted, which is little, and of what was dispatched only the last minute is, by the index of
queue, status and time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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

_SUMMED = ("waiting", "scheduled", "active", "dead")


def overview(connection: Connection, now: datetime) -> dict[str, Any]:
    """Return what each queue has to do, and what was dispatched in the last minute."""
    by_queue: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in list_subscriptions(connection, now):
        by_queue[each["queueName"]].append(each)
    names = sorted({*by_queue, *queues_with_messages(connection)})
    # messages are stored by the second: this one is not over
    end = now.replace(microsecond=0)
    return {
        "at": iso(now),
        "recentSeconds": RECENT_SECONDS,
        "sliceSeconds": SLICE_SECONDS,
        "queues": [
            {
                "queueName": name,
                **_open(by_queue[name]),
                **_recent(connection, name, end),
            }
            for name in names
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


def _recent(connection: Connection, queue: str, end: datetime) -> dict[str, Any]:
    begin = end - timedelta(seconds=RECENT_SECONDS)
    rows = connection.execute(
        select(m.status, m.created_at, func.count())
        .where(
            m.queue_name == queue,
            # named, they let the index be gone into for each of them
            m.status.in_(list(MessageStatus)),
            m.created_at >= begin,
            m.created_at < end,
        )
        .group_by(m.status, m.created_at)
    )
    counts = _sliced(((status, (at - begin).total_seconds(), count) for status, at, count in rows))
    dispatched = sum(map(sum, counts.values()))
    return {"dispatchedPerSecond": round(dispatched / RECENT_SECONDS, 3), "recent": counts}


def _sliced(rows: Iterable[tuple[str, float, int]]) -> dict[str, list[int]]:
    """Return the counts of each status, by slices of the last minute, the oldest first."""
    counts = {status.value: [0] * (RECENT_SECONDS // SLICE_SECONDS) for status in MessageStatus}
    for status, seconds, count in rows:
        counts[MessageStatus(status).value][int(seconds // SLICE_SECONDS)] += count
    return counts
