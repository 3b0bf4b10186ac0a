"""The native thread that owns a provider with storage of its own: a broker.

It publishes, reserves, renews and settles what the pump tells it to, and tells the pump
what came of it. So a broker that is away or slow holds up nobody who dispatches, and a
database that is slow lets no lease run out.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from shared.errors import (
    ProviderBlockedError,
    ProviderError,
    ProviderRefusedError,
    ProviderUnavailableError,
)
from shared.events.commands import (
    Allow,
    Allowed,
    Ask,
    Check,
    Crashed,
    Credit,
    Declare,
    Declared,
    Detach,
    Down,
    Finish,
    Forget,
    Free,
    Keep,
    Lost,
    Noticed,
    Prepare,
    Publish,
    Published,
    Refused,
    Reserved,
    Revive,
    Settle,
    StopConsuming,
    Stuck,
    Unpublished,
    Up,
)
from shared.native import Inbox
from shared.providers import QueueProvider
from shared.settings import Settings
from shared.types import Delivery, Lease, SettleAction, Settlement, Subscription

RECONNECT_SECONDS = 0.5
"""How long to wait before a broker that went away is tried again."""

GATHER_SECONDS = 0.002
"""How long after a publication the next waits for company, for each delivery that the last one had:
one alone goes out at once, and the more there are, the fewer publications they are."""

LONGEST_GATHER_SECONDS = 0.01
"""How long that may become."""

MOST_GATHERED = 100
"""Deliveries that are published sooner than that."""

AHEAD = 9
"""How many times as many as there are workers may be reserved ahead, where handlers are short."""

SHORT_SECONDS = 0.05
"""How long those may take that were reserved ahead, until all of them are handled."""

REFUSED_SECONDS = 30.0
"""How often it is said that the provider refuses something: perhaps it refuses all there is."""

IDLE_SECONDS = 60.0
"""How long it waits at most without anything to do."""


class Carrier:
    """See the module's docstring.

    :param report: gives the pump a report; called from this thread.
    :param answer: has a callback called on the hub.
    :param elsewhere: says how many workers have what another provider handed out.
    """

    def __init__(
        self,
        settings: Settings,
        provider: QueueProvider,
        report: Callable[[Any], None],
        answer: Callable[..., None],
        elsewhere: Callable[[], int] = lambda: 0,
    ) -> None:
        self.inbox = Inbox()
        self._settings = settings
        self._provider = provider
        self._report = report
        self._answer = answer
        self._elsewhere = elsewhere
        self._mine: list[Subscription] = []
        self._batches: dict[int, int] = {}
        self._workers = 0
        self._ahead = 0
        self._publish_at = 0.0
        self._is_declared = True
        self._unprepared: Prepare | None = None
        # by their keys: what it renews, and what occupies workers
        self._held: dict[Any, Lease] = {}
        self._busy: dict[Any, Lease] = {}
        # of subscriptions with limits: what may be reserved, and how many were
        self._credits: Mapping[int, Credit] = {}
        self._used: dict[int, int] = {}
        self._unpublished: list[Publish] = []
        self._setbacks = 0
        self._unsettled: list[Settlement] = []
        self._forgotten: list[Subscription] = []
        self._connected = False
        self._was_down = False
        self._is_blocked = False
        self._say_refused_at = 0.0
        self._connect_at = 0.0
        self._renew_at = 0.0
        self._finishing = False
        self.is_gathering = False
        """Whether it waits for more to publish, and not for long: nobody need wake it."""
        self.is_full = True
        """Whether it waits without room: who frees a worker wakes it."""
        self.turned_at = monotonic()
        """When it was last seen to be alive, as monotonic time."""
        self._obey: dict[type, Callable[[Any], None]] = {
            Publish: self._take_publish,
            Declare: self._take_declare,
            Prepare: self._take_prepare,
            Settle: self._take_settle,
            Free: self._take_free,
            Detach: self._take_detach,
            Forget: self._take_forget,
            Keep: self._take_keep,
            Allow: self._take_allow,
            Revive: self._revive,
            Ask: self._ask,
            Check: self._check,
            StopConsuming: self._stop_consuming,
            Finish: self._finish,
        }

    def run(self) -> None:
        """Work until told to finish: the thread's main function."""
        try:
            while not self._finishing:
                self._wait()
                self._turn()
            self._release_all()
        except BaseException as exc:
            self._report(Crashed(exc))
        finally:
            self._provider.close()

    # --- waiting

    def _wait(self) -> None:
        interrupt = self.inbox.fileno()
        if not self._connected:
            self.inbox.wait(max(0.0, self._connect_at - monotonic()))
        elif self._may_gather():
            self.is_gathering = True
            self.inbox.wait(self._publish_at - monotonic())
            self.is_gathering = False
        elif not self._unpublished:  # else the time to gather is over since the last turn
            # from now on whoever frees a worker has to wake this thread
            self.is_full = self._room() <= 0
            if self.inbox.has_quiet():
                return
            until = self._renew_at if self._held else monotonic() + IDLE_SECONDS
            with self._losing():
                timeout = max(0.0, until - monotonic())
                self._provider.wait(timeout, interrupt, hungry=not self.is_full)

    def _room(self) -> int:
        """Return how many workers are free."""
        if not self._mine:
            return 0
        busy: Counter[int] = Counter(x.delivery.subscription_id for x in self._busy.values())
        return (
            self._workers
            + self._ahead
            - self._elsewhere()
            - sum(-(-n // self._batches.get(x, 1)) for x, n in busy.items())
        )

    def _may_gather(self) -> bool:
        """Whether what is to be published may wait for more."""
        count = sum(len(each.deliveries) for each in self._unpublished)
        return 0 < count < MOST_GATHERED and monotonic() < self._publish_at and not self._finishing

    # --- one turn

    def _turn(self) -> None:
        self.turned_at = monotonic()
        for command in self.inbox.take():
            self._obey[type(command)](command)
        if self._connected or monotonic() >= self._connect_at:
            with self._losing():
                self._connect()
                self._publish()
                self._settle()
                self._renew()
                self._reserve()
                self._forget()
        self._tell_notices()
        if not self._connected:
            self._report_unpublished()
            self._report_forgotten()

    def _take_publish(self, command: Publish) -> None:
        if command.setbacks in (None, self._setbacks):
            self._unpublished.append(command)
        else:
            self._give_back([command])

    def _take_declare(self, command: Declare) -> None:
        self._mine, self._workers = list(command.subscriptions), command.workers
        pairs = zip(command.subscriptions, command.batches, strict=True)
        self._batches = {subscription.id: size for subscription, size in pairs}
        self._is_declared = False

    def _take_prepare(self, command: Prepare) -> None:
        self._unprepared = command

    def _take_free(self, command: Free) -> None:
        for key in command.keys:
            self._busy.pop(key, None)
        is_short = command.seconds <= SHORT_SECONDS
        self._ahead = min(self._ahead + 1, AHEAD * self._workers) if is_short else 0

    def _take_detach(self, command: Detach) -> None:
        for lease in command.leases:
            self._held.pop(lease.key, None)
            self._unsettled.append(Settlement(lease, SettleAction.ACKNOWLEDGE))

    def _take_forget(self, command: Forget) -> None:
        self._forgotten += command.subscriptions

    def _take_keep(self, command: Keep) -> None:
        by_key = {lease.key: lease for lease in command.leases}
        self._held |= by_key
        self._busy |= by_key

    def _take_allow(self, command: Allow) -> None:
        self._credits = command.credits
        self._used = {each: self._used.get(each, 0) for each in command.credits}
        if command.number:
            self._report(Allowed(command.number))

    def _revive(self, command: Revive) -> None:
        stuck = command.subscriptions
        with self._losing():
            if self._connected:
                stuck = [each for each in stuck if not self._may_rest(each)]
                if stuck:
                    self._provider.close()
                    self._connected, self._connect_at = False, 0.0
        if stuck:
            self._report(Stuck(stuck))

    def _may_rest(self, subscription: Subscription) -> bool:
        """Whether what waits for it in the log need not come."""
        return self._provider.is_paused(subscription) or self._provider.shares(subscription)

    def abandon(self) -> None:
        """Another thread: have nothing more to do with it, should it ever come back."""
        self._report = lambda _: None
        self._answer = lambda *_: None
        self._held, self._finishing = {}, True

    def _stop_consuming(self, _command: StopConsuming) -> None:
        self._workers = self._ahead = 0

    def _finish(self, _command: Finish) -> None:
        self._workers = self._ahead = 0
        self._finishing = True

    def _take_settle(self, command: Settle) -> None:
        for settlement in command.settlements:
            self._busy.pop(settlement.lease.key, None)
            self._held.pop(settlement.lease.key, None)
        self._unsettled += command.settlements

    def _check(self, command: Check) -> None:
        is_up = self._connected and self._provider.health_check()
        self._answer(command.promise.resolve, is_up)

    def _ask(self, command: Ask) -> None:
        try:
            if not self._connected:
                raise ProviderUnavailableError(f"{self._settings.provider} does not answer")
            self._answer(command.promise.resolve, command.function(self._provider))
        except ProviderError as exc:
            self._answer(command.promise.reject, exc)

    def _connect(self) -> None:
        if not self._connected:
            self._provider.initialize()
            if self._mine:
                self._provider.declare(self._mine)
            if self._was_down and self._settings.log:
                # what waits for it in the log is older
                self._report_unpublished()
            self._connected, self._was_down = True, False
            self._report(Up())
        if self._unprepared is not None:
            prepare(type(self._provider)(self._settings), self._unprepared)
            self._unprepared = None
        if not self._is_declared:
            self._provider.declare(self._mine)
            self._is_declared = True
            self._report(Declared())

    def _publish(self) -> None:
        if not self._unpublished or self._may_gather():
            return
        new = _all(self._unpublished)
        self._publish_at = monotonic() + min(GATHER_SECONDS * len(new), LONGEST_GATHER_SECONDS)
        try:
            homeless = self._provider.publish(new)
        except ProviderBlockedError as exc:
            self._put_off(exc)
            return
        except ProviderRefusedError as exc:
            new, homeless = self._taken(new, exc), exc.homeless
        self._is_blocked = False
        self._report(Published(new, homeless, _has_backlog(self._unpublished)))
        strays = _all([each for each in self._unpublished if each.is_stray])
        self._unpublished = []
        self._provider.published(new)
        for subscription in arrived_at(strays, homeless):
            self._provider.rejoin(subscription)

    def _taken(self, new: list[Delivery], exc: ProviderRefusedError) -> list[Delivery]:
        """Report what was refused; return the others."""
        if monotonic() >= self._say_refused_at:
            self._say_refused_at = monotonic() + REFUSED_SECONDS
            self._report(Noticed(str(exc)))
        self._report(Refused(exc.refused, str(exc)))
        refused = {id(each) for each in exc.refused}
        return [each for each in new if id(each) not in refused]

    def _put_off(self, exc: ProviderBlockedError) -> None:
        """Leave what is to be published to the log; consuming goes on meanwhile."""
        if not self._is_blocked:
            self._report(Noticed(str(exc)))
        self._is_blocked = True
        self._report_unpublished(str(exc))

    def _report_unpublished(self, reason: str = "") -> None:
        new, self._unpublished = self._unpublished, []
        if new:
            self._give_back(new, reason)

    def _give_back(self, new: list[Publish], reason: str = "") -> None:
        self._setbacks += 1
        self._report(Unpublished(_all(new), _has_backlog(new), self._setbacks, reason))

    def _settle(self) -> None:
        if self._unsettled:
            # refused is what was lost: the log knows how it ended, and who has it next
            self._provider.settle(self._unsettled)
            self._unsettled = []

    def _renew(self) -> None:
        now = monotonic()
        if not self._held or now < self._renew_at:
            return
        self._renew_at = now + self._settings.lease / 3
        lost = self._provider.extend(list(self._held.values()))
        for lease in lost:
            self._held.pop(lease.key, None)
        if lost:
            self._report(Lost(lost))

    def _reserve(self) -> None:
        room = self._room()
        if room <= 0:
            return
        limits = {x.id: room * self._batches[x.id] for x in self._mine}
        most = max(limits.values())
        if self._credits:
            limits = self._within_credits(limits)
        leases = self._provider.reserve(limits, most)
        if not leases:
            return
        if self._credits:
            self._use(leases)
        if not self._held:
            self._renew_at = monotonic() + self._settings.lease / 3
        by_key = {lease.key: lease for lease in leases}
        self._held |= by_key
        self._busy |= by_key
        self._report(Reserved(leases))

    def _within_credits(self, limits: dict[int, int]) -> dict[int, int]:
        now, left = monotonic(), dict(limits)
        for each, credit in self._credits.items():
            is_over = now >= credit.until
            may = 0 if is_over else max(credit.total - self._used[each], 0)
            left[each] = min(limits.get(each, 0), may)
        return left

    def _use(self, leases: list[Lease]) -> None:
        for lease in leases:
            subscription_id = lease.delivery.subscription_id
            if subscription_id in self._used:
                self._used[subscription_id] += 1

    def _forget(self) -> None:
        while self._forgotten:
            self._provider.forget(self._forgotten[0])
            del self._forgotten[0]

    def _report_forgotten(self) -> None:
        """Give back what is to be forgotten: until that can be done, it may be consumed again."""
        if self._forgotten:
            self._report(Forget(self._forgotten))
            self._forgotten = []

    def _tell_notices(self) -> None:
        while self._provider.notices:
            self._report(Noticed(self._provider.notices.pop(0)))

    # --- trouble

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Take the provider to be away when something within fails."""
        try:
            yield
        except ProviderError as exc:
            self._connect_at = monotonic() + RECONNECT_SECONDS
            if self._connected or not self._was_down:
                self._report(Down(str(exc)))
            self._was_down, self._connected = True, False

    # --- the end

    def _release_all(self) -> None:
        """Hand back what was reserved and not begun."""
        rest = [Settlement(lease, SettleAction.RELEASE) for lease in self._held.values()]
        with contextlib.suppress(ProviderError):
            if self._connected and rest:
                self._provider.settle(rest)


def prepare(provider: QueueProvider, wanted: Prepare) -> None:
    """Have a provider, which is closed then, know subscriptions and pauses that others consume.

    :raises ProviderError: when it does not answer.
    """
    try:
        provider.initialize()
        provider.declare([each for each in wanted.subscriptions if each.reliable])
        for each in wanted.paused:
            provider.pause(each)
    finally:
        provider.close()


def arrived_at(strays: Sequence[Delivery], homeless: Sequence[Delivery]) -> list[Subscription]:
    """Return the subscriptions that do have a queue, though it did not get what was new."""
    without = {id(each) for each in homeless}
    found = [each.to for each in strays if each.to is not None and id(each) not in without]
    return list({each.id: each for each in found}.values())


def _all(new: list[Publish]) -> list[Delivery]:
    return [delivery for each in new for delivery in each.deliveries]


def _has_backlog(new: list[Publish]) -> bool:
    return any(each.is_backlog for each in new)
