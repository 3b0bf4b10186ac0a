"""The pump where there is no message log: events go to the broker, and nowhere else.

For who wants retries, priorities and delays, and nothing recorded: ``QUEUE_LOG=off``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any
from zlib import crc32

from shared.errors import DispatchError, StoreUnavailableError
from shared.events.carrier import Carrier
from shared.events.commands import (
    Append,
    Call,
    Check,
    Consume,
    Crashed,
    Declare,
    Declared,
    Down,
    Finish,
    Lost,
    Noticed,
    Publish,
    Published,
    Refused,
    Reserved,
    Settle,
    StopConsuming,
    Unpublished,
    Up,
)
from shared.native import Mailbox, Promise, Thread
from shared.observe.counts import PumpCounts
from shared.providers import QueueProvider
from shared.settings import Settings
from shared.types import Delivery, Envelope, Lease, Outcome, Subscription, new_message_id

FINISH_SECONDS = 5.0
"""How long the broker may take for what is left to be told to it."""

IDLE_SECONDS = 60.0


@dataclass(slots=True)
class _Pending:
    """An append, and how many of its messages are not confirmed yet."""

    promise: Promise
    left: int


class UnloggedPump:
    """See the module's docstring; it takes the parameters of :class:`~shared.events.pump.Pump`."""

    def __init__(
        self,
        settings: Settings,
        provider: QueueProvider,
        mailbox: Mailbox,
        on_leases: Callable[[list[Lease]], None],
        say: Callable[..., None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self.counts = PumpCounts()
        self._mailbox = mailbox
        self._on_leases = on_leases
        self._say_on_hub = say
        self._on_crash = on_crash
        self._carrier = Carrier(settings, provider, mailbox.send, mailbox.answer)
        self._thread = Thread(self._carrier.run, "queue-carrier")
        self._consuming: Consume | None = None
        self._mine: list[Subscription] = []
        self._pending: dict[int, _Pending] = {}
        self._reason = "the broker did not answer yet"
        self._finishing = False
        self._die_at: float | None = None
        self.is_over = False
        self._handlers: dict[type, Callable[[Any], None]] = {
            Append: self._append,
            Call: self._refuse,
            Consume: self._consume,
            Check: self._tell,
            StopConsuming: self._tell,
            Finish: self._finish,
            Outcome: self._settle,
            Declared: self._take_declared,
            Published: self._take_published,
            Unpublished: self._take_unpublished,
            Refused: self._take_refused,
            Reserved: self._take_reserved,
            Up: self._take_up,
            Down: self._take_down,
            Crashed: self._take_crashed,
            Noticed: self._take_notice,
            Lost: self._tolerate,
        }

    def die_by(self, deadline: float) -> None:
        """Signal handler: hand back everything at ``deadline``, a monotonic time."""
        self._die_at = deadline
        self._mailbox.inbox.ring()

    def run(self) -> None:
        """Work until told to finish: the thread's main function."""
        self._thread.start()
        try:
            while not self._finishing:
                self._mailbox.inbox.wait(self._seconds_left())
                self._turn()
        except BaseException as exc:
            self._mailbox.answer(self._on_crash, exc)
        finally:
            self._end()
            self.is_over = True

    def _seconds_left(self) -> float:
        return IDLE_SECONDS if self._die_at is None else max(0.0, self._die_at - monotonic())

    def _turn(self) -> None:
        for command in self._mailbox.inbox.take():
            self._handlers[type(command)](command)
        if self._die_at is not None and monotonic() >= self._die_at:
            self._finishing = True

    # --- from the hub

    def _append(self, command: Append) -> None:
        deliveries = [Delivery(0, 0, e, delay=_delay(e)) for e in map(_timed, command.envelopes)]
        pending = _Pending(command.promise, len(deliveries))
        self._pending |= {id(delivery): pending for delivery in deliveries}
        self._tell(Publish(deliveries))

    def _refuse(self, command: Call) -> None:
        error = StoreUnavailableError("there is no message log: QUEUE_LOG is off")
        self._mailbox.answer(command.promise.reject, error)

    def _consume(self, command: Consume) -> None:
        self._consuming = command
        self._mine = [replace(each, id=_number(each)) for each in command.subscriptions]
        self._tell(Declare(self._mine, command.batches, command.workers))

    def _settle(self, outcome: Outcome) -> None:
        self._tell(Settle([outcome.settlement()]))

    def _finish(self, _command: Finish) -> None:
        self._finishing = True

    # --- from the carrier

    def _take_declared(self, _report: Declared) -> None:
        if self._consuming is not None:
            self._mailbox.answer(self._consuming.on_registered, self._mine)

    def _take_published(self, report: Published) -> None:
        for delivery in report.deliveries:
            pending = self._pending.pop(id(delivery))
            pending.left -= 1
            if not pending.left:
                self._mailbox.answer(pending.promise.resolve, None)

    def _take_unpublished(self, report: Unpublished) -> None:
        self._reject(report.deliveries, report.reason or self._reason)

    def _take_refused(self, report: Refused) -> None:
        self._reject(report.deliveries, report.reason)

    def _reject(self, deliveries: list[Delivery], reason: str) -> None:
        for delivery in deliveries:
            error = DispatchError(f"the broker does not have it for sure: {reason}")
            self._mailbox.answer(self._pending.pop(id(delivery)).promise.reject, error)

    def _take_reserved(self, report: Reserved) -> None:
        self._mailbox.answer(self._on_leases, [_named(lease) for lease in report.leases])

    def _take_up(self, _report: Up) -> None:
        self._reason = ""

    def _take_down(self, report: Down) -> None:
        self._reason = report.reason
        self._mailbox.answer(
            self._say_on_hub, logging.ERROR, "provider unreachable: %s", report.reason
        )

    def _take_notice(self, report: Noticed) -> None:
        self._mailbox.answer(self._say_on_hub, logging.WARNING, "%s", report.text)

    def _tolerate(self, _report: Any) -> None:
        """Do nothing: whoever got it as well handles it twice, and no log knows."""

    def _take_crashed(self, report: Crashed) -> None:
        raise report.error

    # --- within

    def _tell(self, command: Any) -> None:
        self._carrier.inbox.send(command)

    def _end(self) -> None:
        self._tell(Finish())
        self._thread.join_natively(FINISH_SECONDS)


def _timed(envelope: Envelope) -> Envelope:
    return replace(envelope, created_at=datetime.now(UTC).replace(tzinfo=None))


def _delay(envelope: Envelope) -> float:
    """Return the seconds until it is due: by this machine's clock, for want of another."""
    if envelope.scheduled_at is None or envelope.created_at is None:
        return envelope.delay or 0.0
    return max(0.0, (envelope.scheduled_at - envelope.created_at).total_seconds())


def _number(subscription: Subscription) -> int:
    """Return a number that each process gives to a subscription alike."""
    names = (subscription.queue, subscription.event_type, subscription.subscriber)
    return crc32("\n".join(names).encode()) or 1


def _named(lease: Lease) -> Lease:
    """Return the lease of a message with an id, which a plain dispatcher does not give."""
    if lease.delivery.message.id:
        return lease
    message = replace(lease.delivery.message, id=new_message_id())
    return replace(lease, delivery=replace(lease.delivery, message=message))
