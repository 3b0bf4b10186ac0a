"""The audit: whether the provider has what it should have by the message log.

What is on its way moves between the two, so it is looked twice, and missing is what was so both
times and did not move meanwhile. A provider that cannot list what it has is believed by count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import product
from typing import TypeVar

from sqlalchemy import Connection

from shared.database import Database, database_url, utc_now
from shared.lifecycle import DeliveryStatus
from shared.native import sleep
from shared.providers import (
    QueueProvider,
    SubscriptionStats,
    draining_class,
    draining_settings,
    make_provider,
)
from shared.settings import Settings
from shared.store import audit, subscriptions
from shared.store.audit import Account, Entry
from shared.store.migrate import see_log
from shared.types import Subscription

AGAIN_SECONDS = 0.2
"""After which it is looked again, where the provider can list what it has."""

IN_HAND_SECONDS = 1.5
"""The same for one that counts what is ready. What a worker has in hand is none of that; within
this time the log hears that it began, or it is given back."""

NEAR_SECONDS = 2.0
"""What is due within this time is left for the next audit: it may be here or there."""

T = TypeVar("T")


@dataclass(slots=True)
class Lack:
    """What a provider lacks: how many by subscription, and which deliveries that may be."""

    counts: Counter[int] = field(default_factory=Counter)
    suspects: set[int] = field(default_factory=set)

    def add(self, entries: Sequence[Entry], count: int) -> None:
        """Add ``count`` of these, all of one subscription."""
        if count > 0:
            self.counts[entries[0].subscription_id] += min(count, len(entries))
            self.suspects |= {each.seq for each in entries}

    def __or__(self, other: Lack) -> Lack:
        return Lack(self.counts + other.counts, self.suspects | other.suspects)

    def __and__(self, other: Lack) -> Lack:
        return Lack(self.counts & other.counts, self.suspects & other.suspects)


@dataclass(slots=True)
class Findings:
    """What an audit found to be wrong."""

    lack: Lack = field(default_factory=Lack)
    misdrawn: set[str] = field(default_factory=set)
    """Messages whose status is not that of their deliveries."""
    held: Mapping[int, int | None] = field(default_factory=dict)
    """How many of each subscription the provider has; ``None`` where that says nothing."""
    unpaused: list[Subscription] = field(default_factory=list)
    """Paused by the log, and the provider would hand out what they have."""
    withheld: list[Subscription] = field(default_factory=list)
    """Paused in the provider alone: what they have would wait for ever, and nobody told why."""

    orphaned: Counter[int] = field(default_factory=Counter)
    """By subscription that was retired: what is open all the same, and nobody will handle."""

    def __str__(self) -> str:
        wrong = []
        if self.lack.suspects:
            wrong.append(f"{self.lack.counts.total()} deliveries missing in the provider")
        if self.misdrawn:
            wrong.append(f"{len(self.misdrawn)} messages of another status than their deliveries")
        if self.unpaused:
            wrong.append(f"{len(self.unpaused)} pauses missing in the provider")
        if self.withheld:
            wrong.append(f"{len(self.withheld)} pauses of the provider alone")
        if self.orphaned:
            wrong.append(f"{self.orphaned.total()} open deliveries of retired subscriptions")
        unseen = list(self.held.values()).count(None)
        but = f", but for what waits in {unseen} queues that are left alone" if unseen else ""
        return " and ".join(wrong) or f"every delivery is accounted for{but}"

    @property
    def are_none(self) -> bool:
        """Whether the books balance."""
        wrong = self.lack.suspects or self.misdrawn or self.unpaused or self.withheld
        return not (wrong or self.orphaned)


Answer = Callable[[Sequence[Entry]], Lack]
"""Says what is lacking of entries that did not move since the question."""


class Joined:
    """Asks a provider that works in the log's tables: of what is elsewhere it has nothing."""

    seconds = 0.0
    held: Mapping[int, int | None]
    there: Set[int] = frozenset()

    def ask(self, _entries: Sequence[Entry]) -> Answer:
        """See :data:`Answer`."""
        self.held = {}
        return _all_of


class Listing:
    """Asks a provider that can say of each delivery whether it has it."""

    seconds = AGAIN_SECONDS
    held: Mapping[int, int | None]
    there: Set[int]
    """Which deliveries it has, of those that were asked for last."""

    def __init__(self, provider: QueueProvider, known: Mapping[int, Subscription]) -> None:
        self._provider = provider
        self._known = known

    def ask(self, entries: Sequence[Entry]) -> Answer:
        """See :data:`Answer`."""
        by_id: dict[int, list[int]] = defaultdict(list)
        for each in entries:
            by_id[each.subscription_id].append(each.seq)
        holds, known = self._provider.holds, self._known
        there = {seq for id_, seqs in by_id.items() for seq in holds(known[id_], seqs)}
        self.there = there
        self.held = Counter(each.subscription_id for each in entries if each.seq in there)
        return lambda stayed: _all_of(each for each in stayed if each.seq not in there)


class Counting:
    """Asks a provider that can count what is ready, and what waits for a time."""

    seconds = IN_HAND_SECONDS
    held: Mapping[int, int | None]
    there: Set[int] = frozenset()

    def __init__(
        self,
        provider: QueueProvider,
        known: Mapping[int, Subscription],
        now: Callable[[], datetime],
    ) -> None:
        self._provider = provider
        self._known = known
        self._now = now

    def ask(self, entries: Sequence[Entry]) -> Answer:
        """See :data:`Answer`."""
        now = self._now()
        concerned = [self._known[x] for x in sorted({each.subscription_id for each in entries})]
        its = [each for each in concerned if self._counts(each)]
        stats = self._provider.get_queue_stats(its)
        if self._provider.capabilities.counts_all:
            all_ = {x.id: _total(each) for x, each in zip(its, stats, strict=True)}
            self.held = {each.id: all_.get(each.id) for each in concerned}
            return partial(self._lack_of_all, all_)
        ready = {x.id: each.waiting for x, each in zip(its, stats, strict=True)}
        has_later = any(_is_later(each, now) for each in entries)
        delayed = self._provider.count_delayed() if has_later else 0
        self.held = {each.id: ready.get(each.id) for each in concerned}
        return partial(self._lack, ready, delayed, now)

    def _counts(self, subscription: Subscription) -> bool:
        """Whether what is not in its queue is lost."""
        # that of an unreliable one goes with its instance, and may be nobody else's to count
        return subscription.reliable and not self._provider.shares(subscription)

    @staticmethod
    def _lack_of_all(counts: Mapping[int, int], stayed: Sequence[Entry]) -> Lack:
        lack, by_id = Lack(), defaultdict(list)
        for each in stayed:
            by_id[each.subscription_id].append(each)
        for subscription_id, its in by_id.items():
            lack.add(its, len(its) - counts.get(subscription_id, len(its)))
        return lack

    @staticmethod
    def _lack(
        ready: Mapping[int, int], delayed: int | None, now: datetime, stayed: Sequence[Entry]
    ) -> Lack:
        lack, due, later = Lack(), defaultdict(list), defaultdict(list)
        for each in stayed:
            if each.subscription_id not in ready:
                continue
            if each.status == DeliveryStatus.PROCESSING:
                lack.add([each], 1)  # whoever has it in hand would have a lease in the log
            elif _is_later(each, now):
                later[each.subscription_id].append(each)
            elif each.available_at is None or now - each.available_at > _NEAR:
                due[each.subscription_id].append(each)
        for subscription_id, its in due.items():
            lack.add(its, len(its) - ready[subscription_id])
        # one copy may be for all subscriptions of a message
        least = len({each.message_id for its in later.values() for each in its})
        short = 0 if delayed is None else least - delayed
        for its in later.values():
            lack.add(its, short)
        return lack


class Both:
    """Asks two providers, of which one is moved away from: what either has is not missing.

    :param old: ``None`` for one that works in the log's tables, where what has a time is.
    """

    held: Mapping[int, int | None]

    def __init__(self, new: Asker, old: Listing | Counting | None, name: str) -> None:
        self._new = new
        self._old = old
        self._name = name
        self.seconds = max(new.seconds, old.seconds if old is not None else 0.0)

    def ask(self, entries: Sequence[Entry]) -> Answer:
        """See :data:`Answer`."""
        mine, others = _parted(entries, self._is_mine)
        if self._old is None:
            answer = self._new.ask(mine)
            self.held = self._new.held
            return lambda stayed: answer(_parted(stayed, self._is_mine)[0])
        answer_new = self._new.ask(mine)
        held_new = dict(self._new.held)
        if isinstance(self._new, Listing):
            # what was not noted as the new one's may be there all the same
            self._new.ask(others)
            others = [each for each in others if each.seq not in self._new.there]
        answer_old, asked = self._old.ask(others), {each.seq for each in others}
        self.held = _sums(held_new, self._old.held)

        def answer_both(stayed: Sequence[Entry]) -> Lack:
            own, rest = _parted(stayed, self._is_mine)
            return answer_new(own) | answer_old([each for each in rest if each.seq in asked])

        return answer_both

    def _is_mine(self, entry: Entry) -> bool:
        if self._old is None:
            return entry.provider == self._name or entry.available_at is None
        return not isinstance(self._new, Joined) and entry.provider == self._name


def _parted(
    entries: Sequence[Entry], is_first: Callable[[Entry], bool]
) -> tuple[list[Entry], list[Entry]]:
    first = [each for each in entries if is_first(each)]
    return first, [each for each in entries if not is_first(each)]


def _sums(one: Mapping[int, int | None], other: Mapping[int, int | None]) -> dict[int, int | None]:
    def total(its: int) -> int | None:
        counts = [each[its] for each in (one, other) if its in each]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    return {its: total(its) for its in one.keys() | other.keys()}


def _total(stats: SubscriptionStats) -> int:
    return stats.waiting + (stats.active or 0) + (stats.scheduled or 0)


_NEAR = timedelta(seconds=NEAR_SECONDS)

Asker = Joined | Listing | Counting
"""What asks one provider."""


def _is_later(entry: Entry, now: datetime) -> bool:
    return entry.available_at is not None and entry.available_at - now > _NEAR


def _all_of(entries: Iterable[Entry]) -> Lack:
    its = list(entries)
    counts = Counter(each.subscription_id for each in its)
    return Lack(counts, {each.seq for each in its})


class Audit:
    """Looks for what is wrong, and puts it right.

    Used by one thread, which need not be the one that makes it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._provider = make_provider(settings)
        self._is_joined = self._provider.capabilities.joins_log
        self._old: QueueProvider | None = None
        if settings.drain and not draining_class(settings).capabilities.joins_log:
            self._old = make_provider(draining_settings(settings))
        self._database = Database(database_url(settings), sleep, is_patient=True)

    def accounts(self) -> list[Account]:
        """Return what became of the deliveries of each subscription, by the log.

        :raises StoreUnavailableError: when the database does not answer.
        """
        return self._read(audit.accounts)

    def look(self) -> Findings:
        """Look for what is wrong; what is in order takes one look.

        :raises StoreUnavailableError: when the database does not answer, or there is no log.
        :raises ProviderError: when the provider does not.
        """
        see_log(self._database)
        for provider in self._apart():
            provider.initialize()  # one that does not answer is no finding, whatever is to be found
        misdrawn = self._read(audit.misdrawn)
        entries = self._elsewhere()
        found = self._compare(entries) if entries else Findings()
        if misdrawn:
            found.misdrawn = misdrawn & self._read(audit.misdrawn)
        found.unpaused = self._twice(self._paused_in_log_alone)
        # who has nothing to get misses nothing
        waiting = {each.subscription_id for each in entries}
        found.withheld = self._twice(partial(self._paused_there_alone, waiting))
        found.orphaned = self._orphaned()
        return found

    def repair(self, found: Findings) -> None:
        """Have the log keep what is lacking: who runs publishes it, or who starts next.

        :raises StoreUnavailableError: when the database does not answer.
        :raises ProviderError: when the provider does not.
        """
        # before there is anything that it could hand out
        self._pause_as_logged(found.unpaused + found.withheld)
        seqs, ids = sorted(found.lack.suspects), sorted(found.misdrawn)
        for part in _parts(seqs):
            self._database.run(
                partial(audit.give_back, seqs=part, lease=self._settings.lease), durable=False
            )
        for some in _parts(ids):
            self._database.run(partial(audit.draw_anew, message_ids=some), durable=False)
        discard = partial(subscriptions.discard, subscription_ids=sorted(found.orphaned))
        has_more = bool(found.orphaned)
        while has_more:
            has_more = self._database.run(discard, durable=False)

    def close(self) -> None:
        """Close what is open. Never raises."""
        self._provider.close()
        if self._old is not None:
            self._old.close()
        self._database.close()

    def _compare(self, entries: list[Entry]) -> Findings:
        known = {each.id: each for each in self._read(subscriptions.active)}
        # whose subscription was retired since they were read are nobody's any more
        entries = [each for each in entries if each.subscription_id in known]
        if not entries:
            return Findings()
        asker = self._asker(known)
        first = asker.ask(entries)
        if not first(entries).suspects:
            return Findings(held=asker.held)
        sleep(asker.seconds)
        stayed = _both(entries, self._elsewhere())
        second, held = asker.ask(stayed), asker.held
        sleep(asker.seconds)
        still = _both(stayed, self._elsewhere())
        return Findings(first(still) & second(still), held=held)

    @staticmethod
    def _twice(look: Callable[[], list[Subscription]]) -> list[Subscription]:
        """Look again for what was found: who pauses and resumes tells both in turn."""
        found = look()
        if found:
            sleep(AGAIN_SECONDS)
            again = look()
            found = [each for each in found if each in again]
        return found

    def _orphaned(self) -> Counter[int]:
        found = self._read(audit.orphaned)
        if found:
            sleep(AGAIN_SECONDS)  # who retires one discards what it has next
            found &= self._read(audit.orphaned)
        return found

    def _paused_in_log_alone(self) -> list[Subscription]:
        apart = self._apart()
        paused = self._read(subscriptions.paused) if apart else []
        return [x for x in paused if not all(provider.is_paused(x) for provider in apart)]

    def _paused_there_alone(self, ids: Set[int]) -> list[Subscription]:
        apart = self._apart() if ids else []
        paused = self._paused_ids() if apart else ()
        return [
            each
            for each in (self._read(subscriptions.active) if apart else ())
            if each.id in ids and each.id not in paused and each.reliable
            if any(provider.is_paused(each) for provider in apart)
        ]

    def _pause_as_logged(self, wanted: Sequence[Subscription]) -> None:
        if not wanted:
            return
        done, paused = None, self._paused_ids()
        while paused != done:  # else somebody paused or resumed just now
            for provider, each in product(self._apart(), wanted):
                (provider.pause if each.id in paused else provider.resume)(each)
            done, paused = paused, self._paused_ids()

    def _paused_ids(self) -> set[int]:
        return {each.id for each in self._read(subscriptions.paused)}

    def _apart(self) -> list[QueueProvider]:
        """Return the providers in use that have storage of their own."""
        own = [] if self._is_joined else [self._provider]
        return own + ([self._old] if self._old is not None else [])

    def _asker(self, known: Mapping[int, Subscription]) -> Asker | Both:
        new = Joined() if self._is_joined else self._asker_of(self._provider, known)
        if not self._settings.drain:
            return new
        old = None if self._old is None else self._asker_of(self._old, known)
        return Both(new, old, self._settings.provider)

    def _asker_of(
        self, provider: QueueProvider, known: Mapping[int, Subscription]
    ) -> Listing | Counting:
        if provider.capabilities.lists:
            return Listing(provider, known)
        return Counting(provider, known, partial(self._read, utc_now))

    def _elsewhere(self) -> list[Entry]:
        return self._read(partial(audit.elsewhere, is_joined=self._is_joined))

    def _read(self, query: Callable[[Connection], T]) -> T:
        return self._database.read(lambda tx: query(tx.connection))


def _both(entries: Sequence[Entry], later: Sequence[Entry]) -> list[Entry]:
    """Return what did not move from one look to the other."""
    are_there = set(later)
    return [each for each in entries if each in are_there]


def _parts(values: Sequence[T]) -> list[Sequence[T]]:
    most = audit.MOST_AT_ONCE
    return [values[start : start + most] for start in range(0, len(values), most)]
