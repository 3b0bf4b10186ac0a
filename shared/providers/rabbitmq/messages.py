"""Deliveries as AMQP messages: the bare payload, and all that is ours in headers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import amqp

from shared.providers.rabbitmq.layout import LONGEST_NAME_BYTES, OUR_PREFIX
from shared.tables import OWN_METADATA
from shared.types import (
    MAX_JSON_DEPTH,
    Delivery,
    Envelope,
    Priority,
    SettleAction,
    Settlement,
    Subscription,
    check_json,
)

CONTEXT_PREFIX = "nameko."
"""What the headers begin with that hold the context of a worker, as nameko sends it."""

MOST_METADATA_BYTES = 1 << 16
"""RabbitMQ's frames have 128 KB, and a header is one frame with whatever else is in it."""

_OF_A_PLACE = ("x-death", "x-first-death", "x-last-death", "x-delivery-count", "CC", "BCC")
"""Headers that say where a message has been, or is to go; a copy has a way of its own."""

_NO_CONTEXT = (OUR_PREFIX, *_OF_A_PLACE)

_FOR_ONE = ("deliveries", "seq", "attempts", "to", "delay-")
"""What headers of ours begin with that a copy replaces, after their prefix."""


@dataclass(slots=True)
class Publication:
    """A message on its way to RabbitMQ, and the deliveries that it is."""

    message: Any
    exchange: str
    routing_key: str
    deliveries: list[Delivery]
    is_new: bool = False
    """For whoever listens."""
    source: str = ""
    """The exchange that it goes to after its delay."""
    level: int = -1
    """The first delay queue that it goes through."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.exchange, self.routing_key, self.message.properties.get("message_id") or ""

    def number(self) -> None:
        """Say which delivery it is for each subscription."""
        if self.is_new:
            numbers = {str(x.subscription_id): x.seq for x in self.deliveries if x.seq}
            self.message.properties["application_headers"][f"{OUR_PREFIX}deliveries"] = numbers


@dataclass(slots=True)
class Consumer:
    """What has one queue's messages pushed to us."""

    tag: str
    subscription_id: int | None
    """``None`` for what is not about a subscription, but about pauses."""
    queue: str
    window: int
    is_anchor: bool = False
    """It keeps a queue that goes with its last consumer, and holds one message at most."""
    unsettled: int = 0
    is_cancelled: bool = False


@dataclass(slots=True)
class Held:
    """A message that RabbitMQ handed to us and we have not settled yet."""

    handle: tuple[int, int]
    subscription_id: int
    queue: str
    message: Any
    is_redelivered: bool
    consumer: Consumer | None = None
    """What pushed it; ``None`` if it was asked for."""

    @property
    def tag(self) -> int:
        return self.handle[1]

    @property
    def priority(self) -> int:
        return self.message.properties.get("priority") or 0


def by_priority(held: Held) -> tuple[int, bool, int]:
    """Sort what one queue gave in the order that it has there."""
    return -held.priority, *by_arrival(held)


def by_arrival(held: Held) -> tuple[bool, int]:
    """Sort what a queue without priorities gave."""
    # what was pushed was ahead of what had to be asked for
    return held.consumer is None, held.tag


def count_of(found: Iterable[Held], subscription_id: int) -> int:
    return sum(held.subscription_id == subscription_id for held in found)


@dataclass(slots=True)
class Moves:
    """Settlements of what is really held, and what is to be done about each."""

    acknowledged: list[Held] = field(default_factory=list)
    released: list[Held] = field(default_factory=list)
    retries: list[tuple[Held, Settlement]] = field(default_factory=list)
    dead: list[tuple[Held, Settlement]] = field(default_factory=list)

    def add(self, held: Held, settlement: Settlement) -> None:
        match settlement.action:
            case SettleAction.ACKNOWLEDGE:
                self.acknowledged.append(held)
            case SettleAction.RELEASE:
                self.released.append(held)
            case SettleAction.RETRY:
                self.retries.append((held, settlement))
            case SettleAction.DEAD_LETTER:
                self.dead.append((held, settlement))

    def without(self, others: Iterable[tuple[Held, Settlement]]) -> list[tuple[Held, SettleAction]]:
        """Return what to tell RabbitMQ of those that are not among ``others``."""
        left_out = {held.handle for held, _ in others}
        return [
            *[(held, SettleAction.ACKNOWLEDGE) for held in self.acknowledged],
            *[(held, SettleAction.RELEASE) for held in self.released],
            *[(x, SettleAction.DEAD_LETTER) for x, _ in self.dead if x.handle not in left_out],
        ]


def encoded(envelope: Envelope) -> Any:
    """Return an envelope as a message: the bare payload, and all else in headers."""
    created_at = envelope.created_at
    return amqp.Message(
        envelope.body.encode(),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        priority=_to_amqp(envelope.priority),
        message_id=envelope.id,
        type=envelope.type,
        timestamp=int(created_at.replace(tzinfo=UTC).timestamp()) if created_at else None,
        application_headers=_headers_of(envelope),
    )


def has_short_metadata(envelope: Envelope) -> bool:
    """Say whether the metadata of a message fits into its header, which is one frame."""
    if not envelope.metadata:
        return True
    return len(json.dumps(envelope.metadata)) <= MOST_METADATA_BYTES


def _headers_of(envelope: Envelope) -> dict[str, Any]:
    metadata, context = _parted(envelope.metadata)
    headers = {f"{OUR_PREFIX}name": envelope.queue, **context}
    if metadata:
        headers[f"{OUR_PREFIX}metadata"] = json.dumps(metadata)
    if envelope.max_retries is not None:
        headers[f"{OUR_PREFIX}max-retries"] = envelope.max_retries
    if envelope.scheduled_at is not None:
        headers[f"{OUR_PREFIX}scheduled-at"] = envelope.scheduled_at.isoformat()
    if envelope.created_at is not None:
        headers[f"{OUR_PREFIX}created-at"] = envelope.created_at.isoformat()
    return headers


def _parted(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part metadata into what is ours alone, and nameko's context as headers."""
    if OWN_METADATA not in metadata:
        return dict(metadata), {}
    own = dict(metadata[OWN_METADATA])
    context = own.pop("context", {})
    sent = {CONTEXT_PREFIX + key: value for key, value in context.items() if _fits(key, value)}
    # what AMQP has no type for travels as JSON
    if kept := {key: value for key, value in context.items() if CONTEXT_PREFIX + key not in sent}:
        own["context"] = kept
    rest = {key: value for key, value in metadata.items() if key != OWN_METADATA}
    return {**rest, OWN_METADATA: own} if own else rest, sent


def _fits(key: str, value: Any) -> bool:
    """Say whether a value may be a header, and comes back as the same."""
    if len(f"{CONTEXT_PREFIX}{key}".encode()) > LONGEST_NAME_BYTES:
        return False
    if isinstance(value, list | tuple):
        return all(_fits("", each) for each in value)
    if isinstance(value, dict):
        return all(_fits(*each) for each in value.items())
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, str | float)


def numbers_of(delivery: Delivery) -> dict[str, Any]:
    return {f"{OUR_PREFIX}seq": delivery.seq, f"{OUR_PREFIX}attempts": delivery.attempts}


def copied(held: Held, delivery: Delivery, attempts: int) -> Any:
    """Return a copy of a message for one subscription, whoever made it."""
    given = held.message.properties
    headers = {
        key: value
        for key, value in (given.get("application_headers") or {}).items()
        # py-amqp leaves a key as bytes that is no text
        if isinstance(key, str)
        and not key.startswith(_OF_A_PLACE + tuple(OUR_PREFIX + each for each in _FOR_ONE))
    }
    headers |= _headers_of(delivery.message) if delivery.message.id else {}
    headers |= numbers_of(delivery) | {f"{OUR_PREFIX}attempts": attempts}
    # the one would end its wait, the other may be somebody whom we are not
    kept = {key: x for key, x in given.items() if key not in ("expiration", "user_id")}
    made = amqp.Message(held.message.body, **{**kept, "delivery_mode": 2})
    if delivery.message.id:
        made.properties |= {"message_id": delivery.message.id, "type": delivery.message.type}
    made.properties["application_headers"] = headers
    return made


def delivery_of(held: Held, subscription: Subscription) -> Delivery:
    headers = held.message.properties.get("application_headers") or {}
    numbers = headers.get(f"{OUR_PREFIX}deliveries")
    seq = headers.get(f"{OUR_PREFIX}seq")
    if seq is None and isinstance(numbers, dict):
        seq = numbers.get(str(subscription.id))
    return Delivery(
        _whole(seq),
        subscription.id,
        _envelope(held, subscription, headers),
        attempts=_whole(headers.get(f"{OUR_PREFIX}attempts")),
    )


def seqs_of(message: Any) -> list[int]:
    """Return the deliveries that a message is; none of one that others sent."""
    headers = message.properties.get("application_headers") or {}
    numbers = headers.get(f"{OUR_PREFIX}deliveries")
    found = [headers.get(f"{OUR_PREFIX}seq")]
    if found[0] is None and isinstance(numbers, dict):
        found = list(numbers.values())
    return [seq for seq in map(_whole, found) if seq]


def _envelope(held: Held, subscription: Subscription, headers: Mapping[str, Any]) -> Envelope:
    properties = held.message.properties
    is_ours = f"{OUR_PREFIX}name" in headers
    max_retries = headers.get(f"{OUR_PREFIX}max-retries")
    return Envelope(
        id=str(properties.get("message_id") or "") if is_ours else "",
        queue=subscription.queue,
        type=subscription.event_type,
        body=text_of(held.message.body),
        priority=_from_amqp(held.priority) if is_ours else Priority.NORMAL,
        max_retries=None if max_retries is None else _whole(max_retries),
        scheduled_at=_time(headers.get(f"{OUR_PREFIX}scheduled-at")),
        metadata=_metadata(headers),
        created_at=_time(headers.get(f"{OUR_PREFIX}created-at")),
    )


def _metadata(headers: Mapping[str, Any]) -> dict[str, Any]:
    made = _parsed(headers.get(f"{OUR_PREFIX}metadata"))
    # as nameko takes it: with whatever else there is
    context = {
        key.removeprefix(CONTEXT_PREFIX): value
        for key, value in headers.items()
        if isinstance(key, str) and not key.startswith(_NO_CONTEXT) and value is not None
    }
    joined = _joined(made, context)
    if _is_json(joined):
        return joined
    # what is no JSON cannot be stored
    its = {key: value for key, value in context.items() if _is_json(value)}
    return _joined(made if _is_json(made) else {}, its)


def _joined(made: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata, and with it the context that came in headers of its own."""
    rest = {key: value for key, value in made.items() if key != OWN_METADATA}
    own = _object(made.get(OWN_METADATA))
    if context:
        own = {**own, "context": {**_object(own.get("context")), **context}}
    return {**rest, OWN_METADATA: own} if own else rest


def _is_json(value: Any) -> bool:
    try:
        text = _STRICT.encode(value)
        text.encode()
        # there may be more of these than are meant, and never less: most have neither
        if "\\u0000" in text or text.count("[") + text.count("{") >= MAX_JSON_DEPTH:
            check_json({"": value})
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def parsed_object(text: Any) -> dict[str, Any]:
    """Return an object that is JSON; an empty one, where others sent what is none."""
    found = _parsed(text)
    return found if _is_json(found) else {}


def _parsed(text: Any) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return _object(json.loads(text))
    return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _time(text: Any) -> datetime | None:
    with contextlib.suppress(ValueError, TypeError):
        return datetime.fromisoformat(text)
    return None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def text_of(body: Any) -> str:
    return body if isinstance(body, str) else bytes(body).decode(errors="replace")


def _to_amqp(priority: Priority) -> int:
    return Priority.LOW.rank - priority.rank


def _from_amqp(value: int) -> Priority:
    return _PRIORITIES.get(value, Priority.NORMAL)


_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False)

_PRIORITIES = {_to_amqp(priority): priority for priority in Priority}
