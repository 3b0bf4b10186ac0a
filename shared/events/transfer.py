"""Messages out of a log as JSON Lines, and into one: another one, or the same once more.

What is imported is a new message that names as its ``origin`` the one that was exported. Its id
is made of that one's, and so is its key: importing the same line again stores nothing.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate
from sqlalchemy import Connection, select

from shared.database import Transaction
from shared.errors import PayloadError, by_field
from shared.events.dispatcher import make_envelope
from shared.events.operations import Reader
from shared.events.repairs import Operations
from shared.events.replays import BATCH
from shared.lifecycle import WAITING, DeliveryStatus, MessageStatus
from shared.settings import Settings
from shared.store import dedupe, listing, log, repair, subscriptions, trail
from shared.store.listing import Filters, Place
from shared.store.queries import iso
from shared.store.repair import ORIGIN
from shared.store.trail import Deed
from shared.tables import OWN_METADATA, deliveries, messages
from shared.tables import subscriptions as subscriptions_table
from shared.types import Dedupe, Delivery, Envelope, shown_payload

UNDONE = (*sorted(WAITING), DeliveryStatus.PROCESSING, DeliveryStatus.FAILED)
"""States of deliveries that are not done with."""

SCOPE = "queuectl import"
"""Where the keys of imported messages are unique: no queue has a name with a space."""

_NAMESPACE = uuid.UUID("6f1c0f6e-6f0a-5d0b-9b43-0f2c5b1e7a55")
"""Of the ids of imported messages; any would do, as long as it stays."""

m = messages.c
d = deliveries.c


# --- out


def find(reader: Reader, filters: Filters) -> list[str]:
    """Return the ids of the messages that fit, the oldest first.

    Without any filter those of which something waits or is dead.
    """
    is_any = filters == Filters()
    undone = [MessageStatus(each) for each in UNDONE]
    places: set[Place] = set()
    for status in undone if is_any else [filters.status]:
        wanted = replace(filters, status=status and str(status))
        place: Place | None = None
        while True:
            page = reader.read(listing.find, wanted, place, BATCH)
            places |= {Place(row.created_at, row.id) for row in page.rows}
            place = page.next
            if place is None:
                break
    return [place.id for place in sorted(places)]


def lines(reader: Reader, message_ids: Sequence[str], *, undone: bool) -> Iterator[dict[str, Any]]:
    """Yield messages as what a line has.

    :param undone: without those that were done with meanwhile.
    """
    for start in range(0, len(message_ids), BATCH):
        yield from reader.read(_lines, message_ids[start : start + BATCH], undone)


def _lines(connection: Connection, ids: Sequence[str], undone: bool) -> list[dict[str, Any]]:
    rows = {row.id: row for row in connection.execute(select(messages).where(m.id.in_(ids)))}
    its: dict[str, list[dict[str, str]]] = {each: [] for each in ids}
    found = connection.execute(
        select(d.message_id, d.status, subscriptions_table.c.subscriber)
        .select_from(deliveries.join(subscriptions_table))
        .where(d.message_id.in_(ids))
        .order_by(d.seq)
    )
    for row in found:
        its[row.message_id].append({"subscriber": row.subscriber, "status": row.status})
    return [
        _line(rows[each], its[each])
        for each in ids
        if each in rows and (not undone or _is_undone(rows[each], its[each]))
    ]


def _is_undone(row: Any, its: Sequence[Mapping[str, str]]) -> bool:
    if not its:
        return bool(row.status == MessageStatus.PENDING)
    return any(each["status"] in UNDONE for each in its)


def _line(row: Any, its: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    kept = json.loads(row.metadata or "{}")
    own = kept.pop(OWN_METADATA, {})
    return {
        "messageId": row.id,
        "queueName": row.queue_name,
        "messageType": row.message_type,
        "payload": shown_payload(row.payload),
        "priority": row.priority,
        "maxRetries": own.get("max_retries"),
        "metadata": kept,
        "context": own.get("context"),
        "createdAt": iso(row.created_at),
        "scheduledAt": iso(row.scheduled_at),
        "status": row.status,
        "deliveries": its,
    }


# --- in


class _DeliverySchema(Schema):
    subscriber = fields.Str(required=True)
    status = fields.Str(required=True, validate=validate.OneOf([x.value for x in DeliveryStatus]))


class _LineSchema(Schema):
    message_id = fields.Str(required=True, data_key="messageId", validate=validate.Length(1, 100))
    queue = fields.Str(required=True, data_key="queueName")
    event_type = fields.Str(required=True, data_key="messageType")
    payload = fields.Raw(required=True, allow_none=True)
    priority = fields.Str()
    max_retries = fields.Int(strict=True, allow_none=True, data_key="maxRetries")
    metadata = fields.Dict(keys=fields.Str())
    context = fields.Dict(keys=fields.Str(), allow_none=True)
    scheduled_at = fields.AwareDateTime(format="iso", allow_none=True, data_key="scheduledAt")
    deliveries = fields.List(fields.Nested(_DeliverySchema, unknown=EXCLUDE), load_default=list)


_SCHEMA = _LineSchema(unknown=EXCLUDE)


@dataclass(frozen=True, slots=True)
class Import:
    """What one line asks for.

    :param subscribers: at whom the exported message was not done with.
    """

    envelope: Envelope
    subscribers: frozenset[str]


@dataclass(slots=True)
class Imported:
    """What became of lines."""

    imported: int = 0
    known: int = 0
    """Were imported before."""
    homeless: int = 0
    """To be restored, and nobody subscribes of those who had not done with them."""


def read_line(settings: Settings, text: str) -> Import:
    """Read one line.

    :raises PayloadError: naming what is wrong with it.
    """
    try:
        given = _SCHEMA.load(json.loads(text))
    except ValidationError as exc:
        flat = by_field(exc.messages_dict, "line")
        raise PayloadError({field: " ".join(said) for field, said in flat.items()}) from exc
    except (ValueError, RecursionError) as exc:
        raise PayloadError({"line": f"is not JSON: {exc}"}) from exc
    origin, its = given.pop("message_id"), given.pop("deliveries")
    envelope = make_envelope(
        settings,
        given.pop("queue"),
        given.pop("event_type"),
        given.pop("payload"),
        dedupe_key=Dedupe(SCOPE, origin),
        own={ORIGIN: origin},
        **given,
    )
    undone = frozenset(each["subscriber"] for each in its if each["status"] in UNDONE)
    return Import(replace(envelope, id=str(uuid.uuid5(_NAMESPACE, origin))), undone)


def dispatch(operations: Operations, actor: str, imports: Sequence[Import]) -> Imported:
    """Dispatch messages anew, to whoever subscribes now: all or none.

    :raises DispatchError: when they were not stored.
    """
    envelopes = [each.envelope for each in imports]
    before = operations.reader.read(_stored, [each.id for each in envelopes])
    new = _once([each for each in envelopes if each.id not in before])
    ids = operations.client.append(new) if new else []
    count = sum(given.id == stored for given, stored in zip(new, ids, strict=True))
    if count:
        operations.note(_deed(actor, count, "dispatched"))
    return Imported(count, len(imports) - count)


def restore(operations: Operations, actor: str, imports: Sequence[Import]) -> Imported:
    """Store messages for those alone who had not done with them: all or none.

    :raises QueueError: when they were not stored.
    """

    def step(tx: Transaction) -> tuple[Imported, list[Delivery]]:
        wanted = {each.envelope.id: each for each in imports}
        before = {*log.stored_ids(tx, list(wanted))}
        homes = _homes(tx.connection, wanted)
        its = [wanted[each].envelope for each in wanted if each not in before and homes[each]]
        firsts = dedupe.known(tx, its)
        stored = [each for each in its if each.id not in firsts]
        limit = operations.client.settings.retries.limit
        new = [x for each in stored for x in repair.restore(tx, each, homes[each.id], limit)]
        if stored:
            trail.note(tx, _deed(actor, len(stored), "restored"))
        homeless = sum(not homes[each] for each in wanted if each not in before)
        known = len(imports) - homeless - len(stored)
        return Imported(len(stored), known, homeless), new

    result: Imported = operations.client.call(step)
    return result


def _stored(connection: Connection, ids: Sequence[str]) -> set[str]:
    return set(connection.execute(select(m.id).where(m.id.in_(ids))).scalars())


def _once(envelopes: Sequence[Envelope]) -> list[Envelope]:
    return list({each.id: each for each in envelopes}.values())


def _homes(connection: Connection, wanted: Mapping[str, Import]) -> dict[str, list[int]]:
    """Return for each message the subscriptions that it is to be restored for."""
    known = {
        (each.queue, each.event_type, each.subscriber): each.id
        for each in subscriptions.active(connection)
    }
    return {
        message_id: sorted(
            known[name]
            for subscriber in its.subscribers
            if (name := (its.envelope.queue, its.envelope.type, subscriber)) in known
        )
        for message_id, its in wanted.items()
    }


def _deed(actor: str, count: int, how: str) -> Deed:
    return Deed(actor, "import", "messages of a file", {"messages": count, "how": how})
