"""The provider itself: what of the interface is done by which connection."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from time import monotonic
from typing import Any

import amqp

from shared.errors import (
    ProviderBlockedError,
    ProviderError,
    ProviderRefusedError,
    UnsupportedByProviderError,
)
from shared.native import select as wait_ready
from shared.providers.base import Capabilities, QueueProvider, SubscriptionStats
from shared.providers.rabbitmq.driver import (
    DRIVER_ERRORS,
    Blocked,
    connected,
    keep_silent_in_threads,
    meaning_of,
    targets_of,
)
from shared.providers.rabbitmq.layout import (
    DELAY_LEVELS,
    DUE_QUEUES,
    OUR_PREFIX,
    Layout,
    beside,
    delay_header,
    delay_levels,
    exchange_name,
    queue_name,
)
from shared.providers.rabbitmq.messages import (
    Held,
    Moves,
    Publication,
    by_arrival,
    by_priority,
    copied,
    count_of,
    delivery_of,
    encoded,
    has_short_metadata,
    numbers_of,
)
from shared.providers.rabbitmq.sides import FullError, Got, Hungry, Inlet, News, Outlet, with_shares
from shared.settings import Settings
from shared.types import Delivery, Envelope, Lease, SettleAction, Settlement, Subscription

MOST_PUSHED = 100
"""Deliveries of one subscription that RabbitMQ may push before one is settled."""

REJOIN_SECONDS = 30.0
"""How long a queue counts as bound: what was on its way before comes back as well."""

OFFER_SECONDS = 1.0
"""After how long what a full queue refused is offered to it again."""

MOST_REFUSED = 1000
"""Deliveries of one subscription that wait for a full queue; then no more of it is reserved."""

SAY_SECONDS = 60.0
"""How often it is said that a queue is full."""

LEASE_SHARE = 0.8
"""Of RabbitMQ's own limit, how long a lease may last: the limit is checked once a minute."""


class RabbitMQProvider(QueueProvider):
    """See the module's docstring."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._layout = Layout(settings.rabbitmq_queue_type == "quorum")
        self.capabilities = Capabilities(
            priorities=not self._layout.is_quorum,
            peek=False,
            deduplicates=False,
            leases_expire=False,
            counts_all=False,
            fans_out=True,
            nameko_rpc=True,
        )
        self.longest_lease = LEASE_SHARE * settings.rabbitmq_consumer_timeout
        self._targets = targets_of(settings.rabbitmq_uri)
        self._inlet: Inlet | None = None
        self._outlet: Outlet | None = None
        self._mine: dict[int, Subscription] = {}
        self._paused: set[int] = set()
        # declared before, without what we want of a queue; and those of plain nameko among them
        self._other: set[int] = set()
        self._plain: set[int] = set()
        # by its name, until when a queue counts as bound
        self._joined: dict[str, float] = {}
        # what RabbitMQ takes at most, once it has refused something larger
        self._most_bytes: float = math.inf
        # ends of leases that a full queue refused, and when each delivery was to come again
        self._refused: list[tuple[float, Settlement]] = []
        self._offer_at = self._say_at = 0.0
        # how many more of each subscription the last reserve had room for
        self._rooms: dict[int, int] = {}
        # what the last reserve was to have none of: it is not to be pushed either
        self._closed: set[int] = set()
        # how many each queue had left when it was last asked
        self._counts: dict[int, int] = {}
        self._order = by_priority if self.capabilities.priorities else by_arrival
        # what shows that there is still something in hand of a queue that is to be declared anew
        self._signs: dict[str, str] = {}
        self._turns = 0
        # whether what is ready has come, or is on its way, without being asked for
        self._is_pushed = False
        self._is_roused = False
        keep_silent_in_threads()

    def initialize(self) -> None:
        # what is alive stays: while RabbitMQ takes no messages, leases go on
        with self._translated():
            self._connect()

    def close(self) -> None:
        for each in (self._inlet, self._outlet):
            if each is not None:
                each.connection.end()
        self._inlet = self._outlet = None
        self._is_pushed = False
        self._signs, self._refused = {}, []

    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        with self._translated():
            self._connect()
            self._declare(subscriptions)
            self._mine |= {subscription.id: subscription for subscription in subscriptions}

    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> list[Delivery]:
        if not deliveries:
            return []
        with self._translated():
            _, outlet = self._connect()
            publications = self._publications(deliveries)
            small = [each for each in publications if len(each.message.body) <= self._most_bytes]
            large = [each for each in publications if len(each.message.body) > self._most_bytes]
            self._prepare(outlet, small)
            try:
                unrouted = outlet.send(small)
            except FullError as exc:
                homeless = _deliveries_of(exc.unrouted)
                raise ProviderRefusedError(
                    str(exc), _deliveries_of([*exc.refused, *large]), homeless
                ) from exc
            except amqp.PreconditionFailed as exc:
                self._learn_most_bytes(exc)
                raise
        if large:
            said = f"RabbitMQ takes no more than {self._most_bytes} bytes: {len(large)} messages"
            raise ProviderRefusedError(said, _deliveries_of(large), _deliveries_of(unrouted))
        return _deliveries_of(unrouted)

    def published(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing: RabbitMQ pushes to who consumes."""

    def rejoin(self, subscription: Subscription) -> None:
        name, now = queue_name(subscription), monotonic()
        if now < self._joined.get(name, 0.0):
            return
        self._joined[name] = now + REJOIN_SECONDS
        exchange = exchange_name(subscription.source)
        with self._translated():
            inlet, _ = self._connect()
            try:
                inlet.scratch.queue_bind(name, exchange, routing_key=subscription.event_type)
            except (amqp.NotFound, amqp.ResourceLocked):
                return  # it went meanwhile, or goes with another connection
            except amqp.AccessRefused:
                done = "events go to it singly, since this user may not bind it"
            else:
                done = "bound again"
        self.notices.append(f"{name}: was not bound to {exchange} any longer; {done}")

    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        deadline = monotonic() + max(timeout, 0)
        with contextlib.suppress(ProviderError), self._translated():
            if self._wait(deadline, interrupt, hungry):
                return
        if self._mine and hungry:
            return  # deaf: the next reserve connects again, or says what is wrong
        wait_ready([interrupt], [], [], max(deadline - monotonic(), 0))

    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        with self._translated():
            try:
                held = self._reserve(limits, limit)
            except amqp.NotFound:
                # a queue was deleted; it is declared again with everything else
                self.close()
                held = self._reserve(limits, limit)
            return [self._lease(each) for each in held]

    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        if not settlements:
            return []
        with self._translated():
            inlet, outlet = self._connect()
            if any(each.is_early for each in settlements):
                outlet.forget_delays()
            return self._settle(inlet, outlet, settlements)

    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        with self._translated():
            inlet, _ = self._connect()
            return [lease for lease in leases if lease.handle not in inlet.held]

    def get_queue_stats(self, subscriptions: Sequence[Subscription]) -> list[SubscriptionStats]:
        with self._translated():
            inlet, _ = self._connect()
            return [self._stats(inlet, subscription) for subscription in subscriptions]

    def health_check(self) -> bool:
        try:
            with self._translated():
                inlet, outlet = self._connect()
                inlet.ping()
                return outlet.ping()
        except ProviderError:
            return False

    def pause(self, subscription: Subscription) -> None:
        with self._translated():
            inlet, outlet = self._connect()
            name = queue_name(subscription)
            inlet.scratch.queue_declare(
                beside(name, "paused"),
                durable=True,
                auto_delete=False,
                arguments=self._layout.kind(),
            )
            outlet.tell(News(name, is_paused=True))
            self._note_pause(name, True)

    def resume(self, subscription: Subscription) -> None:
        with self._translated():
            inlet, outlet = self._connect()
            name = queue_name(subscription)
            inlet.scratch.queue_delete(beside(name, "paused"))
            outlet.tell(News(name, is_paused=False))
            self._note_pause(name, False)

    def is_paused(self, subscription: Subscription) -> bool:
        if subscription.id in self._mine:
            return subscription.id in self._paused
        with self._translated():
            inlet, _ = self._connect()
            return inlet.count(beside(queue_name(subscription), "paused")) is not None

    def peek(self, subscription: Subscription, limit: int) -> list[Delivery]:
        # who cannot reach the server says so first, as every provider does
        with self._translated():
            self._connect()
        raise UnsupportedByProviderError("RabbitMQ cannot show what waits without handing it out")

    def purge(self, subscription: Subscription) -> int:
        with self._translated():
            inlet, _ = self._connect()
            inlet.disarm()
            pushed = inlet.take_pushed({subscription.id: len(inlet.pushed)}, len(inlet.pushed))
            inlet.settle([(held, SettleAction.ACKNOWLEDGE) for held in pushed])
            inlet.give_back()
            return len(pushed) + inlet.purge(queue_name(subscription))

    def forget(self, subscription: Subscription) -> None:
        with self._translated():
            inlet, _ = self._connect()
            self._mine.pop(subscription.id, None)
            inlet.leave(subscription.id)
            name = queue_name(subscription)
            for each in (name, beside(name, "dead"), beside(name, "paused")):
                inlet.scratch.queue_delete(each)

    def count_delayed(self) -> int:
        with self._translated():
            inlet, _ = self._connect()
            # messages go from the longer ones to the shorter: so none is counted by neither
            return sum(inlet.count(name) or 0 for name in self._delays(inlet))

    def take_waiting(self, subscription: Subscription, limit: int) -> list[Lease]:
        # a pause is what consumers agree upon; the queue itself knows nothing of it
        was_paused, self._paused = self._paused, self._paused - {subscription.id}
        try:
            return self.reserve({subscription.id: limit}, limit)
        finally:
            self._paused |= was_paused & {subscription.id}

    def drop_scheduled(
        self,
        subscriptions: Sequence[Subscription],
        is_over: Callable[[Sequence[int]], Set[int]],
    ) -> int:
        with self._translated():
            inlet, _ = self._connect()
            # from the longer ones to the shorter, as they go: none is overlooked on its way
            there = [name for name in self._delays(inlet) if inlet.count(name) is not None]
            return sum(inlet.drop(name, is_over) for name in there)

    def _delays(self, inlet: Inlet) -> list[str]:
        """Return the delay queues, the longest first; some may be gone."""
        # by their exchanges: a queue that is gone hides no longer one, and for each name that
        # is asked for in vain RabbitMQ notes an error
        names = map(self._layout.delay, range(DELAY_LEVELS))
        return list(itertools.takewhile(inlet.has_exchange, names))[::-1]

    def shares(self, subscription: Subscription) -> bool:
        if subscription.id in self._mine:
            return subscription.id in self._plain
        with self._translated():
            inlet, _ = self._connect()
            if inlet.count(queue_name(subscription)) is None:
                return False
            arguments = self._layout.arguments(subscription)
            return not inlet.declare_queue(subscription, arguments) and inlet.is_plain(subscription)

    # --- connections

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into ours; after any of them, connect anew."""
        try:
            yield
        except Blocked as exc:
            raise ProviderBlockedError(
                f"RabbitMQ at {self._where} takes no messages: it is short of memory or disk"
            ) from exc
        except DRIVER_ERRORS as exc:
            self.close()
            kind, said = meaning_of(exc)
            raise kind(f"RabbitMQ at {self._where}: {said}") from exc

    @property
    def _where(self) -> str:
        return ",".join(str(target) for target in self._targets)

    def _connect(self) -> tuple[Inlet, Outlet]:
        """Return both connections; anew, should they be found to be lost."""
        try:
            self._hear()
        except DRIVER_ERRORS:
            self.close()
        if self._inlet is None or self._outlet is None:
            return self._open()
        return self._inlet, self._outlet

    def _open(self) -> tuple[Inlet, Outlet]:
        outlet = self._outlet = Outlet(connected(self._targets, "publishes"))
        outlet.open()
        inlet = self._inlet = Inlet(connected(self._targets, "consumes"), self._order)
        inlet.open()
        self._declare(list(self._mine.values()))
        return inlet, outlet

    def _hear(self) -> None:
        """Take in what has arrived on both connections, and keep them alive."""
        if self._inlet is None or self._outlet is None:
            return
        for connection in (self._inlet.connection, self._outlet.connection):
            connection.poll()
            connection.beat()
        self._learn(self._inlet)
        self._lower_signs(self._inlet)

    def _learn(self, inlet: Inlet) -> None:
        for news in inlet.take_news():
            self._note_pause(news.queue, news.is_paused)
            if news.sign and inlet.has_of(news.queue):
                self._raise_sign(inlet, news)
            if not news.is_paused:
                # it may have been declared anew meanwhile
                self._declare([x for x in self._mine.values() if queue_name(x) == news.queue])
        gone = [self._mine[each] for each in inlet.take_gone() if each in self._mine]
        if gone:
            self._declare(gone)
            self._is_roused = True

    def _raise_sign(self, inlet: Inlet, news: News) -> None:
        """Show that messages of a queue are in hand, for as long as they are."""
        its = next((x.id for x in self._mine.values() if queue_name(x) == news.queue), None)
        # whoever asked may be gone, and with them the queue
        if its is not None and inlet.count(news.sign) is not None:
            inlet.anchor(its, news.sign)
            self._signs[news.queue] = news.sign

    def _lower_signs(self, inlet: Inlet) -> None:
        for queue in [each for each in self._signs if not inlet.has_of(each)]:
            inlet.let_go(self._signs.pop(queue))

    def _note_pause(self, name: str, is_paused: bool) -> None:
        for subscription in self._mine.values():
            if queue_name(subscription) != name:
                continue
            if is_paused:
                self._paused.add(subscription.id)
            else:
                self._paused.discard(subscription.id)
            self._is_roused = True

    # --- declaring

    def _declare(self, subscriptions: Sequence[Subscription]) -> None:
        assert self._inlet is not None and self._outlet is not None  # noqa: S101, PT018 - by _connect
        if not subscriptions:
            return
        self._inlet.listen()
        for subscription in subscriptions:
            self._declare_one(self._inlet, subscription)
        markers = {each.id: beside(queue_name(each), "paused") for each in subscriptions}
        try:
            there = self._outlet.find(markers.values())
        except Blocked:
            # RabbitMQ notes each that is missing as an error, so this is not the first choice
            there = {each for each in markers.values() if self._inlet.count(each) is not None}
        self._paused -= markers.keys()
        self._paused |= {each for each, marker in markers.items() if marker in there}

    def _declare_one(self, inlet: Inlet, subscription: Subscription) -> None:
        name, is_lasting = queue_name(subscription), subscription.reliable
        inlet.declare_exchange(exchange_name(subscription.source))
        is_ours = inlet.declare_queue(subscription, self._layout.arguments(subscription))
        inlet.scratch.queue_bind(
            name, exchange_name(subscription.source), routing_key=subscription.event_type
        )
        if is_ours:
            self._other.discard(subscription.id)
            self._plain.discard(subscription.id)
        elif subscription.id not in self._other:
            self._take_over(inlet, subscription)
        if is_lasting:
            inlet.declare_lasting(beside(name, "dead"), self._layout.kind())
        inlet.declare_due()
        inlet.scratch.queue_bind(name, DUE_QUEUES, routing_key=name)
        if not is_lasting:
            inlet.anchor(subscription.id, name)

    def _take_over(self, inlet: Inlet, subscription: Subscription) -> None:
        self._other.add(subscription.id)
        said = "as another kind of queue or with another reliable_delivery, and taken as it is"
        if inlet.is_plain(subscription):
            self._plain.add(subscription.id)
            said = "by plain nameko, and taken as it is, without priorities"
        self.notices.append(
            f"{queue_name(subscription)}: declared before {said}; "
            "queuectl rabbitmq upgrade-queues declares it anew"
        )

    # --- publishing

    def _publications(self, deliveries: Sequence[Delivery]) -> list[Publication]:
        made: dict[Any, Publication] = {}
        for delivery in deliveries:
            if delivery.to is not None:
                made[id(delivery)] = self._to_one(delivery, queue_name(delivery.to))
                continue
            known = made.get(delivery.message.id)
            if known is None:
                made[delivery.message.id] = self._to_all(delivery)
            else:
                known.deliveries.append(delivery)
        for publication in made.values():
            publication.number()
        return list(made.values())

    def _learn_most_bytes(self, exc: amqp.PreconditionFailed) -> None:
        """Remember what RabbitMQ takes at most: whatever is larger would end each connection."""
        found = re.search(r"is larger than (?:configured )?max size (\d+)", str(exc))
        if found is not None:
            self._most_bytes = int(found[1])

    def _to_all(self, delivery: Delivery) -> Publication:
        message = delivery.message
        exchange = exchange_name(self.settings.source_of(message.queue))
        made = Publication(self._encoded(message), exchange, message.type, [delivery], is_new=True)
        return self._delayed(made, delivery.delay)

    def _encoded(self, envelope: Envelope) -> Any:
        if not has_short_metadata(envelope):
            self.notices.append(
                f"{envelope.id}: sent without its metadata, which is longer than RabbitMQ takes"
            )
            envelope = replace(envelope, metadata={})
        return encoded(envelope)

    def _to_one(self, delivery: Delivery, name: str) -> Publication:
        message = self._encoded(delivery.message)
        message.properties["application_headers"].update(numbers_of(delivery))
        return self._delayed(Publication(message, "", name, [delivery]), delivery.delay)

    def _delayed(self, publication: Publication, seconds: float) -> Publication:
        levels = delay_levels(seconds)
        if not levels:
            return publication
        headers = publication.message.properties["application_headers"]
        headers.update({delay_header(level): True for level in levels})
        if publication.exchange:
            publication.source = publication.exchange
            headers[f"{OUR_PREFIX}to"] = publication.exchange
        publication.level = levels[0]
        publication.exchange = self._layout.delay(levels[0])
        return publication

    def _prepare(self, outlet: Outlet, publications: Sequence[Publication]) -> None:
        """Declare what they go through."""
        for publication in publications:
            if publication.is_new:
                outlet.declare_exchange(publication.source or publication.exchange)
        level = max((publication.level for publication in publications), default=-1)
        if level >= 0:
            outlet.declare_delays(self._layout, level)
        for publication in publications:
            if publication.source:
                outlet.bind_due(publication.source)

    def _settle(
        self, inlet: Inlet, outlet: Outlet, settlements: Sequence[Settlement]
    ) -> list[Settlement]:
        """Settle; return what is not held any more."""
        moves, lost = inlet.sort_out(settlements)
        # first what needs no publishing, which may fail for the time being
        copied_first = [*moves.retries, *self._to_bury(moves)]
        inlet.settle(moves.without(copied_first))
        inlet.settle(self._send_copies(inlet, outlet, moves))
        return lost

    def _settle_refused(self, inlet: Inlet, outlet: Outlet) -> None:
        """Offer a full queue again what it refused; RabbitMQ has the originals meanwhile."""
        now = monotonic()
        if not self._refused or now < self._offer_at:
            return
        refused, self._refused = self._refused, []
        try:
            self._settle(
                inlet, outlet, [x._replace(delay=max(due - now, 0.0)) for due, x in refused]
            )
        except Blocked:
            self._refused, self._offer_at = refused, now + OFFER_SECONDS

    def _to_bury(self, moves: Moves) -> list[tuple[Held, Settlement]]:
        """Return the dead letters whose queue may have no place for them: it is not ours."""
        return [each for each in moves.dead if each[0].subscription_id in self._other]

    def _send_copies(
        self, inlet: Inlet, outlet: Outlet, moves: Moves
    ) -> list[tuple[Held, SettleAction]]:
        """Publish what is to come again later, and what is to be kept as a dead letter.

        :returns: what to do with the originals.
        """
        originals = [*moves.retries, *self._to_bury(moves)]
        if not originals:
            return []
        copies = [self._retried(*each) for each in moves.retries]
        copies += [self._buried(inlet, *each) for each in self._to_bury(moves)]
        self._prepare(outlet, copies)
        refused: set[int] = set()
        try:
            unrouted = {id(copy) for copy in outlet.send(copies)}
        except FullError as exc:
            unrouted, refused = set(map(id, exc.unrouted)), set(map(id, exc.refused))
            self._say_full(exc)
        done, now = [], monotonic()
        for (held, settlement), copy in zip(originals, copies, strict=True):
            if id(copy) in refused:
                self._refused.append((now + settlement.delay, settlement))
            elif id(copy) in unrouted:
                # for whom there is no queue is not to lose the original as well
                done.append((held, SettleAction.RELEASE))
            else:
                done.append((held, SettleAction.ACKNOWLEDGE))
        return done

    def _say_full(self, exc: FullError) -> None:
        now = monotonic()
        self._offer_at = now + OFFER_SECONDS
        if now >= self._say_at:
            self._say_at = now + SAY_SECONDS
            self.notices.append(f"{exc}; what failed is kept in hand until there is room")

    def _retried(self, held: Held, settlement: Settlement) -> Publication:
        delivery = settlement.lease.delivery
        copy = copied(held, delivery, attempts=delivery.attempts + 1)
        return self._delayed(Publication(copy, "", held.queue, [delivery]), settlement.delay)

    def _buried(self, inlet: Inlet, held: Held, settlement: Settlement) -> Publication:
        name, delivery = beside(held.queue, "dead"), settlement.lease.delivery
        inlet.declare_lasting(name, self._layout.kind())
        copy = copied(held, delivery, attempts=delivery.attempts + 1)
        return Publication(copy, "", name, [delivery])

    # --- consuming

    def _wait(self, deadline: float, interrupt: int, hungry: bool) -> bool:
        """Wait; return False where there is no connection to wait by."""
        if self._inlet is None or self._outlet is None:
            return False
        inlet, connections = self._inlet, (self._inlet.connection, self._outlet.connection)
        self._is_pushed = False
        if hungry and self._mine:
            inlet.arm(self._wanted())
        else:
            inlet.disarm()
        while True:
            self._hear()
            self._settle_refused(inlet, self._outlet)
            self._give_back_unwanted(inlet, hungry)
            if hungry and (self._is_roused or inlet.has_pushed(self._takable)):
                self._is_pushed, self._is_roused = True, False
                return True
            beats = [each.next_beat for each in connections]
            offer_at = self._offer_at if self._refused else math.inf
            left = min(deadline, offer_at, *beats) - monotonic()
            watched = [interrupt, *[each.fileno() for each in connections]]
            readable, _, _ = wait_ready(watched, [], [], max(left, 0))
            if interrupt in readable:
                self._is_pushed = hungry
                return True
            if not readable and monotonic() >= deadline:
                return True

    @property
    def _takable(self) -> set[int]:
        """What may be taken: neither paused, nor used up by its limits."""
        return self._mine.keys() - self._paused - self._closed

    def _give_back_unwanted(self, inlet: Inlet, hungry: bool) -> None:
        if not hungry:
            inlet.give_back()
        elif self._closed and inlet.has_pushed(self._closed):
            # it was on its way; others may have room for it
            inlet.give_back(of=self._closed)

    def _wanted(self) -> dict[int, tuple[str, int]]:
        """Return for each subscription its queue, and how many of it there is room for."""
        takable = self._takable
        return {
            each.id: (queue_name(each), max(1, min(self._rooms.get(each.id, 1), MOST_PUSHED)))
            for each in self._mine.values()
            if each.id in takable
        }

    def _reserve(self, limits: Mapping[int, int], limit: int) -> list[Held]:
        inlet, _ = self._connect()
        if not self._is_pushed:
            inlet.disarm()
        self._is_pushed = False
        self._turns += 1
        self._closed = {each for each, most in limits.items() if most <= 0}
        found: list[Held] = []
        while True:
            self._is_roused = False
            rooms = self._rooms_of(limits, limit, found)
            found += inlet.take_pushed(rooms, limit - len(found))
            rooms = self._rooms_of(limits, limit, found)
            found += self._fetch(inlet, self._hungry(inlet, rooms), limit - len(found))
            if not self._is_roused:
                break
        self._rooms = self._rooms_of(limits, limit, found)
        if len(found) >= limit:
            inlet.disarm()
        inlet.give_back()
        return sorted(found, key=self._order)

    def _rooms_of(
        self, limits: Mapping[int, int], limit: int, found: Sequence[Held]
    ) -> dict[int, int]:
        """Return for how many more of each subscription there is room."""
        had = Counter(held.subscription_id for held in found)
        kept = Counter(each.lease.delivery.subscription_id for _, each in self._refused)
        left = limit - len(found)
        rooms = {
            each: min(most - had[each], left)
            for each, most in limits.items()
            if each in self._mine and each not in self._paused and kept[each] < MOST_REFUSED
        }
        return {each: room for each, room in rooms.items() if room > 0}

    def _hungry(self, inlet: Inlet, rooms: Mapping[int, int]) -> list[Hungry]:
        """Return who may have more, beginning with another each time."""
        hungry = [
            Hungry(each, queue_name(self._mine[each]), room, self._counts.get(each, 1))
            for each, room in rooms.items()
            if not inlet.is_drained(each)
        ]
        start = self._turns % max(len(hungry), 1)
        return hungry[start:] + hungry[:start]

    def _fetch(self, inlet: Inlet, hungry: list[Hungry], limit: int) -> list[Held]:
        """Ask for what is ready, and whether anything was paused or resumed."""
        found: list[Held] = []
        is_news = limit > 0 and inlet.ask_for_news()
        if is_news and self._layout.is_quorum:
            # what is taken and given back goes to the end of such a queue
            inlet.get([])
            self._learn(inlet)
            hungry = [each for each in hungry if each.subscription_id not in self._paused]
            is_news = False
        while is_news or (hungry and len(found) < limit):
            is_news = False
            asked = [x for x in with_shares(hungry, limit - len(found)) if x.share > 0]
            answers = inlet.get(asked)
            self._learn(inlet)
            for each, got in zip(asked, answers, strict=True):
                found += self._taken(inlet, each, got)
            hungry = [each for each in hungry if each.has_more and each.room > 0]
        return found

    def _taken(self, inlet: Inlet, hungry: Hungry, got: Got) -> list[Held]:
        hungry.take(got)
        self._counts[hungry.subscription_id] = max(hungry.count, 1)
        if hungry.subscription_id not in self._paused:
            return got.found
        hungry.has_more = False
        inlet.settle([(held, SettleAction.RELEASE) for held in got.found])
        return []

    def _lease(self, held: Held) -> Lease:
        subscription = self._mine[held.subscription_id]
        return Lease(
            delivery_of(held, subscription),
            token=0,
            redelivered=held.is_redelivered,
            handle=held.handle,
        )

    def _stats(self, inlet: Inlet, subscription: Subscription) -> SubscriptionStats:
        name = queue_name(subscription)
        # in this order: asked for its count, a queue has passed on its dead letters before
        waiting = (inlet.count(name) or 0) + count_of(inlet.pushed, subscription.id)
        dead = inlet.count(beside(name, "dead")) or 0
        return SubscriptionStats(subscription.subscriber, waiting, None, None, dead)


def _deliveries_of(publications: Sequence[Publication]) -> list[Delivery]:
    return [delivery for each in publications for delivery in each.deliveries]
