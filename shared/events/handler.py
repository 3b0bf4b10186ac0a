"""The entrypoint: a drop-in for nameko's ``event_handler``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

import eventlet
from greenlet import GreenletExit
from nameko.events import BROADCAST, SERVICE_POOL, SINGLETON
from nameko.events import EventHandler as NamekoEventHandler
from nameko.exceptions import ContainerBeingKilled

from shared.contracts import contracts
from shared.errors import ContractError, HandlerAbortedError, HandlerTimeoutError
from shared.events.client import QueueClient
from shared.events.context import MessageContext
from shared.events.inbox import HandledBefore, Inbox
from shared.events.outcome import ExcInfo, RetryPolicy, broken, decide, settle
from shared.lifecycle import Backoff, DeliveryStatus
from shared.observe.traces import traced
from shared.settings import refuse_start
from shared.tables import OWN_METADATA
from shared.types import (
    LONGEST_ROUTE_BYTES,
    MAX_RETRIES_LIMIT,
    Failure,
    Lease,
    Outcome,
    Subscription,
    check_name,
)

_log = logging.getLogger(__name__)

LARGEST_BATCH = 1000
"""Deliveries of one batch; each is held in memory and under a lease."""


class EventHandler(NamekoEventHandler):
    """Handles the events of one type from one service.

    Takes what ``nameko.events.EventHandler`` takes, and:

    :param max_retries: retries after the first attempt, 0 to 100; what a dispatch says
        goes before it. ``requeue_on_error`` means no limit.
    :param backoff: the times between attempts.
    :param batch_size: the handler takes a list of up to so many payloads, in one worker.
        What it raises, it raises for all of them.
    :param batch_timeout: seconds that an incomplete batch waits for more.
    :param inbox: the name of the service's ``DatabaseSession`` in whose transaction the
        handler has its effects: these then happen once, however often a message comes. What
        it left uncommitted is committed when it returns.
    :param timeout: seconds after which :class:`~shared.errors.HandlerTimeoutError` is
        raised in the handler, at a point where it waits.
    """

    queue_consumer = QueueClient()
    subscription: Subscription

    def __init__(
        self,
        source_service: str,
        event_type: str,
        handler_type: str = SERVICE_POOL,
        reliable_delivery: bool = True,
        requeue_on_error: bool = False,
        *,
        max_retries: int | None = None,
        backoff: Backoff | None = None,
        timeout: float | None = None,
        batch_size: int | None = None,
        batch_timeout: float = 0.05,
        inbox: str | None = None,
        # nameko's, by name: it says of one that is misspelt only that object() takes none
        expected_exceptions: Any = (),
        sensitive_arguments: Any = (),
        sensitive_variables: Any = (),
    ) -> None:
        if batch_size is not None and not 1 <= batch_size <= LARGEST_BATCH:
            raise ValueError(f"batch_size: must be 1 to {LARGEST_BATCH}")
        if batch_timeout < 0:
            raise ValueError("batch_timeout: must be 0 or more seconds")
        if max_retries is not None and not 0 <= max_retries <= MAX_RETRIES_LIMIT:
            raise ValueError(f"max_retries: must be 0 to {MAX_RETRIES_LIMIT}")
        if timeout is not None and timeout <= 0:
            raise ValueError("timeout: must be more than 0 seconds")
        self.max_retries = max_retries
        self.backoff = backoff
        self.timeout = timeout
        self.batch_size = batch_size
        self.batch_timeout = batch_timeout
        self.inbox = inbox
        self._inbox: Inbox | None = None
        self._gathered: list[Lease] = []
        super().__init__(
            source_service,
            event_type,
            handler_type,
            reliable_delivery,
            requeue_on_error,
            expected_exceptions=expected_exceptions,
            sensitive_arguments=sensitive_arguments,
            sensitive_variables=sensitive_variables,
        )

    def setup(self) -> None:
        settings = self.queue_consumer.settings
        self.subscription = Subscription(
            queue=settings.queue_of(self.source_service),
            source=self.source_service,
            event_type=self.event_type,
            subscriber=self._subscriber(),
            handler_type=self.handler_type,
            reliable=self.reliable_delivery,
        )
        self._check_names()
        self._seconds = self.queue_consumer.counts.handler(self.subscription)
        if self.inbox is not None:
            handler = f"{self.container.service_name}.{self.method_name}"
            subscriber, days = self.subscription.subscriber, settings.inbox_days
            self._inbox = Inbox.of(self.container, self.inbox, handler, subscriber, days)
        self.queue_consumer.register_provider(self)

    def stop(self) -> None:
        self.queue_consumer.unregister_provider(self)
        while self._gathered:
            self._hand_back(self._gathered.pop())

    def kill(self) -> None:
        self.queue_consumer.unregister_provider(self)

    # --- one delivery

    def handle(self, lease: Lease) -> None:
        """Run the handler for one delivery, or once its batch is complete."""
        if self.batch_size is None:
            self._start([lease])
            return
        self._gathered.append(lease)
        if len(self._gathered) >= self.batch_size:
            self._start_batch()
        elif len(self._gathered) == 1:
            eventlet.spawn_after(self.batch_timeout, self._start_batch)

    def handle_result(
        self,
        message: Sequence[Lease],
        worker_ctx: Any,  # noqa: ARG002 - part of nameko's signature
        result: Any = None,
        exc_info: ExcInfo | None = None,
    ) -> tuple[Any, ExcInfo | None]:
        """Settle deliveries by what their handler returned or raised; may be overridden.

        :param message: the leases that the handler had: one, or those of its batch.
        """
        self.handle_message_processed(message, result, exc_info)
        return result, exc_info

    def handle_message_processed(
        self,
        message: Sequence[Lease],
        result: Any = None,  # noqa: ARG002 - part of nameko's signature
        exc_info: ExcInfo | None = None,
    ) -> None:
        """Settle deliveries; may be overridden, as :meth:`handle_result` may."""
        for lease in message:
            self._settle(decide(lease, self.retry_policy(lease), exc_info))

    def retry_policy(self, lease: Lease) -> RetryPolicy:
        """Return how a delivery is retried: dispatch goes before handler, that before setting."""
        retries = self.queue_consumer.settings.retries
        said = (lease.delivery.message.max_retries, self.max_retries, retries.limit)
        limit = next(each for each in said if each is not None)
        return RetryPolicy(
            None if self.requeue_on_error else limit, self.backoff or retries.backoff
        )

    # --- within

    def _start_batch(self) -> None:
        leases, self._gathered = self._gathered, []
        if leases:  # else it was completed before its time was over
            self._start(leases)

    def _start(self, leases: Sequence[Lease]) -> None:
        """Run the handler in a worker of the container."""
        read = [(lease, payload) for lease in leases for payload in self._payload(lease)]
        if not read:
            return
        leases, payloads = [lease for lease, _ in read], [payload for _, payload in read]
        given = payloads if self.batch_size else payloads[0]
        # a batch has many origins: none of their contexts is that of its worker
        context = {} if self.batch_size else leases[0].delivery.message.metadata
        try:
            worker_ctx = self.container.spawn_worker(
                self,
                (given,),
                {},
                context_data=dict(context.get(OWN_METADATA, {}).get("context", {})),
                handle_result=partial(self.handle_result, leases),
            )
        except ContainerBeingKilled:
            for lease in leases:
                self._hand_back(lease)
            return
        # The worker has not begun yet: it does when this greenthread waits.
        messages = [MessageContext.of(x, self.subscription.subscriber) for x in leases]
        worker_ctx.leases = leases
        worker_ctx.message_context = messages if self.batch_size else messages[0]
        method = getattr(worker_ctx.service, self.method_name)
        method = traced(method, leases, self.subscription, worker_ctx)
        run = self._run if self._inbox is None else partial(self._run_once, worker_ctx)
        setattr(worker_ctx.service, self.method_name, partial(run, method))

    def _payload(self, lease: Lease) -> list[Any]:
        """Return the payload, or nothing when no attempt could make it succeed."""
        try:
            return [self._read(lease)]
        except ContractError as exc:
            self._settle(broken(lease, exc))
            return []

    def _hand_back(self, lease: Lease) -> None:
        failure = Failure("Released", "the worker stopped")
        self._settle(Outcome(lease, DeliveryStatus.PENDING, failure))

    def _run_once(self, worker_ctx: Any, method: Callable[..., Any], given: Any) -> Any:
        """Run the handler for those of its messages that the inbox does not have yet."""
        inbox: Any = self._inbox
        if not self._drop_handled(worker_ctx, given):
            return None
        ids = [lease.delivery.message.id for lease in worker_ctx.leases]
        try:
            return inbox.run(worker_ctx.service, ids, partial(self._run, method, given))
        except HandledBefore:
            # by another worker, just now; what of a batch was not is handled again without
            if self._drop_handled(worker_ctx, given):
                while worker_ctx.leases:
                    self._hand_back(worker_ctx.leases.pop())
            return None

    def _drop_handled(self, worker_ctx: Any, given: Any) -> bool:
        """Say whether there is anything to run; settle what the inbox has, if there is more."""
        leases = worker_ctx.leases
        inbox: Any = self._inbox
        ids = [lease.delivery.message.id for lease in leases]
        handled = inbox.handled(ids)
        for id_ in handled:
            _log.info("handled before message_id=%s subscriber=%s", id_, inbox.subscriber)
        if handled.issuperset(ids):
            return False  # who returns now has completed all of them
        # two copies of one message may be in a batch
        left = [n for n, id_ in enumerate(ids) if id_ not in handled and id_ not in ids[:n]]
        if len(left) < len(ids):
            dropped = [lease for n, lease in enumerate(leases) if n not in left]
            for each in (leases, worker_ctx.message_context, given):
                # the lists that others hold
                each[:] = [each[n] for n in left]
            for lease in dropped:
                self._settle(Outcome(lease, DeliveryStatus.COMPLETED))
        return True

    def _run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = monotonic()
        try:
            return self._run_in_time(method, *args, **kwargs)
        except (Exception, KeyboardInterrupt, HandledBefore):
            raise
        except BaseException as exc:
            if isinstance(exc, GreenletExit) and self.queue_consumer.is_stopping:
                raise  # the grace time is over, and the delivery handed back
            raise HandlerAbortedError(f"the handler raised {exc!r}") from exc
        finally:
            self._seconds.observe(monotonic() - began)

    def _run_in_time(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.timeout is None:
            return method(*args, **kwargs)
        error = HandlerTimeoutError(f"the handler ran longer than {self.timeout} s")
        with eventlet.Timeout(self.timeout, error):
            return method(*args, **kwargs)

    def _read(self, lease: Lease) -> Any:
        message = lease.delivery.message
        try:
            payload = message.payload
        except ValueError as exc:
            raise ContractError({"payload": f"is not JSON: {exc}"}) from exc
        contracts.check(self.source_service, self.event_type, payload, message.metadata)
        return payload

    def _settle(self, outcome: Outcome) -> None:
        settle(outcome, self.queue_consumer.end, self.subscription.subscriber)

    def _subscriber(self) -> str:
        own = f"{self.container.service_name}.{self.method_name}"
        if self.handler_type is SINGLETON:
            return "singleton"
        if self.handler_type is BROADCAST:
            return f"{own}-{self.broadcast_identifier}"
        return own

    def _check_names(self) -> None:
        try:
            check_name(self.source_service, "source_service")
            check_name(self.event_type, "event_type")
        except ValueError as exc:
            refuse_start(f"{self}: {exc}")
        route = f"evt-{self.source_service}-{self.event_type}--{self.subscription.subscriber}"
        if len(route.encode()) > LONGEST_ROUTE_BYTES:
            refuse_start(f"{route}: has more than {LONGEST_ROUTE_BYTES} bytes")


event_handler = EventHandler.decorator
