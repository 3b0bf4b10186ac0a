"""Queues declared anew with other arguments, and nothing lost: with priorities, and back.

RabbitMQ changes no arguments of a queue that is there. So what it has goes into a queue
beside it, it is deleted and declared anew, and all goes back. New events go to the one
that is bound meanwhile; each is bound before the other is unbound, and what came to both
is told by its number and kept once. What is half done is seen by the queue beside, and
done to its end by whoever comes next.

While that lasts, our own instances have the subscription paused, and it is waited for
what they have in hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import Any

import amqp

from shared.errors import ProviderError, ProviderUnavailableError, QueueNotFoundError
from shared.native import sleep
from shared.providers.rabbitmq.driver import (
    ANSWER_SECONDS,
    DRIVER_ERRORS,
    Blocked,
    Connection,
    ConsumingChannel,
    connected,
    meaning_of,
    targets_of,
)
from shared.providers.rabbitmq.layout import (
    DUE_QUEUES,
    OUR_PREFIX,
    Layout,
    beside,
    exchange_name,
    queue_name,
)
from shared.providers.rabbitmq.messages import Publication
from shared.providers.rabbitmq.sides import News, Outlet
from shared.settings import Settings
from shared.types import SettleAction, Subscription

LISTEN_SECONDS = 1.0
"""How long an instance may take to hear that a queue is paused."""

STRANGER_SECONDS = 3.0
"""How long consumers may take to leave a paused queue; who stays is none of ours."""

BUSY_SECONDS = 60.0
"""How long it is waited for what instances have in hand."""

ROUTED_SECONDS = 0.2
"""How long what was routed before an unbinding may be on its way to the queue."""

LOCK_SECONDS = 5.0
"""How long it is waited for another one that is at work."""

LOOK_SECONDS = 0.1

MOST_TRIES = 20
"""How often a queue is emptied that gets messages by its name meanwhile."""

MOST_AT_ONCE = 50
"""Messages that are moved together; each is in memory."""

MOST_REMEMBERED = 10_000
"""Messages that the next ones are compared with, so that none is there twice."""

_PAUSED_BY_US = {"x-max-length": 0}
"""What tells our pause from an operator's."""

_LOCK = "nameko.redeclaration"

_SIGN = {"x-expires": 600_000}

_OF_A_PLACE = ("CC", "BCC")

_Key = tuple[str, Any]
"""The id of a message, and how often it was tried."""


class Kind(StrEnum):
    """How a queue was declared."""

    PLAIN = "plain"
    CLASSIC = "classic"
    QUORUM = "quorum"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Report:
    """What was done about a queue.

    :param messages: how many waited in it.
    """

    queue: str
    messages: int
    what: str
    is_failure: bool = False


class Redeclaration:
    """Declares queues anew, as ours or as plain nameko's.

    :param is_upgrade: as ours; else as plain nameko's.
    :param is_forced: even where somebody consumes who is none of ours. RabbitMQ ends that,
        and what they have in hand and do not finish is lost.
    :param is_dry: only say what would be done.
    :raises ProviderError: as each method may, when RabbitMQ refuses or does not answer.
    """

    def __init__(
        self, settings: Settings, *, is_upgrade: bool, is_forced: bool = False, is_dry: bool = False
    ) -> None:
        self._targets = targets_of(settings.rabbitmq_uri)
        self._layout = Layout(settings.rabbitmq_queue_type == "quorum")
        self._wanted = self._ours if is_upgrade else Kind.PLAIN
        self._is_forced = is_forced
        self._is_dry = is_dry
        with self._translated():
            connection = connected(self._targets, "declares queues anew")
            self._outlet = Outlet(connection)
            self._outlet.open()
            self._reader = _Reader(connection)
            self._lock()

    def close(self) -> None:
        """Let go of the connection."""
        self._outlet.connection.end()

    def subscription_of(self, name: str, source: str | None = None) -> Subscription:
        """Return the subscription that a queue's name stands for.

        :param source: the service whose events they are; else the one that the name can
            mean whose exchange is there.
        :raises QueueNotFoundError: when there is none, or more than one.
        """
        meant = [each for each in _meant_by(name) if source in (None, each.source)]
        if source is None:
            with self._translated():
                meant = [each for each in meant if self._has_exchange(each.source)]
        if len(meant) == 1:
            return meant[0]
        if meant:
            said = ", ".join(each.source for each in meant)
            raise QueueNotFoundError(f"{name}: events of which source: {said}?")
        raise QueueNotFoundError(f"{name}: no queue of events whose source is known")

    def do(self, subscription: Subscription) -> Report:
        """Have the queue of a subscription declared as wanted; what is so already stays."""
        name = queue_name(subscription)
        if not subscription.reliable:
            return Report(name, 0, "left: it goes with the last of its consumers")
        with self._translated():
            return self._do(subscription, name)

    def _do(self, subscription: Subscription, name: str) -> Report:
        kind, is_begun = self._kind(subscription), self._count(beside(name, "moving")) is not None
        waiting = (self._count(name) or 0) + (self._count(beside(name, "moving")) or 0)
        if kind is None and not is_begun:
            return Report(name, 0, "not there")
        if kind is Kind.FOREIGN:
            said = "refused: its arguments are neither ours nor plain nameko's"
            return Report(name, waiting, said, is_failure=True)
        if kind is self._wanted and not is_begun:
            return self._confirm(subscription, name, waiting)
        if self._is_dry:
            return Report(name, waiting, f"to be {self._verb}")
        return self._change(subscription, name, kind)

    def _confirm(self, subscription: Subscription, name: str, waiting: int) -> Report:
        if not self._is_dry:
            self._declare_places(subscription, name)
            self._bind_alone(subscription, name)
            self._end_pause(name)
        return Report(name, waiting, f"is {self._verb} already")

    @property
    def _verb(self) -> str:
        return "downgraded" if self._wanted is Kind.PLAIN else "upgraded"

    # --- the way

    def _change(self, subscription: Subscription, name: str, kind: Kind | None) -> Report:
        self._pause(name)
        if kind not in (None, self._wanted):
            refusal = self._wait_for_consumers(name)
            if not refusal and not self._replace(subscription, name, is_quorum=kind is Kind.QUORUM):
                refusal = "somebody consumes from it, or declares it again"
            if refusal:
                return self._refuse(name, refusal)
        moved = self._refill(subscription, name)
        self._end_pause(name)
        return Report(name, moved, self._verb)

    def _refuse(self, name: str, why: str) -> Report:
        waiting = self._count(name) or 0
        if self._count(beside(name, "moving")) is None:
            self._end_pause(name)
            return Report(name, waiting, f"refused: {why}", is_failure=True)
        said = f"refused: {why}; it is half done and paused until this is run again"
        return Report(name, waiting, said, is_failure=True)

    def _replace(self, subscription: Subscription, name: str, *, is_quorum: bool) -> bool:
        """Have all that a queue has in the one beside it, and declare it anew.

        :returns: whether that could be done.
        """
        rest = beside(name, "moving")
        self._outlet.declare_exchange(exchange_name(subscription.source))
        self._outlet.declare_due()
        self._declare(rest, {"x-queue-type": "classic"})
        # most of it goes while new events still come to where they came before
        self._move(name, rest)
        self._bind(rest, subscription, name)
        self._unbind(name, subscription, name)
        sleep(ROUTED_SECONDS)
        for _ in range(MOST_TRIES):
            self._move(name, rest)
            if self._declare_anew(subscription, name, is_quorum=is_quorum):
                return True
            if self._consumers(name) and not self._is_forced:
                break
        return False

    def _declare_anew(self, subscription: Subscription, name: str, *, is_quorum: bool) -> bool:
        """Delete an empty queue and declare it again; return False where that is refused."""
        # RabbitMQ itself can see to it for classic queues alone
        guards = {"if_empty": not is_quorum, "if_unused": not (is_quorum or self._is_forced)}
        if is_quorum and (self._count(name) or (self._consumers(name) and not self._is_forced)):
            return False
        try:
            # both are sent together: nobody comes between
            self._outlet.scratch.queue_delete(name, nowait=True, **guards)
            self._declare(name, self._arguments(subscription, self._wanted))
        except amqp.PreconditionFailed:
            return False
        return True

    def _refill(self, subscription: Subscription, name: str) -> int:
        """Have all back from the queue beside, and that deleted; return how many it were."""
        rest, arriving = beside(name, "moving"), beside(name, "arriving")
        self._declare(name, self._arguments(subscription, self._wanted))
        self._declare_places(subscription, name)
        memory = _Memory()
        if self._count(arriving) is not None:
            self._learn(arriving, memory)
        moved = self._move(rest, name, memory)
        self._bind_witnessed(subscription, name)
        self._unbind(rest, subscription, name)
        sleep(ROUTED_SECONDS)
        for _ in range(MOST_TRIES):
            self._learn(arriving, memory)
            moved += self._move(rest, name, memory)
            with contextlib.suppress(amqp.PreconditionFailed):
                self._outlet.scratch.queue_delete(rest, if_empty=True)
                self._bind_alone(subscription, name)
                return moved
        raise ProviderError(f"{rest}: does not get empty")

    def _learn(self, arriving: str, memory: _Memory) -> None:
        """Have it remembered what arrived by itself; in hand, it comes again after a crash."""
        while taken := self._reader.take(arriving, MOST_AT_ONCE):
            memory.add(each.message for each in taken)

    def _move(self, source: str, target: str, memory: _Memory | None = None) -> int:
        """Move all that a queue has, in its order; return how many messages it were."""
        moved = 0
        while taken := self._reader.take(source, MOST_AT_ONCE):
            new = [each for each in taken if memory is None or memory.is_new(each.message)]
            copies = [Publication(_copied(each.message), "", target, []) for each in new]
            if copies and self._outlet.send(copies):
                raise ProviderError(f"{target}: was deleted meanwhile")
            self._reader.acknowledge(taken)
            moved += len(new)
        return moved

    def _lock(self) -> None:
        """See that nobody else is about it; a connection that was lost may last a moment."""
        deadline = monotonic() + LOCK_SECONDS
        while True:
            try:
                self._outlet.scratch.queue_declare(_LOCK, exclusive=True, auto_delete=True)
            except amqp.ResourceLocked:
                if monotonic() > deadline:
                    said = "another one declares queues anew there"
                    raise ProviderError(f"RabbitMQ at {self._where}: {said}") from None
                self._wait(LOOK_SECONDS)
            else:
                return

    # --- those who consume

    def _pause(self, name: str) -> None:
        """Have our instances stop, and show who has something in hand."""
        with contextlib.suppress(amqp.PreconditionFailed):  # an operator paused it
            self._declare(beside(name, "paused"), _PAUSED_BY_US)
        sign = beside(name, "busy")
        self._declare(sign, _SIGN)
        self._outlet.tell(News(name, is_paused=True, sign=sign))

    def _end_pause(self, name: str) -> None:
        """Have our instances go on, unless an operator had paused them before."""
        scratch, paused = self._outlet.scratch, beside(name, "paused")
        scratch.queue_delete(beside(name, "busy"))
        if self._count(paused) is not None:
            with contextlib.suppress(amqp.PreconditionFailed):
                self._declare(paused, _PAUSED_BY_US)
                self._outlet.scratch.queue_delete(paused)
        self._outlet.tell(News(name, is_paused=False))

    def _wait_for_consumers(self, name: str) -> str:
        """Wait until nobody consumes and nothing is in hand; return why that is in vain."""
        sign, began = beside(name, "busy"), monotonic()
        self._wait(LISTEN_SECONDS)
        while not self._is_forced and (count := self._consumers(name)):
            if monotonic() > began + STRANGER_SECONDS:
                return f"consumers that are none of ours: {count}; stop them first, or --force"
            self._wait(LOOK_SECONDS)
        while self._consumers(sign):
            if monotonic() > began + BUSY_SECONDS:
                return f"handlers are at work for more than {BUSY_SECONDS:g} s"
            self._wait(LOOK_SECONDS)
        return ""

    def _wait(self, seconds: float) -> None:
        sleep(seconds)
        self._outlet.connection.poll()
        self._outlet.connection.beat()

    # --- what there is

    @property
    def _ours(self) -> Kind:
        return Kind.QUORUM if self._layout.is_quorum else Kind.CLASSIC

    @staticmethod
    def _arguments(subscription: Subscription, kind: Kind) -> dict[str, Any]:
        if kind is Kind.PLAIN:
            return {}
        return Layout(kind is Kind.QUORUM).arguments(subscription)

    def _kind(self, subscription: Subscription) -> Kind | None:
        """Return how the queue was declared, and ``None`` where it is not there."""
        name = queue_name(subscription)
        if self._count(name) is None:
            return None
        for kind in (Kind.PLAIN, Kind.CLASSIC, Kind.QUORUM):
            with contextlib.suppress(amqp.PreconditionFailed, amqp.ResourceLocked):
                self._declare(name, self._arguments(subscription, kind))
                return kind
        return Kind.FOREIGN

    def _count(self, name: str) -> int | None:
        found = self._look(name)
        return None if found is None else int(found.message_count)

    def _consumers(self, name: str) -> int:
        found = self._look(name)
        return 0 if found is None else int(found.consumer_count)

    def _look(self, name: str) -> Any:
        try:
            return self._outlet.scratch.queue_declare(name, passive=True)
        except amqp.NotFound:
            return None

    def _has_exchange(self, source: str) -> bool:
        try:
            name = exchange_name(source)
            self._outlet.scratch.exchange_declare(name, "topic", passive=True)
        except amqp.NotFound:
            return False
        return True

    # --- declaring

    def _declare(self, name: str, arguments: dict[str, Any]) -> None:
        self._outlet.scratch.queue_declare(
            name, durable=True, auto_delete=False, arguments=arguments
        )

    def _declare_places(self, subscription: Subscription, name: str) -> None:
        self._outlet.declare_exchange(exchange_name(subscription.source))
        self._outlet.declare_due()
        dead = beside(name, "dead")
        if self._wanted is not Kind.PLAIN and self._count(dead) is None:
            self._declare(dead, self._layout.kind())

    def _bind(self, queue: str, subscription: Subscription, name: str) -> None:
        scratch = self._outlet.scratch
        scratch.queue_bind(
            queue, exchange_name(subscription.source), routing_key=subscription.event_type
        )
        scratch.queue_bind(queue, DUE_QUEUES, routing_key=name)

    def _bind_witnessed(self, subscription: Subscription, name: str) -> None:
        """Have what is new come to a queue, and to a second one, which shows what that is.

        By an exchange before both: RabbitMQ routes a message to both or to neither.
        """
        scratch, arriving = self._outlet.scratch, beside(name, "arriving")
        scratch.exchange_declare(arriving, "fanout", durable=True, auto_delete=False)
        self._declare(arriving, {})
        for queue in (arriving, name):
            scratch.queue_bind(queue, arriving)
        source = exchange_name(subscription.source)
        scratch.exchange_bind(arriving, source, routing_key=subscription.event_type)
        scratch.exchange_bind(arriving, DUE_QUEUES, routing_key=name)

    def _bind_alone(self, subscription: Subscription, name: str) -> None:
        """Have what is new come to a queue and nowhere else; by both ways at once, it comes once.

        https://www.rabbitmq.com/docs/e2e: a queue gets one copy, by however many bindings.
        """
        self._bind(name, subscription, name)
        arriving = beside(name, "arriving")
        self._outlet.scratch.exchange_delete(arriving)
        self._outlet.scratch.queue_delete(arriving)

    def _unbind(self, queue: str, subscription: Subscription, name: str) -> None:
        scratch = self._outlet.scratch
        scratch.queue_unbind(
            queue, exchange_name(subscription.source), routing_key=subscription.event_type
        )
        scratch.queue_unbind(queue, DUE_QUEUES, routing_key=name)

    @property
    def _where(self) -> str:
        return ",".join(map(str, self._targets))

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except Blocked as exc:
            raise ProviderUnavailableError(
                f"RabbitMQ at {self._where} takes no messages: it is short of memory or disk"
            ) from exc
        except DRIVER_ERRORS as exc:
            kind, said = meaning_of(exc)
            raise kind(f"RabbitMQ at {self._where}: {said}") from exc


@dataclass(slots=True)
class _Taken:
    tag: int
    message: Any


class _Reader:
    """Takes messages out of queues, in their order."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._answers: list[tuple[Any, ...]] = []
        self._channel = ConsumingChannel(connection, self)
        self._channel.open()

    def take(self, queue: str, most: int) -> list[_Taken]:
        """Take up to so many messages; they are in hand until they are acknowledged."""
        for _ in range(most):
            self._channel.get(queue)
        with self._connection.within(ANSWER_SECONDS):
            while len(self._answers) < most:
                self._connection.drain_events()
        answers, self._answers = self._answers, []
        return [_Taken(answer[0], answer[-1]) for answer in answers if len(answer) > 1]

    def acknowledge(self, taken: Sequence[_Taken]) -> None:
        for each in taken:
            self._channel.settle(each.tag, SettleAction.ACKNOWLEDGE)
        self._connection.flush()

    def on_got(self, *answer: Any) -> None:
        self._answers.append(answer)

    def on_delivered(self, consumer_tag: str, tag: int, again: bool, *rest: Any) -> None:
        """Nothing is: it does not consume."""

    def on_cancelled(self, consumer_tag: str) -> None:
        """Nothing is."""

    def on_cancel_ok(self, consumer_tag: str) -> None:
        """Nothing is."""

    def on_qos_ok(self) -> None:
        """Nothing is asked for."""


class _Memory:
    """The messages of ours that passed last: what a crash or two bindings made double."""

    def __init__(self) -> None:
        self._seen: dict[_Key, None] = {}
        self._arrived: set[_Key] = set()

    def add(self, messages: Iterable[Any]) -> None:
        """Remember messages for as long as this lives."""
        self._arrived.update(key for each in messages if (key := _key_of(each)))

    def is_new(self, message: Any) -> bool:
        """Say whether a message was not there before, and remember it for a while."""
        key = _key_of(message)
        if key is None:
            return True
        if key in self._arrived or key in self._seen:
            return False
        self._seen[key] = None
        if len(self._seen) > MOST_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return True


def _key_of(message: Any) -> _Key | None:
    """Return what tells a message of ours from others; plain ones have nothing that does."""
    headers = message.properties.get("application_headers") or {}
    message_id = message.properties.get("message_id")
    if not message_id or f"{OUR_PREFIX}name" not in headers:
        return None
    return str(message_id), headers.get(f"{OUR_PREFIX}attempts")


def _copied(message: Any) -> Any:
    """Return a message as it is, but for what would send it elsewhere or have it refused."""
    given = dict(message.properties)
    given.pop("user_id", None)
    headers = given.get("application_headers") or {}
    given["application_headers"] = {k: x for k, x in headers.items() if k not in _OF_A_PLACE}
    return amqp.Message(message.body, **given)


def _meant_by(name: str) -> list[Subscription]:
    """Return what the name of a queue can mean: services and event types may have hyphens."""
    if not name.startswith("evt-"):
        return []
    route, _, subscriber = name.removeprefix("evt-").partition("--")
    parts = route.split("-")
    pairs = [("-".join(parts[:n]), "-".join(parts[n:])) for n in range(1, len(parts))]
    handler_type = "service_pool" if subscriber else "singleton"
    return [
        Subscription(source, source, event_type, subscriber or "singleton", handler_type)
        for source, event_type in pairs
        if source and event_type
    ]
