"""A clock that moves when it is told to, and the ``embedded`` provider waiting by it.

What is real stays real: the pump and its thread, the message log on SQLite, eventlet's
hub. Only the time that they go by is another. When all of them have nothing left to do
before a later time, the clock goes there at once.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic as real_monotonic
from typing import Any

import eventlet
import nameko.timer
from eventlet import hubs
from sqlalchemy import Engine, event

from shared import clock
from shared.events import relay
from shared.events.client import QueueClient
from shared.lifecycle import Backoff
from shared.native import select as wait_readable
from shared.native import sleep
from shared.providers.embedded import EmbeddedProvider
from shared.store.subscriptions import FORGOTTEN_AFTER_SECONDS
from shared.types import Lease, Settlement, Subscription

REAL_SECONDS = 10.0
"""How long a handler may wait for what is real, such as the answer of a server."""

SHORT_SECONDS = 0.01
"""Waits of up to so long pass by themselves: somebody tries again soon, for a lock mostly."""

MOST_SHORT_WAITS = 100
"""Short waits after one another that are let pass; more are a loop that never ends."""

PAUSE_SECONDS = 0.0002
"""How long to leave the processor to a pump that is at work."""

LONG_SECONDS = 3600.0

SWEEP_SECONDS = 3600.0
"""How often an outbox is looked through unasked: each time stops a clock that goes on far."""


@dataclass(frozen=True, slots=True, eq=False)
class Parked:
    """That a pump waits: until when by the clock, and for which descriptors."""

    until: float
    descriptors: Sequence[int]


class VirtualProvider(EmbeddedProvider):
    """The ``embedded`` provider, waiting by the clock that was put in the real one's place."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.parked: Parked | None = None
        self._leased: set[tuple[int, int]] = set()
        self._is_forgettable = False

    @property
    def is_idle(self) -> bool:
        """Whether its pump waits, and for something that has not happened."""
        parked = self.parked
        if parked is None or wait_readable(parked.descriptors, [], [], 0)[0]:
            return False
        return self.parked is parked

    @property
    def _patience(self) -> float:
        """How long its pump may put off what it does by and by: renewing leases, signing."""
        if self._leased:
            return 0.0
        return FORGOTTEN_AFTER_SECONDS / 2 if self._is_forgettable else math.inf

    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        self._is_forgettable |= not all(each.reliable for each in subscriptions)
        super().declare(subscriptions)

    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        now = clock.monotonic()
        due = self._due if hungry else math.inf
        if min(due, now + timeout) <= now:
            return
        until = min(due, now + max(timeout, self._patience))
        mine = self._mine if hungry else frozenset()
        heard = [self._bell.fileno()] if mine else []
        self.parked = Parked(until, [interrupt, *heard])
        try:
            if mine:
                self._bell.wait(LONG_SECONDS, interrupt, mine)
            else:
                wait_readable([interrupt], [], [])
        finally:
            self.parked = None

    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        leases = super().reserve(limits, limit, tx)
        self._leased |= {(lease.delivery.seq, lease.token) for lease in leases}
        return leases

    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        ended = {(each.lease.delivery.seq, each.lease.token) for each in settlements}
        self._leased -= ended
        return super().settle(settlements, tx)


class VirtualClock:
    """The time of services that run in this process; it stands still until it is moved.

    :param start: the date that it begins at; by default what it is just now.
    """

    def __init__(self, start: datetime | None = None) -> None:
        start = start or datetime.now(UTC)
        self._start = start.replace(tzinfo=None, microsecond=start.microsecond // 1000 * 1000)
        self._origin = self._moment = real_monotonic()
        # by how much the hub is ahead, since short waits passed, and what the test itself waited
        self._ahead = 0.0
        self._is_settling = False
        self.containers: list[Any] = []
        self._put_back: list[tuple[Any, str, Any]] = []

    # --- for tests

    @property
    def seconds(self) -> float:
        """Seconds that passed since the clock was made."""
        return round(self._moment - self._origin, 6)

    @property
    def now(self) -> datetime:
        """The date and time, with its time zone, which is UTC."""
        return self.utc_now().replace(tzinfo=UTC)

    def seconds_at(self, moment: datetime) -> float:
        """Return how many seconds of this clock had passed at ``moment``."""
        return (moment.replace(tzinfo=None) - self._start).total_seconds()

    def advance(self, seconds: float) -> None:
        """Let time pass; what becomes due meanwhile happens at its time, in order.

        :raises TimeoutError: when a handler waits for something real, and goes on to.
        """
        target = self._moment + seconds
        self.settle()
        while (due := self.next_due()) <= target:
            self._go_to(due)
            self.settle()
        self._go_to(target)
        self.settle()

    def settle(self) -> None:
        """Let everything happen that can without time passing.

        :raises TimeoutError: when a handler waits for something real, and goes on to.
        """
        self._is_settling = True
        try:
            for _ in range(MOST_SHORT_WAITS):
                self._settle_at_once()
                if not self._let_short_wait_pass():
                    break
        finally:
            self._is_settling = False

    def wait_for(self, work: Callable[[], Any]) -> Any:
        """Return what ``work`` returns, which waits for others; no time passes meanwhile.

        :raises TimeoutError: when that takes too long.
        """
        deadline = real_monotonic() + REAL_SECONDS
        thread = eventlet.spawn(work)
        self._is_settling = True
        try:
            while not thread.dead:
                self._wait_for_pumps()
                eventlet.sleep(0)
                if real_monotonic() > deadline:
                    raise TimeoutError(f"{work} takes longer than {REAL_SECONDS} s")
        finally:
            self._is_settling = False
        return thread.wait()

    # --- for the suite: see shared.clock

    def monotonic(self) -> float:
        return self._moment

    def utc_now(self) -> datetime:
        passed = timedelta(milliseconds=round((self._moment - self._origin) * 1000))
        return self._start + passed

    def time(self) -> float:
        """Return what ``time.time`` would: nameko's timers count by it."""
        return self.now.timestamp()

    # --- in and out of its place

    def install(self) -> None:
        """Take the real one's place, in this process."""
        hub = hubs.get_hub()
        wait = hub.wait
        clock.replace(self)
        self._set(hub, "clock", lambda: self._moment + self._ahead)
        self._set(hub, "wait", lambda seconds=None: self._wait_on_hub(wait, seconds))
        self._set(nameko.timer, "time", self)
        # a random share of each wait would make each run another
        self._set(Backoff, "delay", Backoff.ceiling)
        self._set(relay, "SWEEP_SECONDS", SWEEP_SECONDS)
        event.listen(Engine, "connect", self._on_connect)

    def uninstall(self) -> None:
        """Give the real one its place back."""
        event.remove(Engine, "connect", self._on_connect)
        clock.replace(None)
        while self._put_back:
            setattr(*self._put_back.pop())

    def watch(self, container: Any) -> None:
        """Know of a service that runs by this clock, once it is started."""
        self.containers.append(container)

    def forget(self, container: Any) -> None:
        """Know no more of a service, before it is stopped."""
        self.containers.remove(container)

    def next_due(self) -> float:
        """Return when next something becomes due, by :meth:`monotonic`; infinity for never."""
        parked = [provider.parked for provider in self._providers()]
        pumps = [each.until for each in parked if each is not None]
        timers = [time - self._ahead for time in self._timers()]
        return max(min(pumps + timers, default=math.inf), self._moment)

    def go_to_next(self) -> bool:
        """Move to when next something becomes due, and let it happen; say whether there was."""
        due = self.next_due()
        if due == math.inf:
            return False
        self._go_to(due)
        self.settle()
        return True

    # --- within

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._put_back.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _on_connect(self, connection: Any, _record: Any) -> None:
        """Have what SQLite fills in by itself go by this clock, too."""
        if isinstance(connection, sqlite3.Connection):
            now = lambda: self.utc_now().strftime("%Y-%m-%d %H:%M:%S")  # noqa: E731
            connection.create_function("current_timestamp", 0, now)

    def _wait_on_hub(self, wait: Callable[[float | None], Any], seconds: float | None) -> Any:
        start = real_monotonic()
        try:
            return wait(seconds)
        finally:
            # the test itself waits, for a start or stop, say: that may not take for ever
            if not self._is_settling:
                self._ahead += real_monotonic() - start

    def _go_to(self, moment: float) -> None:
        self._moment = max(moment, self._moment)
        for client in self._clients():
            client._mailbox.inbox.ring()
        # renewed leases and signs of life come before what others do at this time
        self._wait_for_pumps()

    def _wait_for_pumps(self) -> None:
        deadline = real_monotonic() + REAL_SECONDS
        while not all(provider.is_idle for provider in self._providers()):
            if any(container._being_killed for container in self.containers):
                return  # which takes the hub, and comes to light there
            if real_monotonic() > deadline:
                raise TimeoutError(f"the message log does not answer within {REAL_SECONDS} s")
            sleep(PAUSE_SECONDS)

    def _settle_at_once(self) -> None:
        deadline = real_monotonic() + REAL_SECONDS
        while not self._is_quiet():
            if real_monotonic() > deadline:
                raise TimeoutError(f"after {REAL_SECONDS} s there still is {self._busy()}")

    def _is_quiet(self) -> bool:
        """Let the hub go round once, and say whether there is nothing left to do."""
        self._wait_for_pumps()
        eventlet.sleep(0)
        for container in self.containers:
            if container._being_killed:
                self._is_settling = False
                with eventlet.Timeout(REAL_SECONDS):
                    container.wait()  # and raise what it is killed for
        is_due = min(self._timers(), default=math.inf) <= hubs.get_hub().clock()
        return not is_due and not self._busy()

    def _busy(self) -> str:
        """Return what is at work, or waits for what is no matter of the clock."""
        if not all(provider.is_idle for provider in self._providers()) or any(
            client._mailbox._answers for client in self._clients()
        ):
            return "work for the message log"
        reading = {id(listener.greenlet) for listener in _listeners()}
        for container in self.containers:
            for context, greenthread in container._worker_threads.items():
                if id(greenthread) in reading:
                    sleep(PAUSE_SECONDS)
                    return f"something that {context.entrypoint.method_name} waits for"
        return ""

    def _let_short_wait_pass(self) -> bool:
        """Let a short wait that somebody makes pass; say whether there was one."""
        ahead = min(self._timers(), default=math.inf) - hubs.get_hub().clock()
        if ahead > SHORT_SECONDS:
            return False
        self._ahead += max(ahead, 0.0)
        return True

    def _clients(self) -> Iterator[QueueClient]:
        for container in self.containers:
            yield container.shared_extensions[QueueClient]

    def _providers(self) -> Iterator[VirtualProvider]:
        for client in self._clients():
            pump: Any = client._pump
            yield pump._provider

    def _timers(self) -> Iterator[float]:
        hub = hubs.get_hub()
        for time, timer in [*hub.timers, *hub.next_timers]:
            if not timer.called:
                yield time


def _listeners() -> Iterator[Any]:
    hub = hubs.get_hub()
    for by_descriptor in hub.listeners.values():
        yield from by_descriptor.values()
