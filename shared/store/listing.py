"""Lists of messages, newest first, with filters, in pages that stay as they are.

What is looked through goes by the index of queue, status and time: for each queue and
status, what comes next. Whatever else is asked for is looked for in those messages, of which
a call looks through a bounded number; where it ends before it has a page, the next call goes
on from there.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import merge
from itertools import islice, product
from typing import Any, NamedTuple, NoReturn

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Select,
    and_,
    bindparam,
    exists,
    func,
    literal,
    or_,
    select,
)

from shared.database import Transaction
from shared.errors import PayloadError
from shared.lifecycle import DeliveryStatus, MessageStatus
from shared.statements import Prepared
from shared.store.queries import iso
from shared.tables import deliveries, messages, subscriptions

m = messages.c
d = deliveries.c

MOST_LISTED = 100
"""Messages of one page."""

MOST_SEARCHED = 500
"""Messages that one call looks through for what no index knows; a payload may have a megabyte."""

CHUNK = 250
"""Messages that are looked through at once, so that a page that is full soon is there soon."""

FEW, MANY = 60, 100
"""Messages that are fetched at once of each queue and status, at first and then."""

WITH_ERROR = (DeliveryStatus.FAILED, DeliveryStatus.RETRY)
"""Deliveries whose last attempt failed."""

PAYLOAD_PATH = re.compile(r"\$(?:\.[A-Za-z_][A-Za-z0-9_]*|\[[0-9]{1,6}\]){1,64}")
"""What a path into a payload matches, whole: such as ``$.user.email`` or ``$.items[0].id``."""

ANY = object()
"""Stands for a value that is not looked for: ``None`` is one that may be."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Which messages are wanted; all of it has to fit.

    :param subscriber: one of the deliveries is for it.
    :param exception_type: one of the deliveries failed by it last, and was not completed
        since; where there is a ``subscriber`` it is that one.
    :param created_from: naive UTC, itself included.
    :param created_to: naive UTC, itself not included.
    :param text: what the payload contains, as it is written, large and small letters apart.
    :param payload_path: such as ``$.user.email``: where the payload has ``payload_value``.
    """

    queue: str | None = None
    message_type: str | None = None
    status: str | None = None
    subscriber: str | None = None
    priority: str | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    exception_type: str | None = None
    text: str | None = None
    payload_path: str | None = None
    payload_value: Any = ANY


class Place(NamedTuple):
    """Where a page ends."""

    created_at: datetime
    id: str

    def cursor(self) -> str:
        """Return it as text that says nothing to who gets it."""
        text = json.dumps([self.created_at.isoformat(), self.id])
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


FIRST = datetime(1970, 1, 2)
LAST = Place(datetime(2037, 12, 31), "~")
"""Before and after all messages: MySQL's TIMESTAMP knows no other time."""


def place_of(cursor: str) -> Place:
    """Return the place that a cursor stands for.

    :raises PayloadError: when it is none of ours.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        created_at, message_id = json.loads(base64.urlsafe_b64decode(padded))
        place = Place(datetime.fromisoformat(created_at).replace(tzinfo=None), str(message_id))
        # half a character is none that a database takes
        place.id.encode()
        return place
    except (ValueError, TypeError) as exc:
        raise PayloadError({"cursor": "must be the nextCursor of an answer"}) from exc


class Page(NamedTuple):
    """Messages as rows, newest first, and where to go on; ``None`` at the end."""

    rows: list[Any]
    next: Place | None
    searched: int


def list_messages(
    connection: Connection, filters: Filters, cursor: str | None = None, limit: int = 50
) -> dict[str, Any]:
    """List messages as ``GET /queue/messages`` answers.

    :raises PayloadError: for a cursor that is none of ours.
    """
    page = find(connection, filters, place_of(cursor) if cursor else None, limit)
    return {
        "messages": [listed(row) for row in page.rows],
        "nextCursor": page.next.cursor() if page.next else None,
    }


def find(connection: Connection, filters: Filters, after: Place | None, limit: int) -> Page:
    """Find up to ``limit`` messages that come after a place."""
    conditions = _conditions(connection, filters)
    walk = _walk(connection, filters, after)
    most = MOST_SEARCHED if conditions else limit + 1
    rows: list[Any] = []
    searched = 0
    place = after
    while searched < most and len(rows) <= limit:
        places = list(islice(walk, min(CHUNK, most - searched)))
        if not places:
            place = None
            break
        rows += connection.execute(_details(places).where(*conditions))
        searched, place = searched + len(places), places[-1]
    if len(rows) > limit:
        place = Place(rows[limit - 1].created_at, rows[limit - 1].id)
    return Page(rows[:limit], place, searched)


def listed(row: Any) -> dict[str, Any]:
    """Return what a list shows of a message: all but what may be long."""
    return {
        "messageId": row.id,
        "queueName": row.queue_name,
        "messageType": row.message_type,
        "status": row.status,
        "priority": row.priority,
        "retryCount": row.retry_count,
        "maxRetries": row.max_retries,
        "createdAt": iso(row.created_at),
        "scheduledAt": iso(row.scheduled_at),
        "processedAt": iso(row.processed_at),
        "errorMessage": row.error_message,
    }


LISTED_COLUMNS = (
    m.id,
    m.queue_name,
    m.message_type,
    m.status,
    m.priority,
    m.retry_count,
    m.max_retries,
    m.created_at,
    m.scheduled_at,
    m.processed_at,
    m.error_message,
)


def scalar(text: str) -> Any:
    """Return the JSON scalar that a text is, or the text."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    is_odd = isinstance(value, float) and math.isinf(value)
    is_large = isinstance(value, int) and not -(2**63) <= value < 2**63
    return text if is_odd or is_large or isinstance(value, dict | list) else value


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


# --- what is looked through


_NEXT = Prepared(
    select(m.id, m.created_at)
    .where(
        m.queue_name == bindparam("queue"),
        m.status == bindparam("status"),
        m.created_at >= bindparam("since"),
        # spelled so that the index is entered at the right time
        m.created_at <= bindparam("upto"),
        or_(m.created_at < bindparam("upto"), m.id < bindparam("id")),
    )
    .order_by(m.created_at.desc(), m.id.desc())
    .limit(bindparam("limit", type_=Integer))
)


def _walk(connection: Connection, filters: Filters, after: Place | None) -> Iterator[Place]:
    """Yield places, the newest first, by queue, status and time alone."""
    queues = [filters.queue] if filters.queue else queues_with_messages(connection)
    start = Place(filters.created_to, "") if filters.created_to else LAST
    start = min(start, after) if after else start
    branches = [
        _branch(
            connection,
            {"queue": queue, "status": status, "since": filters.created_from or FIRST},
            start,
        )
        for queue, status in product(queues, _statuses(filters))
    ]
    return merge(*branches, reverse=True)


def _branch(connection: Connection, its: Mapping[str, Any], place: Place) -> Iterator[Place]:
    """Yield the places of one queue and status, asking for more of them as they are used up."""
    tx = Transaction(connection, LAST.created_at)
    limit = FEW
    while True:
        values = {**its, "upto": place.created_at, "id": place.id, "limit": limit}
        rows = _NEXT.fetch(tx, values)
        for row in rows:
            place = Place(row.created_at, row.id)
            yield place
        if len(rows) < limit:
            return
        limit = MANY


_NEXT_QUEUE = Prepared(
    select(m.queue_name).where(m.queue_name > bindparam("name")).order_by(m.queue_name).limit(1)
)


def queues(connection: Connection) -> list[str]:
    """Return all queues that have a message or a subscription."""
    names = connection.execute(select(subscriptions.c.queue_name).distinct()).scalars()
    return sorted({*names, *queues_with_messages(connection)})


def queues_with_messages(connection: Connection) -> list[str]:
    """Return all queues that have messages, with one look into the index for each."""
    tx = Transaction(connection, LAST.created_at)
    found: list[str] = []
    while rows := _NEXT_QUEUE.fetch(tx, {"name": found[-1] if found else ""}):
        found.append(rows[0].queue_name)
    return found


def _statuses(filters: Filters) -> Sequence[str]:
    if filters.status is not None:
        return [filters.status]
    if filters.exception_type is not None:
        return [MessageStatus(status) for status in WITH_ERROR]
    return list(MessageStatus)


# --- what is looked for


def _details(places: Sequence[Place]) -> Select[Any]:
    its = select(*LISTED_COLUMNS).where(m.id.in_([place.id for place in places]))
    return its.order_by(m.created_at.desc(), m.id.desc())


def _conditions(connection: Connection, filters: Filters) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if filters.message_type is not None:
        conditions.append(m.message_type == filters.message_type)
    if filters.priority is not None:
        conditions.append(m.priority == filters.priority)
    if filters.subscriber is not None or filters.exception_type is not None:
        conditions.append(exists().where(d.message_id == m.id, *of_deliveries(filters)))
    if filters.text is not None:
        # as it is written in JSON: a quote, a backslash or a line break has its escape there
        written = json.dumps(filters.text, ensure_ascii=False)[1:-1]
        conditions.append(func.instr(m.payload, written) > 0)
    if filters.payload_path is not None:
        conditions.append(_has_value(connection, filters.payload_path, filters.payload_value))
    return conditions


def of_deliveries(filters: Filters) -> list[ColumnElement[bool]]:
    """Return what the filters say of deliveries."""
    conditions: list[ColumnElement[bool]] = []
    if filters.subscriber is not None:
        named = select(subscriptions.c.id).where(subscriptions.c.subscriber == filters.subscriber)
        conditions.append(d.subscription_id.in_(named))
    if filters.exception_type is not None:
        conditions.append(d.error_type == filters.exception_type)
        conditions.append(d.status.in_(WITH_ERROR))
    return conditions


def _has_value(connection: Connection, path: str, value: Any) -> ColumnElement[bool]:
    """Return the SQL for whether the payload has a value, of its own type, at a path."""
    found: Any = func.json_extract(m.payload, path)
    is_sqlite = connection.dialect.name == "sqlite"
    kind: Any = func.json_type(m.payload, path) if is_sqlite else func.json_type(found)
    if not is_sqlite:
        found = func.json_unquote(found)
    match value:
        case None:
            return kind.in_(["null", "NULL"])
        case bool() if is_sqlite:
            return kind == json.dumps(value)
        case bool():
            return and_(kind == "BOOLEAN", found == json.dumps(value))
        case int() | float():
            return and_(kind.in_(_NUMBERS), found + literal(0) == literal(value))
    return and_(kind.in_(["text", "STRING"]), found == literal(value))


_NUMBERS = ["integer", "real", "INTEGER", "UNSIGNED INTEGER", "DOUBLE", "DECIMAL"]
"""What SQLite, MySQL and MariaDB call a number in JSON."""
