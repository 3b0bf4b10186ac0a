"""A service's own end of the queue: shared by all its dispatchers and handlers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import eventlet
from eventlet.queue import LightQueue
from nameko.extensions import SharedExtension

from shared.clock import monotonic
from shared.database import Transaction, database_url
from shared.errors import DedupeConflictError, ProviderUnavailableError, SettingsError
from shared.events.apart import ApartPump
from shared.events.commands import (
    Append,
    Ask,
    Call,
    Check,
    Consume,
    Finish,
    Forget,
    StopConsuming,
)
from shared.events.draining import Drain
from shared.events.joined import JoinedPump
from shared.events.pump import Pump
from shared.events.shortcut import Shortcut
from shared.events.unlogged import UnloggedPump
from shared.lifecycle import DeliveryStatus
from shared.native import Mailbox, Promise, Thread
from shared.observe.counts import ServiceCounts
from shared.providers import Capabilities, QueueProvider, check_provider, make_provider
from shared.settings import Settings, refuse_start, settings_or_exit
from shared.stopping import stopper
from shared.store.dedupe import First
from shared.store.log import IN_LOG, Handover
from shared.types import Delivery, Envelope, Failure, Lease, Outcome, Subscription

if TYPE_CHECKING:
    from shared.events.handler import EventHandler
    from shared.observe.endpoint import Endpoint

_log = logging.getLogger(__name__)

START_SECONDS = 5.0
"""How long a start waits for the log and its subscriptions; it goes on in the background."""

HEALTH_SECONDS = 3.0
"""How long a health check waits for the provider before it is taken to be down."""

ASK_SECONDS = 10.0
"""How long the provider may take for what it is asked to do."""

FINISH_SECONDS = 10.0
"""How long a stop waits for the last outcomes to be stored."""


HELD_SECONDS = 0.5
"""How long a delivery may wait in a process for a free worker: it was reserved ahead, and what
came before it takes longer than was to be expected."""

WITHOUT_LOG = "QUEUE_LOG=off: events are not stored, not relayed after an outage, not counted"


class QueueClient(SharedExtension):
    """Starts and stops the pump, and hands deliveries to their handlers.

    One for each service container, whatever number of extensions use it.
    """

    settings: Settings
    counts: ServiceCounts

    def __init__(self) -> None:
        # filled by the set-ups of the handlers, which run in no order
        self._handlers: list[EventHandler] = []
        self._by_subscription: dict[int, EventHandler] = {}
        self.is_stopping = False
        self._is_stopped = False
        self._endpoint: Endpoint | None = None

    def bind(self, container: Any) -> Any:
        instance = super().bind(container)
        # read while the container is made: the process can still end with a status
        instance.settings = settings_or_exit(container.config)
        instance.counts = ServiceCounts(container.service_name)
        try:
            check_provider(instance.settings)
        except SettingsError as exc:
            refuse_start(exc)
        return instance

    def setup(self) -> None:
        self._mailbox = Mailbox()
        self._pump = self._make_pump()
        self.counts.pump = self._pump.counts
        self._shortcut = Shortcut.beside(
            self._pump, self.settings, self._mailbox, self.counts.shortcut
        )
        self._thread = Thread(self._pump.run, "queue-pump")
        self._inbox: Any = LightQueue()
        self._drain = Drain.beside(
            self._pump, self.settings, self._take, _log.log, self._crash, self.relay
        )

    def start(self) -> None:
        self._mailbox.open()
        self._thread.start()
        stopper.add(self._mailbox.rouse, self._pump, self.settings.grace)
        if self._drain is not None:
            self._drain.start()
        self._hander = self.container.spawn_managed_thread(
            self._hand_out, identifier="queue-client"
        )
        self._consume()
        self._expose()

    def stop(self) -> None:
        if self._is_stopped:
            # whoever stops everything once more must not end it sooner
            self._thread.join(FINISH_SECONDS)
            return
        self._is_stopped = True
        if self._drain is not None:
            self._drain.stop(FINISH_SECONDS)
        if self._endpoint is not None:
            self._endpoint.remove(self.counts)
        deadline = monotonic() + FINISH_SECONDS
        if self._shortcut is not None:
            self._shortcut.close(FINISH_SECONDS / 2)
        self._mailbox.send(Finish())
        if not self._thread.join(deadline - monotonic()):
            _log.error("the last outcomes could not be stored in %s s", FINISH_SECONDS)
            return
        self._hander.kill()
        stopper.remove(self._mailbox.rouse, self._pump)
        self._mailbox.close()

    def kill(self) -> None:
        self.stop()

    # --- for handlers

    def register_provider(self, handler: EventHandler) -> None:
        """Have ``handler`` get the deliveries of its subscription."""
        self._handlers.append(handler)

    def unregister_provider(self, _handler: EventHandler) -> None:
        """Stop reserving; what runs may finish within the grace time."""
        if not self.is_stopping:
            self.is_stopping = True
            self._mailbox.send(StopConsuming())
            if self._drain is not None:
                self._drain.mailbox.send(StopConsuming())
            eventlet.spawn_after(self.settings.grace, self._release_running)
        self._release_unstarted()

    def end(self, outcome: Outcome) -> None:
        """Have an outcome stored and the delivery settled; does not wait for it."""
        mailbox = self._mailbox
        if self._drain is not None and self._drain.owns(outcome.lease):
            mailbox = self._drain.mailbox
        mailbox.send(outcome)
        self.counts.handled[outcome.lease.delivery.subscription_id, outcome.status] += 1

    def ack_message(self, message: Sequence[Lease]) -> None:
        """Take deliveries to be completed: what nameko's own has for ``handle_result``."""
        for lease in message:
            self.end(Outcome(lease, DeliveryStatus.COMPLETED))

    def requeue_message(self, message: Sequence[Lease]) -> None:
        """Hand deliveries back, to be handled again at once; their attempt does not count."""
        for lease in message:
            self.end(Outcome(lease, DeliveryStatus.PENDING, Failure("Requeued", "by its handler")))

    # --- for dispatchers and operations

    def append(self, envelopes: Sequence[Envelope], *, again: bool = False) -> list[str]:
        """Store events, and return once they are.

        :param again: some of them may be stored already.
        :returns: the message ids: of what was dispatched with the same key before, that one's.
        :raises DispatchError: when nothing was stored.
        :raises DispatchUncertainError: when that could not be found out.
        :raises DedupeConflictError: when that one had another fingerprint.
        """
        if self._shortcut is not None and self._shortcut.append(envelopes, again=again):
            self.counts.count_dispatched(envelopes)
            return [envelope.id for envelope in envelopes]
        promise = Promise()
        self._mailbox.send(Append(envelopes, promise, again))
        firsts = promise.wait() or {}
        self.counts.count_dispatched(each for each in envelopes if each.id not in firsts)
        return [first_id(envelope, firsts.get(envelope.id)) for envelope in envelopes]

    def call(self, function: Callable[[Transaction], tuple[Any, list[Delivery]]]) -> Any:
        """Run ``function`` in a transaction of the log; publish the deliveries that it returns.

        :returns: the first thing that ``function`` returns.
        :raises QueueError: what it raises, or StoreUnavailableError.
        """
        promise = Promise()
        self._mailbox.send(Call(function, promise))
        return promise.wait()

    def relay(self) -> None:
        """Have what is to be published looked for now, and not only when it is time."""
        self._mailbox.send(Call(lambda _tx: (None, []), Promise()))

    def health(self) -> bool:
        """Say whether the provider answers, within a few seconds."""
        promise = Promise()
        self._mailbox.send(Check(promise))
        with eventlet.Timeout(HEALTH_SECONDS, False):
            return bool(promise.wait())
        return False

    def ask(self, function: Callable[[QueueProvider], Any]) -> Any:
        """Return what ``function`` returns, done with the provider by the thread that owns it.

        :raises ProviderError: what it raises, or ProviderUnavailableError.
        """
        promise = Promise()
        self._mailbox.send(Ask(function, promise))
        with eventlet.Timeout(ASK_SECONDS, False):
            return promise.wait()
        raise ProviderUnavailableError(f"{self.settings.provider} did not answer in time")

    def ask_all(self, function: Callable[[QueueProvider], Any]) -> None:
        """Do something with the provider, and first with the one that is moved away from.

        :raises ProviderError: as :meth:`ask`.
        """
        if self._drain is not None:
            self._drain.ask(function, ASK_SECONDS)
        self.ask(function)

    def left(self, subscriptions: Sequence[Subscription]) -> int | None:
        """Count what the provider still has that is moved away from, apart from the log.

        :returns: ``None`` when it does not answer.
        """
        return self._drain.left(subscriptions, HEALTH_SECONDS) if self._drain is not None else 0

    def forget(self, gone: Sequence[Subscription]) -> None:
        """Have the provider remove subscriptions that were retired, as soon as it answers."""
        self._mailbox.send(Forget(list(gone)))
        if self._drain is not None:
            self._drain.mailbox.send(Forget(list(gone)))

    @property
    def joins_log(self) -> bool:
        """Whether the provider works in the log's own tables."""
        return self._is_joined

    @property
    def handover(self) -> Handover:
        """What becomes of deliveries that a :meth:`call` appends."""
        return self._handover

    # --- within

    def _expose(self) -> None:
        """Tell what is counted, where the settings say that anybody asks."""
        if self.settings.metrics_address is None:
            return
        # loaded only where it is wanted: every process that starts would else pay for it
        from shared.observe.endpoint import endpoint_at

        self._endpoint = endpoint_at(self.settings.metrics_address)
        self._endpoint.add(self.counts)

    def _make_pump(self) -> Pump | UnloggedPump:
        provider = make_provider(self.settings)
        self._is_joined = provider.capabilities.joins_log
        self._handover = handover_of(provider.capabilities)
        kind: type[Pump | UnloggedPump] = ApartPump
        if not self.settings.log:
            kind = UnloggedPump
        elif self._is_joined:
            kind = JoinedPump
        return kind(self.settings, provider, self._mailbox, self._take_own, _log.log, self._crash)

    def _consume(self) -> None:
        wanted = [handler.subscription for handler in self._handlers]
        ready = Promise()

        def learn(registered: list[Subscription]) -> None:
            for handler, subscription in zip(self._handlers, registered, strict=True):
                self._by_subscription[subscription.id] = handler
                self.counts.subscriptions[subscription.id] = subscription
            if self._drain is not None:
                sizes = {each.id: size for each, size in zip(registered, batches, strict=True)}
                self._drain.note_batches(sizes)

        def on_registered(registered: list[Subscription]) -> None:
            learn(registered)
            self._say_ready()
            ready.resolve(None)

        batches = [handler.batch_size or 1 for handler in self._handlers]
        if self._drain is not None:
            self._drain.consume(Consume(wanted, batches, self.container.max_workers, learn))
        self._mailbox.send(Consume(wanted, batches, self.container.max_workers, on_registered))
        with eventlet.Timeout(START_SECONDS, False):
            ready.wait()
            return
        _log.warning(
            "the message log or its provider does not answer yet; work begins when it does"
        )

    def _say_ready(self) -> None:
        database = database_url(self.settings).render_as_string(hide_password=True)
        _log.info(
            "%s: queue ready provider=%s database=%s subscriptions=%d",
            self.container.service_name,
            self.settings.provider,
            database if self.settings.log else f"none ({WITHOUT_LOG})",
            len(self._handlers),
        )

    def _take_own(self, leases: list[Lease]) -> None:
        if self._drain is not None:
            self._drain.came(leases)
        self._take(leases)

    def _take(self, leases: list[Lease]) -> None:
        for lease in leases:
            self._inbox.put(lease)
        if not self._is_joined or self._drain is not None:
            eventlet.spawn_after(HELD_SECONDS, self._give_back_held, leases)

    def _give_back_held(self, leases: list[Lease]) -> None:
        """Give back what no worker was free for: others may be."""
        failure = Failure("Released", "no worker was free")
        for lease in leases:
            if lease in self._inbox.queue:
                self._inbox.queue.remove(lease)
                self.end(Outcome(lease, DeliveryStatus.PENDING, failure))

    def _wait_for_worker(self) -> None:
        slots = self.container._worker_pool.sem
        slots.acquire()
        slots.release()

    def _hand_out(self) -> None:
        try:
            while True:
                self._wait_for_worker()
                self._hand_out_one(self._inbox.get())
        except Exception as exc:
            self._crash(exc)

    def _hand_out_one(self, lease: Lease) -> None:
        if self.is_stopping:
            self._release(lease)
        else:
            self._by_subscription[lease.delivery.subscription_id].handle(lease)

    def _release(self, lease: Lease) -> None:
        failure = Failure("Released", "the worker stopped")
        self.end(Outcome(lease, DeliveryStatus.PENDING, failure))

    def _release_unstarted(self) -> None:
        while self._inbox.qsize():
            self._release(self._inbox.get())

    def _release_running(self) -> None:
        """Grace time is over: hand back what still runs, unburnt, and end its workers."""
        for worker_ctx, greenthread in list(self.container._worker_threads.items()):
            leases = getattr(worker_ctx, "leases", ())
            for lease in leases:
                _log.warning("grace time over message_id=%s", lease.delivery.message.id)
                self._release(lease)
            if leases:
                greenthread.kill()

    def _crash(self, error: BaseException) -> None:
        _log.critical("the queue's thread ended", exc_info=error)
        # in a greenthread of its own: killing ends the one that brings us this
        eventlet.spawn_n(self.container.kill, (type(error), error, error.__traceback__))


def handover_of(capabilities: Capabilities) -> Handover:
    """Return what becomes of deliveries that are stored in a call, to be published after it."""
    if capabilities.joins_log:
        return IN_LOG
    return Handover(is_open=True, fans_out=capabilities.fans_out)


def first_id(envelope: Envelope, first: First | None) -> str:
    """Return the id by which an event is stored: its own, or that of what had its key first.

    :raises DedupeConflictError: when that one had another fingerprint.
    """
    if first is None:
        return envelope.id
    if envelope.dedupe is not None and envelope.dedupe.fingerprint != first.fingerprint:
        raise DedupeConflictError(f"{envelope.dedupe.key} came before, with something else")
    return first.message_id
