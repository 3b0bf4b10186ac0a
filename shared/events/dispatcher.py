"""The dependency that dispatches: a drop-in for nameko's ``EventDispatcher``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from nameko.constants import AMQP_SSL_CONFIG_KEY, LOGIN_METHOD_CONFIG_KEY
from nameko.events import EventDispatcher as NamekoEventDispatcher
from nameko.events import get_event_exchange
from sqlalchemy.orm import Session, scoped_session

from shared.contracts import DEFAULT_VERSION, contracts
from shared.errors import LONGEST_DELAY_SECONDS, DispatchError, PayloadError
from shared.events.client import QueueClient
from shared.events.context import Message
from shared.events.relay import Relay
from shared.observe.traces import Dispatching
from shared.settings import Settings, refuse_start
from shared.store.causes import CAUSE
from shared.store.outbox import outbox_name
from shared.tables import OWN_METADATA
from shared.types import (
    LONGEST_DEDUPE_KEY,
    MAX_RETRIES_LIMIT,
    Dedupe,
    Envelope,
    Priority,
    check_json,
    check_name,
    encode_payload,
    new_message_id,
)

_log = logging.getLogger(__name__)


def make_envelope(
    settings: Settings,
    queue: str,
    event_type: str,
    payload: Any,
    *,
    priority: str | None = None,
    delay: float | None = None,
    scheduled_at: datetime | None = None,
    max_retries: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    dedupe_key: str | Dedupe | None = None,
    context: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
) -> Envelope:
    """Check an event and make its envelope.

    :param priority: low, normal, high or urgent.
    :param delay: seconds, at most a year; or
    :param scheduled_at: a time with its time zone. One in the past means now.
    :param max_retries: 0 to 100.
    :param metadata: JSON that travels along; ``version`` names the contract's version.
    :param dedupe_key: 1 to 200 characters: what has the same key is stored once in the
        queue, within 24 hours. Or a key with a scope of its own.
    :param context: of nameko's context data what is JSON, to be carried to the handler.
    :param own: what else the suite itself keeps with the message.
    :raises PayloadError: naming what is wrong with the names, payload or options.
    :raises ContractError: naming the fields that break the contract.
    """
    check_name(queue, "queue")
    check_name(event_type, "event_type")
    kept = _check_metadata(metadata)
    source = settings.source_of(queue)
    if contracts.versions(source, event_type):
        kept.setdefault("version", str(DEFAULT_VERSION))
    else:
        _say_free(source, event_type)
    contracts.check(source, event_type, payload, kept)
    if context or own:
        its = {"context": dict(context)} if context else {}
        kept[OWN_METADATA] = {**its, **(own or {})}
    return Envelope(
        id=new_message_id(),
        queue=queue,
        type=event_type,
        body=encode_payload(payload, settings.max_payload_bytes),
        priority=_check_priority(priority),
        max_retries=_check_max_retries(max_retries),
        scheduled_at=_check_time(scheduled_at),
        delay=_check_delay(delay, scheduled_at),
        metadata=kept,
        dedupe=_check_dedupe_key(settings, queue, dedupe_key),
    )


@cache
def _say_free(source: str, event_type: str) -> None:
    _log.info("no contract for %s of %s: any payload is let pass", event_type, source)


class Dispatch:
    """What a service method calls: ``self.dispatch("user.registered", payload)``."""

    def __init__(
        self,
        client: QueueClient,
        relay: Relay | None,
        source: str,
        context: Mapping[str, Any],
        cause: str | None = None,
    ) -> None:
        self._client = client
        self._relay = relay
        self._source = source
        self._queue = client.settings.queue_of(source)
        self._context = context
        self._own = {CAUSE: cause} if cause else None

    def __call__(
        self, event_type: str, event_data: Any, *, session: Any = None, **options: Any
    ) -> str:
        """Dispatch one event; return its message id once it is stored.

        With a ``dedupe_key`` that was dispatched before, nothing is stored, and the id is
        that of the first message. Together with ``session`` it is always a new one, since
        the key is looked for when the event is relayed.

        :param session: a SQLAlchemy session of the service's own database: the event is
            then part of its transaction, and stored with its commit.
        :param options: ``priority, delay, scheduled_at, max_retries, metadata,
            dedupe_key``, as :func:`make_envelope` takes them.
        :raises PayloadError: when the event or an option cannot be; nothing was stored.
        :raises DispatchError: when it could not be stored; nothing was.
        :raises DispatchUncertainError: when that could not be found out.
        """
        return self.many([(event_type, event_data)], session=session, **options)[0]

    def many(
        self, events: Iterable[Sequence[Any]], *, session: Any = None, **options: Any
    ) -> list[str]:
        """Dispatch several events, all or none, in their order; return their message ids.

        :param events: pairs ``(event_type, payload)``, or triples with a mapping of
            options of their own, which go before those given for all. ``dedupe_key`` is
            one of an event's own.
        """
        with Dispatching(self._queue, self._context) as dispatching:
            context = _sendable({**self._context, **dispatching.headers})
            envelopes = [self._envelope(event, options, context) for event in events]
            if len(envelopes) > 1 and options.get("dedupe_key") is not None:
                raise PayloadError({"dedupe_key": "must be given for each event, not for all"})
            dispatching.note(envelopes)
            return self._store(envelopes, session)

    def _store(self, envelopes: list[Envelope], session: Any) -> list[str]:
        if not envelopes:
            return []
        if session is None:
            return self._client.append(envelopes)
        if self._relay is None:
            raise DispatchError(
                f"{self._source} has no table {outbox_name(self._source)} among those of its "
                "DatabaseSession: see outbox_table()"
            )
        if isinstance(session, scoped_session):
            session = session()
        if not isinstance(session, Session):
            raise PayloadError({"session": f"must be a Session of SQLAlchemy, not {session!r:.80}"})
        self._relay.add(session, envelopes)
        return [envelope.id for envelope in envelopes]

    def _envelope(
        self, event: Sequence[Any], options: dict[str, Any], context: Mapping[str, Any]
    ) -> Envelope:
        event_type, payload, *own = event
        return make_envelope(
            self._client.settings,
            self._queue,
            event_type,
            payload,
            context=context,
            own=self._own,
            **{**options, **(own[0] if own else {})},
        )


class EventDispatcher(NamekoEventDispatcher):
    """Injects :class:`Dispatch`.

    Takes what nameko's takes. How an event is published is not for its options to say,
    since that happens after it is stored, persistently and with confirms; ``declare`` and
    the others hold for ``publisher``, which is nameko's own where the provider is RabbitMQ.

    Example::

        class Shop:
            name = "shop"
            dispatch = EventDispatcher()

            @rpc
            def sell(self, item):
                self.dispatch("item.sold", {"item": item})
    """

    queue_client = QueueClient()
    _relay: Relay | None = None

    @property
    def amqp_uri(self) -> str:
        return self.queue_client.settings.rabbitmq_uri

    def setup(self) -> None:
        settings = self.queue_client.settings
        source = self.container.service_name
        queue = settings.queue_of(source)
        try:
            check_name(queue, "a service that dispatches: its name")
        except PayloadError as exc:
            refuse_start(exc)
        if settings.source_of(queue) != source:
            refuse_start(
                f"QUEUE_SOURCES: {source} and {settings.source_of(queue)} would share the queue "
                f"{queue}; must give each source a queue of its own"
            )
        if settings.provider == "rabbitmq":
            self.publisher = self._make_publisher()

    def _make_publisher(self) -> Any:
        """Make nameko's own publisher, without connecting: past the log, for what is no event."""
        config = self.container.config
        self.exchange = get_event_exchange(self.container.service_name, config)
        return self.publisher_cls(
            self.amqp_uri,
            exchange=self.exchange,
            declare=[*self.declare, self.exchange],
            ssl=config.get(AMQP_SSL_CONFIG_KEY),
            login_method=config.get(LOGIN_METHOD_CONFIG_KEY),
            **{"serializer": self.serializer, **self.options},
        )

    def start(self) -> None:
        self._relay = Relay.of(self.container, self.queue_client)
        if self._relay is not None:
            self._relay_thread = self.container.spawn_managed_thread(
                self._relay.run, identifier="outbox-relay"
            )

    def stop(self) -> None:
        if self._relay is not None:
            self._relay_thread.kill()
            self._relay.finish()

    def get_dependency(self, worker_ctx: Any) -> Dispatch:
        return Dispatch(
            self.queue_client,
            self._relay,
            self.container.service_name,
            worker_ctx.context_data,
            _cause(worker_ctx),
        )


def _cause(worker_ctx: Any) -> str | None:
    """Return the id of the message that is being handled; a batch has no single one."""
    message = getattr(worker_ctx, "message_context", None)
    return message.id if isinstance(message, Message) else None


def _check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise PayloadError({"metadata": "must be an object"})
    if OWN_METADATA in metadata:
        raise PayloadError({f"metadata.{OWN_METADATA}": "is reserved"})
    check_json(metadata, "metadata")
    try:
        json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as exc:
        raise PayloadError({"metadata": f"is not JSON: {exc}"}) from exc
    return dict(metadata)


def _sendable(context: Mapping[str, Any]) -> dict[str, Any]:
    # nameko drops what cannot be a header; what cannot be JSON is dropped here
    return {key: value for key, value in context.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        return False
    return value is not None


def _check_priority(priority: str | None) -> Priority:
    try:
        return Priority.NORMAL if priority is None else Priority(priority)
    except ValueError as exc:
        raise PayloadError({"priority": f"must be one of {', '.join(Priority)}"}) from exc


def _check_max_retries(value: int | None) -> int | None:
    fits = isinstance(value, int) and not isinstance(value, bool)
    if value is None or (fits and 0 <= value <= MAX_RETRIES_LIMIT):
        return value
    raise PayloadError({"max_retries": f"must be a whole number from 0 to {MAX_RETRIES_LIMIT}"})


def _check_time(value: datetime | None) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise PayloadError({"scheduled_at": "must be a time with its time zone"})
    try:
        plain = value.astimezone(UTC).replace(tzinfo=None)
    except OverflowError as exc:
        raise PayloadError({"scheduled_at": "is out of range"}) from exc
    # 2038 is where MySQL's TIMESTAMP ends
    if not 1971 <= plain.year <= 2037:
        raise PayloadError({"scheduled_at": "must lie between 1971 and 2037"})
    return plain


def _check_delay(value: float | None, scheduled_at: datetime | None) -> float | None:
    if value is None:
        return None
    if scheduled_at is not None:
        raise PayloadError({"delay": "cannot be given together with scheduled_at"})
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PayloadError({"delay": "must be a number of seconds"})
    if not 0 <= value <= LONGEST_DELAY_SECONDS:
        raise PayloadError({"delay": f"must be 0 to {LONGEST_DELAY_SECONDS} seconds"})
    return float(value)


def _check_dedupe_key(settings: Settings, queue: str, value: str | Dedupe | None) -> Dedupe | None:
    if value is None:
        return None
    if not settings.log:
        raise PayloadError({"dedupe_key": "needs the message log, and QUEUE_LOG is off"})
    made = value if isinstance(value, Dedupe) else Dedupe(queue, value)
    if not isinstance(made.key, str) or not 1 <= len(made.key) <= LONGEST_DEDUPE_KEY:
        raise PayloadError({"dedupe_key": f"must be 1 to {LONGEST_DEDUPE_KEY} characters"})
    # MySQL and MariaDB take two texts for equal that differ in spaces at their end
    if made.key != made.key.strip() or _NOT_STORABLE.search(made.key):
        said = "must not begin or end with a space, nor hold NUL or half of a character"
        raise PayloadError({"dedupe_key": said})
    return made


_NOT_STORABLE = re.compile("[\x00\ud800-\udfff]")
