"""The provider that is moved away from: what it still has is consumed, and nothing goes back there.

A second pump beside the one that publishes. What it reserves is claimed in the log before it runs,
and then removed from the old provider at once: from there on the log alone has it. So whatever
becomes of it, another attempt included, goes on at the new provider.

A provider that works in the log's own tables needs none of this: what it has is in the log, and the
other pump relays it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import eventlet

from shared.database import Transaction
from shared.errors import ProviderError, ProviderUnavailableError
from shared.events.apart import ApartPump, ApartTurn, Reports
from shared.events.commands import Ask, Consume, Finish, Forget
from shared.events.pump import Pump
from shared.native import Mailbox, Promise, Thread
from shared.providers import (
    QueueProvider,
    draining_class,
    draining_settings,
    make_provider,
    provider_class,
)
from shared.settings import Settings
from shared.stopping import stopper
from shared.store import backlog
from shared.store.moving import Route
from shared.types import Delivery, Lease, Outcome, SettleAction, Settlement, Subscription


def route_of(settings: Settings) -> Route:
    """Return from which provider to which deliveries move, where the settings name two."""
    return Route(
        settings.drain,
        settings.provider,
        from_log=draining_class(settings).capabilities.joins_log,
        to_log=provider_class(settings).capabilities.joins_log,
    )


class DrainPump(ApartPump):
    """See the module's docstring.

    :param settings: those of the old provider.
    :param new: those of the process.
    :param relay: called on the hub when there is something for the new provider.
    """

    def __init__(
        self, settings: Settings, *args: Any, new: Settings, relay: Callable[[], None]
    ) -> None:
        super().__init__(settings, *args)
        self._is_moving = self._log_keeps_leases = self._is_prepared = True
        heir = make_provider(new)
        self._heir = heir if heir.capabilities.joins_log else None
        self._relay_now = relay
        self._returned: list[Delivery] = []

    @property
    def _may_sweep(self) -> bool:
        return False  # the other pump does

    def _activate(self, wanted: Consume) -> None:
        # the other pump says in the log that they get events, once the new provider is ready
        self._is_activated = True
        self._mailbox.answer(wanted.on_registered, self._mine)

    def _sign_and_watch(self) -> None:
        """Leave it to the other pump."""

    # --- one turn

    def _run_what_is_fit(self, reports: Reports, ended: list[Outcome]) -> list[Lease]:
        del ended
        return reports.reserved

    def _all_steps(self, turn: ApartTurn, tx: Transaction) -> None:
        self._returned = []
        super()._all_steps(turn, tx)

    def _begin(self, tx: Transaction, turn: ApartTurn) -> None:
        super()._begin(tx, turn)
        started = turn.started
        early = [x.lease.delivery for x in started.settled if x.action == SettleAction.RETRY]
        if early:
            self._put_back(tx, early)
        started.settled = [Settlement(x.lease, SettleAction.ACKNOWLEDGE) for x in started.settled]
        turn.adopted = {lease.key for lease in started.run}

    def _put_back(self, tx: Transaction, deliveries: list[Delivery]) -> None:
        self._returned += deliveries
        if self._heir is None:
            backlog.give_back(tx, deliveries)
        else:
            # one that has a time is found by it
            self._heir.publish([replace(each, delay=0.0) for each in deliveries], tx)

    def _note_where(self, tx: Transaction, leases: list[Lease]) -> None:
        """Leave it open: the log alone has it from now on."""

    def _answer(self, turn: ApartTurn) -> None:
        super()._answer(turn)
        if not self._returned:
            return
        if self._heir is None:
            self._mailbox.answer(self._relay_now)
        else:
            self._heir.published(self._returned)

    def _resume(self, resumed: list[Lease]) -> None:
        super()._resume(resumed)
        self._detach(resumed)

    # --- the end

    def _retire(self, own: list[Subscription]) -> None:
        self._tell(Forget(own))

    def _close(self) -> None:
        super()._close()
        if self._heir is not None:
            self._heir.close()


class Drain:
    """A service's end of the second pump; it knows which pump handed out what."""

    def __init__(
        self,
        pump: Pump,
        settings: Settings,
        take: Callable[[list[Lease]], None],
        say: Callable[..., None],
        crash: Callable[[BaseException], None],
        relay: Callable[[], None],
    ) -> None:
        self.mailbox = Mailbox()
        self._settings = settings
        self._take = take
        self._new = pump
        own = draining_settings(settings)
        self._old = DrainPump(
            own,
            make_provider(own),
            self.mailbox,
            self._take_old,
            say,
            crash,
            new=settings,
            relay=relay,
        )
        self._thread = Thread(self._old.run, "queue-drain")
        # what the hub has of each pump: by identity, since a lease changes hands as it is
        self._in_hand: dict[int, tuple[Pump, Lease]] = {}
        self._counts: dict[Pump, Counter[int]] = {self._old: Counter(), pump: Counter()}
        self._batches: dict[int, int] = {}
        pump.elsewhere = lambda: self._workers_of(self._old)
        self._old.elsewhere = lambda: self._workers_of(pump)

    @classmethod
    def beside(cls, pump: Any, settings: Settings, *callbacks: Any) -> Drain | None:
        """Return one, where a provider is moved away from that has storage of its own."""
        if not settings.drain or draining_class(settings).capabilities.joins_log:
            return None
        return cls(pump, settings, *callbacks)

    def start(self) -> None:
        """Start the pump."""
        self.mailbox.open()
        self._thread.start()
        stopper.add(self.mailbox.rouse, self._old, self._settings.grace)

    def consume(self, command: Consume) -> None:
        """Have it consume what the other pump does."""
        self.mailbox.send(command)

    def stop(self, seconds: float) -> None:
        """Have the pump end, within so many seconds."""
        self.mailbox.send(Finish())
        if self._thread.join(seconds):
            stopper.remove(self.mailbox.rouse, self._old)
            self.mailbox.close()

    def ask(self, function: Callable[[QueueProvider], Any], seconds: float) -> Any:
        """Return what ``function`` returns, done with the old provider.

        :raises ProviderError: what it raises, or ProviderUnavailableError.
        """
        promise = Promise()
        self.mailbox.send(Ask(function, promise))
        with eventlet.Timeout(seconds, False):
            return promise.wait()
        raise ProviderUnavailableError(f"{self._settings.drain} did not answer in time")

    def left(self, subscriptions: Sequence[Subscription], seconds: float) -> int | None:
        """Count what the old provider has; ``None`` when it does not answer."""
        try:
            return int(self.ask(lambda provider: left_in(provider, subscriptions), seconds))
        except ProviderError:
            return None

    # --- who has what

    def came(self, leases: Sequence[Lease], pump: Pump | None = None) -> None:
        """Note what a pump handed out: the new one's, unless it is said."""
        pump = pump or self._new
        for lease in leases:
            self._in_hand[id(lease)] = pump, lease
            self._counts[pump][lease.delivery.subscription_id] += 1

    def owns(self, lease: Lease) -> bool:
        """Say whether the old provider's pump handed it out; its worker is free now."""
        pump, _ = self._in_hand.pop(id(lease), (None, None))
        if pump is None:
            return False
        self._counts[pump][lease.delivery.subscription_id] -= 1
        other = self._new if pump is self._old else self._old
        other.look_again()
        return pump is self._old

    def note_batches(self, batches: dict[int, int]) -> None:
        """Note how many deliveries of each subscription one worker takes together."""
        self._batches = batches

    def _take_old(self, leases: list[Lease]) -> None:
        self.came(leases, self._old)
        self._take(leases)

    def _workers_of(self, pump: Pump) -> int:
        """A native thread: return how many workers have what a pump handed out."""
        counts = list(self._counts[pump].items())
        return sum(-(-n // self._batches.get(each, 1)) for each, n in counts)


def left_in(provider: QueueProvider, subscriptions: Sequence[Subscription]) -> int:
    """Count what a provider has: what waits, is in hand, or has a time."""
    stats = provider.get_queue_stats(subscriptions)
    counted = sum(each.waiting + (each.active or 0) + (each.scheduled or 0) for each in stats)
    return counted + (provider.count_delayed() or 0)
