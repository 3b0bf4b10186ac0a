"""The two connections: what each has declared, has in hand, and can do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import amqp

from shared.errors import ProviderError
from shared.providers.rabbitmq.driver import (
    ANSWER_SECONDS,
    Channel,
    ConfirmingChannel,
    Connection,
    ConsumingChannel,
)
from shared.providers.rabbitmq.layout import (
    CONTROL,
    DUE,
    DUE_QUEUES,
    OUR_PREFIX,
    Layout,
    delay_header,
    queue_name,
)
from shared.providers.rabbitmq.messages import (
    Consumer,
    Held,
    Moves,
    Publication,
    parsed_object,
    seqs_of,
    text_of,
)
from shared.types import SettleAction, Settlement, Subscription

HEALTH_SECONDS = 3.0
"""How long an answer may take before the server counts as not healthy."""

MOST_AT_ONCE = 1000
"""Messages that are written before it is looked whether any was refused."""


@dataclass(slots=True)
class Hungry:
    """A subscription that there is room for."""

    subscription_id: int
    queue: str
    room: int
    count: int
    """How many its queue has, as far as is known."""
    share: int = 0
    has_more: bool = True

    @property
    def most(self) -> int:
        """How many it is worth asking for."""
        return min(self.room, max(self.count, 1))

    def take(self, got: Got) -> None:
        self.room -= len(got.found)
        self.count = got.left
        self.has_more = got.left > 0


@dataclass(slots=True)
class Got:
    """What a queue answered."""

    found: list[Held]
    left: int


def with_shares(hungry: list[Hungry], total: int) -> list[Hungry]:
    """Say how many to ask each for: evenly, and what one has no use for goes to the others."""
    whole, rest = divmod(total, max(len(hungry), 1))
    for place, each in enumerate(hungry):
        each.share = min(whole + (place < rest), each.most)
    left = total - sum(each.share for each in hungry)
    for each in hungry:
        more = min(each.most - each.share, left)
        each.share, left = each.share + more, left - more
    return hungry


class News(NamedTuple):
    """What an instance was told: that a queue is paused, or not any longer.

    :param sign: a queue that shows who still has messages of it in hand: each such
        instance consumes there until it has none.
    """

    queue: str
    is_paused: bool
    sign: str = ""


class FullError(ProviderError):
    """Raised when a queue of these publications took no more; others may have got them."""

    def __init__(self, refused: list[Publication], unrouted: list[Publication]) -> None:
        self.refused = refused
        self.unrouted = unrouted
        super().__init__(f"RabbitMQ refused {len(refused)} messages: a queue is full")


class Side:
    """One of the two connections, with what was declared by it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._declared: set[str] = set()
        self._scratch: Any = None

    @property
    def scratch(self) -> Any:
        """A channel for what may be refused, which ends a channel."""
        if self._scratch is None or self._scratch.connection is None:
            self._scratch = Channel(self.connection)
            self._scratch.open()
        return self._scratch

    def declare_exchange(self, name: str) -> None:
        """Declare the exchange of a service's events, or take it as it is."""
        if name in self._declared:
            return
        try:
            self.scratch.exchange_declare(name, "topic", durable=True, auto_delete=False)
        except amqp.PreconditionFailed:
            self.scratch.exchange_declare(name, "topic", passive=True)
        self._declared.add(name)

    def declare_due(self) -> None:
        """Declare the exchanges where delays end."""
        if DUE in self._declared:
            return
        # what names no exchange of events goes to the queue that its routing key names
        self._exchange(DUE_QUEUES, "direct")
        self._exchange(DUE, "headers", {"alternate-exchange": DUE_QUEUES})
        self._declared.add(DUE)

    def _exchange(self, name: str, kind: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.scratch.exchange_declare(
            name, kind, durable=True, auto_delete=False, arguments=arguments
        )


class Outlet(Side):
    """The connection that publishes."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._channel = ConfirmingChannel(connection)
        self._levels = 0

    def open(self) -> None:
        """Make it ready to publish."""
        self._channel.open()
        self._channel.confirm_select()

    def send(self, publications: Sequence[Publication]) -> list[Publication]:
        """Publish; return those that no queue got, once RabbitMQ has all of the others.

        :raises Blocked: when RabbitMQ takes none for the time being.
        :raises FullError: when it refused some; it has all others.
        """
        self.connection.refuse_if_blocked()
        channel, first = self._channel, self._channel.sent + 1
        channel.returned.clear()
        channel.nacked.clear()
        for start in range(0, len(publications), MOST_AT_ONCE):
            for each in publications[start : start + MOST_AT_ONCE]:
                channel.publish(each.message, each.exchange, each.routing_key, mandatory=True)
            self.connection.flush()
            self.connection.poll()
        channel.wait_for_confirms(first)
        unrouted = [each for each in publications if each.key in channel.returned]
        if channel.nacked:
            raise FullError(
                [publications[each - first] for each in sorted(channel.nacked)], unrouted
            )
        return unrouted

    def find(self, names: Iterable[str]) -> set[str]:
        """Return which of these queues are there.

        :raises Blocked: when RabbitMQ takes no messages, which it is asked by.
        """
        wanted = set(names)
        self.connection.refuse_if_blocked()
        channel, first = self._channel, self._channel.sent + 1
        channel.returned.clear()
        for name in wanted:
            # should it be there, this leaves nothing in it
            channel.publish(amqp.Message(b"", expiration="0"), "", name, mandatory=True)
        channel.wait_for_confirms(first)
        return {name for name in wanted if ("", name, "") not in channel.returned}

    def tell(self, news: News) -> None:
        """Tell all instances of a pause, or of its end."""
        self._exchange(CONTROL, "fanout")
        self.connection.refuse_if_blocked()
        first = self._channel.sent + 1
        self._channel.publish(
            amqp.Message(json.dumps(news._asdict()).encode()),
            CONTROL,
            "",
            mandatory=False,
        )
        self._channel.wait_for_confirms(first)

    def declare_delays(self, layout: Layout, level: int) -> None:
        """Declare the delay queues up to a level."""
        self.declare_due()
        for each in range(self._levels, level + 1):
            name = layout.delay(each)
            self._exchange(name, "headers", {"alternate-exchange": layout.after(each)})
            self.scratch.queue_declare(
                name, durable=True, auto_delete=False, arguments=layout.delay_arguments(each)
            )
            self.scratch.queue_bind(name, name, arguments={delay_header(each): True})
        self._levels = max(self._levels, level + 1)

    def forget_delays(self) -> None:
        """Have the delay queues declared again: some may be gone, and what goes there is due."""
        self._levels = 0

    def bind_due(self, exchange: str) -> None:
        """Have what is due for an exchange of events reach it."""
        key = f"{DUE} {exchange}"
        if key not in self._declared:
            self.scratch.exchange_bind(exchange, DUE, arguments={f"{OUR_PREFIX}to": exchange})
            self._declared.add(key)

    def ping(self) -> bool:
        """Say whether it answers in time, and takes messages."""
        if self.connection.is_blocked:
            return False
        with self.connection.within(HEALTH_SECONDS):
            self.scratch.exchange_declare("amq.topic", "topic", passive=True)
        return True


class Inlet(Side):
    """The connection that consumes, and what it has in hand."""

    _serials = itertools.count(1)

    def __init__(self, connection: Connection, order: Callable[[Held], Any]) -> None:
        super().__init__(connection)
        self._order = order
        self.held: dict[tuple[int, int], Held] = {}
        self.pushed: list[Held] = []
        """What was pushed and nobody took yet."""
        self._serial = next(self._serials)
        self._consumers: dict[str, Consumer] = {}
        self._tags = itertools.count(1)
        self._got: list[tuple[Any, ...]] = []
        self._asked_for_news = False
        self._news: list[News] = []
        self._gone: list[int] = []
        self._unanswered = 0
        self._channel = ConsumingChannel(connection, self)
        self._control = ""

    def open(self) -> None:
        """Make it ready to consume."""
        self._channel.open()

    def listen(self) -> None:
        """Hear of pauses from now on; who only dispatches has no need to."""
        if self._control:
            return
        self._exchange(CONTROL, "fanout")
        self._control = self.scratch.queue_declare("", exclusive=True, auto_delete=False).queue
        self.scratch.queue_bind(self._control, CONTROL)
        self._consume(None, self._control, 0)
        self._sync()

    # --- declaring and looking

    def declare_queue(self, subscription: Subscription, arguments: Mapping[str, Any]) -> bool:
        """Declare a queue; return False where it was there and had to be taken as it is."""
        if self._is_or_becomes(subscription, arguments):
            return True
        self.scratch.queue_declare(queue_name(subscription), passive=True)
        return False

    def is_plain(self, subscription: Subscription) -> bool:
        """Say whether a queue that is there is as plain nameko declares it."""
        return self._is_or_becomes(subscription, {})

    def _is_or_becomes(self, subscription: Subscription, arguments: Mapping[str, Any]) -> bool:
        is_lasting = subscription.reliable
        try:
            self.scratch.queue_declare(
                queue_name(subscription),
                durable=True,
                exclusive=subscription.handler_type == "broadcast" and not is_lasting,
                auto_delete=not is_lasting,
                arguments=arguments,
            )
        except amqp.PreconditionFailed:
            return False
        return True

    def declare_lasting(self, name: str, kind: Mapping[str, Any]) -> None:
        """Declare a queue that stays until it is deleted, or take it as it is."""
        try:
            self.scratch.queue_declare(name, durable=True, auto_delete=False, arguments=kind)
        except amqp.PreconditionFailed:
            self.scratch.queue_declare(name, passive=True)

    def has_exchange(self, name: str) -> bool:
        """Say whether an exchange is there."""
        try:
            self.scratch.exchange_declare(name, "headers", passive=True)
        except amqp.NotFound:
            return False
        return True

    def count(self, name: str) -> int | None:
        """Return how many messages of a queue are ready; ``None`` where it is not."""
        try:
            return int(self.scratch.queue_declare(name, passive=True).message_count)
        except amqp.NotFound:
            return None
        except amqp.ResourceLocked:
            return 0  # another connection's own

    def drop(self, name: str, is_over: Callable[[Sequence[int]], Set[int]]) -> int:
        """Remove of a queue those messages all of whose deliveries are over; return how many.

        The others keep their places, and when they expire.
        """
        channel, dropped = Channel(self.connection), 0
        channel.open()
        try:
            while some := self._some_of(channel, name):
                asked = sorted({seq for _, seqs in some for seq in seqs})
                over = is_over(asked) if asked else set()
                tags = [tag for tag, seqs in some if seqs and over >= set(seqs)]
                for tag in tags:
                    channel.basic_ack(tag)
                dropped += len(tags)
        finally:
            # with it goes back what was not removed
            channel.close()
        return dropped

    @staticmethod
    def _some_of(channel: Channel, name: str) -> list[tuple[int, list[int]]]:
        """Take messages of a queue in hand; return of each its tag, and its deliveries."""
        some: list[tuple[int, list[int]]] = []
        while len(some) < MOST_AT_ONCE and (message := channel.basic_get(name)) is not None:
            some.append((message.delivery_tag, seqs_of(message)))
        return some

    def purge(self, name: str) -> int:
        """Remove what is ready in a queue; return how many that was."""
        try:
            return int(self.scratch.queue_purge(name))
        except amqp.NotFound:
            return 0

    def ping(self) -> None:
        """See that it answers in time."""
        with self.connection.within(HEALTH_SECONDS):
            self.scratch.exchange_declare("amq.topic", "topic", passive=True)

    # --- being pushed to

    def arm(self, wanted: Mapping[int, tuple[str, int]]) -> None:
        """Have pushed to us what comes, of each subscription as many as there is room for."""
        active = {x.subscription_id: x for x in self._active()}
        for subscription_id, consumer in active.items():
            if subscription_id not in wanted:
                self._cancel(consumer)
        for subscription_id, (queue, room) in wanted.items():
            known = active.get(subscription_id)
            if known is not None:
                if known.window - known.unsettled >= max(1, room // 2):
                    continue
                self._cancel(known)
            self._consume(subscription_id, queue, room)
        self.connection.flush()

    def disarm(self) -> None:
        """Have nothing more pushed to us. What was on its way has come when this returns."""
        for consumer in self._active():
            self._cancel(consumer)
        self._drain(lambda: not any(x.is_cancelled for x in self._consumers.values()))

    def anchor(self, subscription_id: int, queue: str) -> None:
        """Keep a queue that goes with its last consumer, for as long as this connection."""
        if not any(x.is_anchor and x.queue == queue for x in self._consumers.values()):
            self._consume(subscription_id, queue, 1, is_anchor=True)
            self._sync()

    def let_go(self, queue: str) -> None:
        """End what :meth:`anchor` began."""
        for consumer in list(self._consumers.values()):
            if consumer.is_anchor and consumer.queue == queue:
                self._cancel(consumer)
        self.connection.flush()

    def has_of(self, queue: str) -> bool:
        """Say whether any message of a queue is in hand."""
        return any(held.queue == queue for held in self.held.values())

    def leave(self, subscription_id: int) -> None:
        """Have nothing more to do with a subscription."""
        self.disarm()
        for consumer in list(self._consumers.values()):
            if consumer.subscription_id == subscription_id:
                self._cancel(consumer)
        self._drain(lambda: not any(x.is_cancelled for x in self._consumers.values()))
        self.give_back(also={subscription_id})

    def is_drained(self, subscription_id: int) -> bool:
        """Say whether all that a queue has is pushed to us without being asked for."""
        return any(
            consumer.subscription_id == subscription_id and consumer.unsettled < consumer.window
            for consumer in self._active()
        )

    def has_pushed(self, subscription_ids: Iterable[int]) -> bool:
        """Say whether any of these has something that was pushed."""
        wanted = set(subscription_ids)
        return any(held.subscription_id in wanted for held in self.pushed)

    def take_pushed(self, rooms: Mapping[int, int], limit: int) -> list[Held]:
        """Take what was pushed, by priority; of the subscriptions by turns."""
        by_subscription: dict[int, list[Held]] = {}
        for held in sorted(self.pushed, key=self._order):
            by_subscription.setdefault(held.subscription_id, []).append(held)
        allowed = [its[: rooms.get(each, 0)] for each, its in by_subscription.items()]
        by_turns = [held for row in itertools.zip_longest(*allowed) for held in row if held]
        taken = by_turns[: max(limit, 0)]
        handles = {held.handle for held in taken}
        self.pushed = [held for held in self.pushed if held.handle not in handles]
        return taken

    def give_back(self, also: Iterable[int] = (), of: Container[int] | None = None) -> None:
        """Give back what was pushed and is not wanted now; an anchor would get it again.

        :param of: the subscriptions that are meant; by default all.
        """
        leaving = set(also)
        unwanted = [
            held
            for held in self.pushed
            if (of is None or held.subscription_id in of)
            and (
                held.consumer is None
                or not held.consumer.is_anchor
                or held.subscription_id in leaving
            )
        ]
        if unwanted:
            handles = {held.handle for held in unwanted}
            self.pushed = [held for held in self.pushed if held.handle not in handles]
            for consumer in [held.consumer for held in unwanted]:
                if consumer is not None and not consumer.is_cancelled:
                    self._cancel(consumer)
            self.settle([(held, SettleAction.RELEASE) for held in unwanted])

    def _active(self) -> list[Consumer]:
        return [
            x
            for x in self._consumers.values()
            if x.subscription_id is not None and not (x.is_anchor or x.is_cancelled)
        ]

    def _consume(
        self, subscription_id: int | None, queue: str, window: int, is_anchor: bool = False
    ) -> None:
        tag = f"{self._serial}.{next(self._tags)}"
        self._consumers[tag] = Consumer(tag, subscription_id, queue, window, is_anchor)
        self._channel.consume(
            queue,
            tag,
            window,
            is_acknowledged=subscription_id is not None,
            # others that have room go first
            arguments={"x-priority": -1} if is_anchor else {},
        )
        self._unanswered += 1

    def _cancel(self, consumer: Consumer) -> None:
        if not consumer.is_cancelled:
            consumer.is_cancelled = True
            self._channel.cancel(consumer.tag)

    # --- asking

    def ask_for_news(self) -> bool:
        """Have the next ``get`` see that what was said of pauses until now has come.

        No need while deliveries are pushed: then a pause may come a moment later as well.
        """
        if self._control and not self._active():
            self._channel.get(self._control, is_acknowledged=False)
            self._asked_for_news = True
        return self._asked_for_news

    def get(self, hungry: Sequence[Hungry]) -> list[Got]:
        """Ask each for its share, all in one round trip."""
        for each in hungry:
            for _ in range(each.share):
                self._channel.get(each.queue)
        expected = sum(each.share for each in hungry) + self._asked_for_news
        self._drain(lambda: len(self._got) == expected)
        answers, self._got = iter(self._got), []
        if self._asked_for_news:
            self._asked_for_news = False
            self._read_news(next(answers))
        return [self._answered(each, itertools.islice(answers, each.share)) for each in hungry]

    def _answered(self, hungry: Hungry, answers: Iterable[tuple[Any, ...]]) -> Got:
        got = Got([], 0)
        for answer in answers:
            got.left = answer[-2] if len(answer) > 1 else 0
            if len(answer) > 1:
                tag, is_redelivered, *_, message = answer
                got.found.append(
                    self._hold(tag, hungry.subscription_id, hungry.queue, message, is_redelivered)
                )
        return got

    def _read_news(self, answer: tuple[Any, ...]) -> None:
        if len(answer) > 1:
            self._hear(answer[-1])
            if answer[-2]:
                self.ask_for_news()
                self.get([])

    def _hear(self, message: Any) -> None:
        said = parsed_object(text_of(message.body))
        self._news.append(
            News(str(said.get("queue")), bool(said.get("is_paused")), str(said.get("sign") or ""))
        )

    def take_news(self) -> list[News]:
        """Return which queues were paused or resumed."""
        news, self._news = self._news, []
        return news

    def take_gone(self) -> list[int]:
        """Return the subscriptions whose queue was deleted."""
        gone, self._gone = self._gone, []
        return gone

    # --- settling

    def sort_out(self, settlements: Sequence[Settlement]) -> tuple[Moves, list[Settlement]]:
        """Part settlements into those of leases that are held, and the others."""
        moves, refused, seen = Moves(), [], set()
        for settlement in settlements:
            handle = settlement.lease.handle
            if handle in self.held and handle not in seen:
                seen.add(handle)
                moves.add(self.held[handle], settlement)
            else:
                refused.append(settlement)
        return moves, refused

    def settle(self, moves: Iterable[tuple[Held, SettleAction]]) -> None:
        """End leases; what is given back, or dead, is so when this returns."""
        is_awaited = False
        for held, action in moves:
            del self.held[held.handle]
            if held.consumer is not None:
                held.consumer.unsettled -= 1
            self._channel.settle(held.tag, action)
            is_awaited = is_awaited or action is not SettleAction.ACKNOWLEDGE
        if is_awaited:
            self._sync()
        self.connection.flush()

    def _hold(
        self,
        tag: int,
        subscription_id: int,
        queue: str,
        message: Any,
        is_redelivered: bool,
        consumer: Consumer | None = None,
    ) -> Held:
        handle = (self._serial, tag)
        held = Held(handle, subscription_id, queue, message, bool(is_redelivered), consumer)
        self.held[handle] = held
        return held

    # --- what arrives

    def on_delivered(self, consumer_tag: str, tag: int, again: bool, *rest: Any) -> None:
        consumer, message = self._consumers[consumer_tag], rest[-1]
        if consumer.subscription_id is None:
            self._hear(message)
            return
        consumer.unsettled += 1
        where = consumer.subscription_id, consumer.queue
        self.pushed.append(self._hold(tag, *where, message, again, consumer))

    def on_got(self, *answer: Any) -> None:
        self._got.append(answer)

    def on_cancelled(self, consumer_tag: str) -> None:
        """RabbitMQ ended a consumer: its queue was deleted, or moved to another node."""
        consumer = self._consumers.pop(consumer_tag, None)
        if consumer is not None and consumer.subscription_id is not None:
            self._gone.append(consumer.subscription_id)

    def on_cancel_ok(self, consumer_tag: str) -> None:
        self._consumers.pop(consumer_tag, None)

    def on_qos_ok(self) -> None:
        self._unanswered -= 1

    def _sync(self) -> None:
        """Return once RabbitMQ has done what it was told before."""
        self._channel.limit(1)
        self._unanswered += 1
        self._drain(lambda: not self._unanswered)

    def _drain(self, is_done: Callable[[], bool]) -> None:
        with self.connection.within(ANSWER_SECONDS):
            while not is_done():
                self.connection.drain_events()
