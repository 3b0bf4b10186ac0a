"""What a pump may reserve of those of its subscriptions that have limits.

Who has none of those asks every ``LOOK_SECONDS`` whether that is still so, and pays nothing else.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.clock import monotonic
from shared.database import Transaction, worker_name
from shared.events.commands import Allow, Credit
from shared.store import limits
from shared.store.limits import Ask, Grant
from shared.types import Lease

LOOK_SECONDS = 2.0
"""How often is looked whether subscriptions have limits: so soon a new one is heard of."""

MOST_SPARE = 10_000
"""How many are wanted ahead at most, however many workers there are."""

LATE_SECONDS = 0.5
"""How long a process without a free worker keeps what it may reserve: others may have one."""


class Gate:
    """What is common to both kinds of pumps, and all that there is where one thread reserves.

    :param lease: seconds for which permits last, unless they are renewed.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        # the pumps of one process each have their own
        self.worker = f"{worker_name()}/{secrets.token_hex(4)}"
        self.limited: set[int] = set()
        """Those of the subscriptions that have limits."""
        self.look_at = 0.0
        self.renew_at = math.inf
        self.ask_at = math.inf
        """When it is worth asking again although nothing happened here."""

    def hear(self, found: set[int]) -> bool:
        """Note which subscriptions have limits; say whether that has changed."""
        self.look_at = monotonic() + LOOK_SECONDS
        if found == self.limited:
            return False
        self.limited = found
        self.renew_at = monotonic() + self._lease / 3 if found else math.inf
        if not found:
            self.ask_at = math.inf
        return True

    def look(self, tx: Transaction, subscription_ids: Sequence[int]) -> set[int]:
        """Return which of these subscriptions have limits."""
        return limits.limited(tx, subscription_ids)

    def ask(
        self, tx: Transaction, held: Mapping[int, int], wants: Mapping[int, int]
    ) -> dict[int, Grant]:
        """Ask for what may be reserved in the same transaction."""
        asks = [Ask(x, held.get(x, 0), want=wants.get(x, 0)) for x in sorted(self.limited)]
        return limits.ask(tx, self.worker, asks)

    def keep(self, tx: Transaction, grants: Mapping[int, Grant]) -> None:
        """Note what is in hand now."""
        limits.keep(tx, self.worker, list(grants.values()), self._lease)

    def hold(self, tx: Transaction, held: Mapping[int, int]) -> None:
        """Note what is in hand, and renew it."""
        self.keep(tx, self.ask(tx, held, {}))

    def renewed(self) -> None:
        """Note that what is in hand was noted."""
        self.renew_at = monotonic() + self._lease / 3

    def told(self, grants: Mapping[int, Grant]) -> None:
        """Note when it is worth asking again."""
        soonest = min((each.again for each in grants.values()), default=math.inf)
        self.ask_at = monotonic() + soonest
        if self.limited - grants.keys():
            self.look_at = 0.0  # some have no limits any more

    def leave(self, tx: Transaction) -> None:
        """Give back all that there is."""
        limits.leave(tx, self.worker, sorted(self.limited))


@dataclass(slots=True)
class Account:
    """What the carrier may reserve of one subscription, counted since it was first told.

    The carrier reserves while it is told otherwise. So what it may no longer reserve is given
    back only when it has answered.
    """

    batch: int
    allowed: int = 0
    ceiling: int = 0
    """How many it may have reserved by what it was told so far."""
    taken: int = 0
    used: int = 0
    """Of those the number since it was last asked for more."""
    appetite: int = 0
    """How many it is worth to have spare: more and more, as long as all of it is used."""
    until: float = 0.0
    is_open: bool = False
    """Whether the carrier has answered that it keeps to it."""
    awaits: int = 0
    """The number of what it has to answer yet."""
    is_stale: bool = True
    """Whether the log has to be told what is in hand, or asked for more."""
    is_content: bool = False
    """Whether nothing was wanted when it was asked last."""

    @property
    def spare(self) -> int:
        """How many it may reserve, as far as is known."""
        return max(self.ceiling - self.taken, 0)


class ApartGate(Gate):
    """What the carrier of a pump may reserve: it is told ahead, since it does not wait for the log.

    What it was told runs out before the permits in the log do, by a clock that goes on while a
    process is frozen.
    """

    def __init__(self, lease: float) -> None:
        super().__init__(lease)
        self._accounts: dict[int, Account] = {}
        self._batches: Mapping[int, int] = {}
        self._number = 0
        self._freed_at = -math.inf

    def hear_for(self, found: set[int], batches: Mapping[int, int]) -> Allow | None:
        """Note which subscriptions have limits; return what to tell the carrier, if anything."""
        self._batches = batches
        if not self.hear(found):
            return None
        return self._matched()

    def reset(self) -> Allow | None:
        """Begin anew, with a carrier that was told nothing."""
        self._accounts = {}
        return self._matched() if self.limited else None

    def _matched(self) -> Allow:
        known = self._accounts
        self._accounts = {x: known.get(x) or Account(self._batches.get(x, 1)) for x in self.limited}
        return self._allow([each for each in self._accounts.values() if not each.is_open])

    def _allow(self, awaited: Sequence[Account]) -> Allow:
        """Return all that the carrier may reserve; of ``awaited`` accounts it has to answer."""
        if awaited:
            self._number += 1
            for each in awaited:
                each.awaits = self._number
        told = {x: Credit(each.allowed, each.until) for x, each in self._accounts.items()}
        return Allow(told, self._number if awaited else 0)

    # --- what happened

    def answered(self, number: int) -> None:
        """Note that the carrier keeps to what it was told."""
        for each in self._accounts.values():
            if each.awaits and each.awaits <= number:
                if not each.is_open:
                    # so far it was not counted there
                    each.taken = each.used = each.appetite = 0
                each.is_open, each.awaits, each.is_stale = True, 0, True
                each.ceiling = each.allowed

    def took(self, leases: Sequence[Lease]) -> None:
        """Note what the carrier has reserved."""
        for lease in leases:
            account = self._accounts.get(lease.delivery.subscription_id)
            if account is not None:
                account.taken += 1
                account.used += 1
                account.is_stale = True
                if not account.spare:
                    account.appetite = min(2 * max(account.appetite, account.batch), MOST_SPARE)

    def rouse(self) -> None:
        """Note that there may be room again for what none was wanted of."""
        for account in self._accounts.values():
            account.is_stale |= account.is_content

    def ended(self, leases: Sequence[Lease]) -> None:
        """Note that workers of this process are free."""
        self._freed_at = monotonic()
        self.rouse()
        for lease in leases:
            account = self._accounts.get(lease.delivery.subscription_id)
            if account is not None:
                account.is_stale = True

    def workers_for(self, held: Mapping[int, int]) -> int:
        """Return how many workers have that in hand."""
        return sum(-(-count // self._batches.get(each, 1)) for each, count in held.items())

    def may_wait(self, subscription_id: int) -> bool:
        """Say whether nothing need come of a subscription although it waits."""
        account = self._accounts.get(subscription_id)
        return account is not None and not account.spare

    # --- asking

    def asks(self, held: Mapping[int, int], room: int, is_able: bool) -> list[Ask]:
        """Return what to ask now, if anything.

        :param room: how many workers are free.
        :param is_able: whether anything can be reserved at all.
        """
        now = monotonic()
        is_time, is_renewal = now >= self.ask_at, now >= self.renew_at
        is_late = room <= 0 and now - self._freed_at >= LATE_SECONDS
        if is_time:
            self.ask_at = math.inf
        if is_renewal:
            self.renewed()
        made = []
        for each, account in sorted(self._accounts.items()):
            is_idle = account.spare > 0 and (is_late or not is_able)
            if account.awaits or not (account.is_stale or is_time or is_renewal or is_idle):
                continue
            if is_renewal and not account.used:
                account.appetite = account.batch
            want = self._wanted(account, room, is_late) if is_able else 0
            if not (is_renewal or is_idle):
                want = max(want, account.spare)
            account.is_stale = True  # until it is answered
            made.append(Ask(each, held.get(each, 0), account.spare, account.used, want))
        return made

    @staticmethod
    def _wanted(account: Account, room: int, is_late: bool) -> int:
        if room <= 0:
            return 0 if is_late else account.batch
        return min(room * account.batch, max(account.appetite, account.batch))

    def step(self, asks: Sequence[Ask], tx: Transaction) -> dict[int, Grant]:
        """Ask, and note what is in hand."""
        grants = limits.ask(tx, self.worker, asks)
        self.keep(tx, grants)
        return grants

    def granted(
        self, asks: Sequence[Ask], grants: Mapping[int, Grant], began: float
    ) -> Allow | None:
        """Note what was granted; return what to tell the carrier, if anything.

        :param began: when it was asked, before the time that the log goes by.
        """
        told, fewer = False, []
        if len(asks) > len(grants):
            self.look_at = 0.0  # some have no limits any more
        for asked in asks:
            account, grant = (
                self._accounts[asked.subscription_id],
                grants.get(asked.subscription_id),
            )
            if grant is None:
                continue
            account.is_stale, account.is_content = False, not asked.want
            account.used -= asked.used
            account.allowed = account.taken + grant.target
            # a little sooner than in the log
            account.until = began + 0.9 * self._lease
            told |= bool(grant.target) or account.allowed != account.ceiling
            if account.allowed < account.ceiling:
                fewer.append(account)
            else:
                account.ceiling = account.allowed
            if asked.want:
                self.ask_at = min(self.ask_at, monotonic() + grant.again)
        return self._allow(fewer) if told else None

    def next_at(self, room: int) -> float:
        """Return when there is something to do, as monotonic time."""
        times = [self.look_at, self.renew_at, self.ask_at]
        if any(each.is_stale and not each.awaits for each in self._accounts.values()):
            times.append(0.0)
        if room <= 0 and any(each.spare and not each.awaits for each in self._accounts.values()):
            times.append(self._freed_at + LATE_SECONDS)
        return min(times)
