"""The values that travel between dispatcher, log, provider and handler.

All of them are frozen: to change one is to make a copy (:func:`dataclasses.replace`).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from shared.errors import PayloadError
from shared.lifecycle import DeliveryStatus

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""What queue names and message types match, whole."""

MAX_JSON_DEPTH = 64
"""Levels of nesting in a payload; what reads it later may well recurse."""

LONGEST_DEDUPE_KEY = 200
"""Characters of what a dispatch is known by."""

MAX_RETRIES_LIMIT = 100
"""The most that ``max_retries`` may be; 100 waits at the cap are 8 hours."""


class Priority(StrEnum):
    """How urgent a message is among those that wait."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
    URGENT = "urgent"

    @property
    def rank(self) -> int:
        """The place in the order of delivery: 0 goes first."""
        return _RANKS[self]


_RANKS = {Priority.URGENT: 0, Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}
_BY_RANK = {rank: priority for priority, rank in _RANKS.items()}


LONGEST_ROUTE_BYTES = 255
"""RabbitMQ's limit for what source, event type and subscriber make together."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """Who wants which events of which queue.

    :param queue: the queue's name, such as ``user-events``.
    :param source: the service that dispatches into it, such as ``auth_events``.
    :param event_type: such as ``user.registered``.
    :param subscriber: ``service.method`` and the like; see the design of names in ARCHITECTURE.md.
    :param reliable: whether events wait for it while no instance runs.
    :param id: its row in ``queue_subscriptions``; 0 before it is registered.
    """

    queue: str
    source: str
    event_type: str
    subscriber: str
    handler_type: str = "service_pool"
    reliable: bool = True
    id: int = 0


class Dedupe(NamedTuple):
    """By what a dispatch is known again, so that it is stored once.

    :param scope: where the key is unique: the queue's name, or what cannot be one.
    :param fingerprint: of what comes with the key, where it has to be the same each time.
    """

    scope: str
    key: str
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Envelope:
    """One dispatched event with all that travels beside its payload.

    :param id: the message id, a UUID made by whoever dispatches.
    :param body: the payload as JSON text.
    :param max_retries: what the dispatch said; ``None`` leaves it to handler and setting.
    :param scheduled_at: naive UTC; not handed to a handler before.
    :param delay: seconds after being stored, by the database's clock; becomes ``scheduled_at``.
    :param created_at: naive UTC, set by the database.
    :param dedupe: what it is known by, where it is to be stored once.
    """

    id: str
    queue: str
    type: str
    body: str
    priority: Priority = Priority.NORMAL
    max_retries: int | None = None
    scheduled_at: datetime | None = None
    delay: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None
    dedupe: Dedupe | None = None

    @property
    def payload(self) -> Any:
        """The payload, decoded anew at each call.

        :raises ValueError: when others sent what is no JSON, or none that Python reads.
        """
        try:
            return json.loads(self.body)
        except RecursionError as exc:
            raise ValueError("nests too deep") from exc

    def ranked(self, rank: int) -> Envelope:
        """Return it with the priority of a rank: that of a delivery may be another."""
        if self.priority.rank == rank:
            return self
        return replace(self, priority=_BY_RANK[rank])


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message on its way to one subscription.

    :param seq: its number in the order of dispatch.
    :param subscription_id: the row of ``queue_subscriptions``.
    :param attempts: attempts burnt so far.
    :param delay: seconds from now until it may be reserved.
    :param token: the newest fencing token that the log knows of; leases begin after it.
    :param to: where it goes, if it was published before, or may have been: to its
        subscription alone. What is new may go to whoever listens.
    """

    seq: int
    subscription_id: int
    message: Envelope
    attempts: int = 0
    delay: float = 0.0
    token: int = 0
    to: Subscription | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """A delivery in the hands of one worker, until it settles or stops renewing.

    A provider that cannot know them leaves the delivery's ``seq`` and the token 0, for
    the log to find: what a dispatcher without a log sent has none.

    :param token: the fencing token: larger with each reservation of the delivery.
    :param redelivered: whether the provider knows that it handed this out before.
    :param handle: the provider's own name for the lease, which no other lease bears.
    """

    delivery: Delivery
    token: int
    redelivered: bool = False
    handle: Any = None

    @property
    def key(self) -> Any:
        """What tells it from the other leases of its holder."""
        return self.delivery.seq if self.handle is None else self.handle


class SettleAction(StrEnum):
    """What a provider is told to do with a leased delivery."""

    ACKNOWLEDGE = "acknowledge"
    RETRY = "retry"
    DEAD_LETTER = "dead_letter"
    RELEASE = "release"


class Settlement(NamedTuple):
    """One leased delivery and what is to become of it.

    :param delay: in seconds, for RETRY.
    :param is_early: it came before its time, so that something of the provider's may be gone.
    """

    lease: Lease
    action: SettleAction
    delay: float = 0.0
    is_early: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in an attempt, as text to be stored.

    :param place: module and function of the last frame of the service's own code.
    """

    type: str
    message: str
    traceback: str = ""
    place: str = ""


class Outcome(NamedTuple):
    """How one attempt ended.

    :param status: COMPLETED, RETRY, FAILED, or PENDING for handed back unburnt.
    :param delay: seconds until the next attempt, for RETRY.
    """

    lease: Lease
    status: DeliveryStatus
    failure: Failure | None = None
    delay: float = 0.0

    def settlement(self) -> Settlement:
        """Return what the provider is told."""
        return Settlement(self.lease, _SETTLES[self.status], self.delay)


_SETTLES = {
    DeliveryStatus.COMPLETED: SettleAction.ACKNOWLEDGE,
    DeliveryStatus.RETRY: SettleAction.RETRY,
    DeliveryStatus.FAILED: SettleAction.DEAD_LETTER,
    DeliveryStatus.PENDING: SettleAction.RELEASE,
}


_COMPACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))

_id_last = (0, 0)


def new_message_id() -> str:
    """Make a UUID version 7 (RFC 9562, method 1 of 6.2): ids of one process sort by age."""
    global _id_last
    millisecond, counter = time.time_ns() // 1_000_000, 0
    if millisecond <= _id_last[0]:
        millisecond, counter = _id_last[0], _id_last[1] + 1
        if counter > 0xFFF:
            millisecond, counter = millisecond + 1, 0
    _id_last = (millisecond, counter)
    low = int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1)
    text = f"{millisecond << 80 | 0x7 << 76 | counter << 64 | 0b10 << 62 | low:032x}"
    # as uuid.UUID writes it, which takes three times as long
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def encode_payload(payload: Any, max_bytes: int) -> str:
    """Return ``payload`` as compact JSON text.

    :raises PayloadError: when it is not JSON, holds NaN, Infinity or NUL, nests deeper
        than :data:`MAX_JSON_DEPTH` or is larger than ``max_bytes`` in UTF-8.
    """
    check_json(payload)
    try:
        body = _COMPACT.encode(payload)
        size = len(body.encode())
    except (TypeError, ValueError, RecursionError) as exc:
        raise PayloadError({"payload": f"is not JSON: {exc}"}) from exc
    if size > max_bytes:
        raise PayloadError({"payload": f"has {size} bytes; at most {max_bytes} are allowed"})
    return body


def shown_payload(body: str) -> Any:
    """Return a payload as it is shown: its text where others sent what is none."""
    try:
        payload = json.loads(body)
        check_json(payload)
    except (ValueError, RecursionError):
        return body
    return payload


def check_json(value: Any, field_name: str = "payload") -> None:
    """Check what JSON alone does not: depth, NUL, and keys that are not text.

    :raises PayloadError: naming ``field_name``.
    """
    level, depth = [value], 0
    while level:
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        depth += bool(containers)
        if depth > MAX_JSON_DEPTH:
            raise PayloadError({field_name: f"nests deeper than {MAX_JSON_DEPTH} levels"})
        if any(isinstance(item, str) and "\x00" in item for item in level):
            raise PayloadError({field_name: "contains a NUL character"})
        level = [inner for container in containers for inner in _members(container, field_name)]


def _members(container: Any, field_name: str) -> list[Any]:
    if not isinstance(container, dict):
        return list(container)
    if not all(isinstance(key, str) for key in container):
        raise PayloadError({field_name: "has a key that is not a string"})
    return [*container, *container.values()]


def check_name(value: Any, field_name: str) -> str:
    """Return ``value`` if it is a queue name or message type.

    :raises PayloadError: naming ``field_name`` and the grammar.
    """
    if isinstance(value, str) and NAME.fullmatch(value):
        return value
    raise PayloadError(
        {field_name: "must match [A-Za-z0-9][A-Za-z0-9._-]* and have 1 to 200 characters"}
    )
