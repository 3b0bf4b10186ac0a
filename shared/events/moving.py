"""Moving what one provider has to another, while both are in use: ``queuectl migrate``.

Done in bounded steps, any of which may be the last: who begins again goes on with what is left. It
is the same the other way round, which is how a move is taken back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any

from shared.errors import SettingsError
from shared.events.audit import Audit, Findings
from shared.events.carrier import prepare
from shared.events.commands import Prepare
from shared.events.direct import DirectClient
from shared.events.draining import route_of
from shared.native import sleep
from shared.providers import QueueProvider, check_provider, draining_settings, make_provider
from shared.settings import Settings
from shared.store import moving, subscriptions, trail
from shared.store.audit import Account
from shared.store.trail import Deed
from shared.types import Delivery, Envelope, Lease, SettleAction, Settlement, Subscription

BATCH = 200
"""Deliveries that are taken out of the old provider at once: a crash gives back no more."""

LOOK_SECONDS = 0.3
"""How often it is looked whether the old provider is empty."""

WATCH_SECONDS = 3.0
"""For how long it is watched at least whether anybody still dispatches without the settings of the
move, where there is that much time."""

LOOKS = 10
"""How often the account is drawn anew, when something is missing that was given back."""


@dataclass(slots=True)
class Progress:
    """How far a move is."""

    carried: int = 0
    """Deliveries that became ready for the new provider by this command."""
    dropped: int = 0
    """Copies that were removed from the old one: of what is elsewhere by now."""
    left: int = 0
    """What the old one had when it was last looked."""
    relaying: int = 0
    """What was on its way to the new one then."""


@dataclass(slots=True)
class Result:
    """How a move ended."""

    progress: Progress
    accounts: list[Account]
    findings: Findings
    is_empty: bool
    """Whether nothing is left at the old provider."""
    left: dict[int, int] = field(default_factory=dict)
    """By subscription: what is."""
    strays: dict[str, int] = field(default_factory=dict)
    """By service: what it dispatched meanwhile without the settings of the move."""


class Move:
    """Carries over what waits, subscription by subscription.

    :param settings: of the process; the providers are those given.
    :raises SettingsError: when there is nothing to move between these two.
    """

    def __init__(self, settings: Settings, old: str, new: str) -> None:
        if old == new:
            raise SettingsError("the two providers must differ")
        self.settings = replace(settings, provider=new, drain=old)
        check_provider(self.settings)
        self.route = route_of(self.settings)
        self.progress = Progress()
        self._client = DirectClient(self.settings)
        self._old = self._make_old()
        self._active: list[Subscription] = []
        self._paused: set[int] = set()
        self._is_empty = False
        # of what was dispatched later nothing should come to the old provider
        self._newest = 0
        self._strays: Counter[str] = Counter()
        self._began_at = monotonic()

    def close(self) -> None:
        """Close what is open. Never raises."""
        if self._old is not None:
            self._old.close()
        self._client.close()

    @property
    def notices(self) -> list[str]:
        """What its user should know, though all went well."""
        return self._client.notices + (self._old.notices if self._old is not None else [])

    def begin(self, actor: str) -> None:
        """Have the new provider ready, with all pauses; note who began.

        :raises QueueError: when the database or one of the providers does not answer.
        """
        self._active = self._client.read(subscriptions.active)
        self._paused = {each.id for each in self._client.read(subscriptions.paused)}
        paused = [each for each in self._active if each.id in self._paused]
        if not self.route.to_log:
            new = make_provider(replace(self.settings, drain=""))
            prepare(new, Prepare(self._active, paused))
        self._client.ask(lambda _: None)
        if self._old is not None:
            self._old.initialize()
            self._old.declare([each for each in self._active if each.reliable])
        self._newest, self._began_at = self._run(moving.newest), monotonic()
        self._note(actor, "begun")

    def carry(self) -> Iterator[Progress]:
        """Carry over all that there is now, a bounded batch at each step.

        :raises QueueError: when the database or one of the providers does not answer.
        """
        for each in self._active:
            for _ in self._carry_waiting(each):
                yield self.progress
            for _ in self._carry_timed(each):
                yield self.progress
        self._drop_leftovers()
        yield self.progress

    def wait(self, seconds: float) -> Iterator[Progress]:
        """Carry on until nothing is left at the old provider, for so many seconds at most.

        :raises QueueError: as :meth:`carry`.
        """
        deadline = monotonic() + seconds
        watched = self._began_at + WATCH_SECONDS
        while (not self._is_done() or monotonic() < watched) and monotonic() < deadline:
            yield self.progress
            sleep(LOOK_SECONDS)
            yield from self.carry()

    def _is_done(self) -> bool:
        self._is_empty = not self.look()
        return self._is_empty

    def look(self) -> int:
        """Count what the old provider still has, and what is on its way to the new one."""
        self.progress.left = sum(self.left().values())
        self.progress.relaying = self._relaying()
        return self.progress.left + self.progress.relaying

    def left(self) -> dict[int, int]:
        """Return by subscription what the old provider still has."""
        if self._old is None:
            return {}
        stats = self._old.get_queue_stats(self._active)
        counts = {
            its.id: each.waiting + (each.active or 0) + (each.scheduled or 0)
            for its, each in zip(self._active, stats, strict=True)
        }
        return {each: count for each, count in counts.items() if count}

    def end(self, actor: str) -> Result:
        """Draw the account of the new provider; note how it came out.

        What the old one had lost before shows now: it is published, as an audit has it.

        :raises QueueError: when the database or the new provider does not answer.
        """
        audit = Audit(self.settings)
        try:
            found = audit.look()
            for _ in range(LOOKS):
                if found.are_none:
                    break
                audit.repair(found)
                self._relay()
                found = audit.look()
            left = self.left()
            # what is on its way by now is the new one's
            is_empty = self._is_empty and not left
            strays = dict(self._strays + self._unmarked())
            result = Result(self.progress, audit.accounts(), found, is_empty, left, strays)
        finally:
            audit.close()
        is_right = result.is_empty and found.are_none
        self._note(actor, "completed" if is_right else "unfinished", carried=self.progress.carried)
        return result

    def _unmarked(self) -> Counter[str]:
        if self.route.to_log:
            return Counter()
        return Counter(self._run(partial(moving.unmarked, after=self._newest)))

    # --- within

    def _make_old(self) -> QueueProvider | None:
        return None if self.route.from_log else make_provider(draining_settings(self.settings))

    def _carry_waiting(self, subscription: Subscription) -> Iterator[None]:
        if self._old is None:
            self._relay()
        elif subscription.id in self._paused and self._old.capabilities.lists:
            # a pause holds back what could be reserved; nobody else has any of it in hand
            yield from self._carry_pages(subscription, timed_alone=False)
            self.progress.dropped += self._old.purge(subscription)
        elif subscription.reliable:
            while leases := self._old.take_waiting(subscription, BATCH):
                late = sum(lease.delivery.seq > self._newest for lease in leases)
                self._strays[subscription.source] += late
                self._take_out(self._old, leases)
                self._relay(subscription)
                yield

    def _take_out(self, old: QueueProvider, leases: Sequence[Lease]) -> None:
        step = partial(
            moving.take_out,
            leases=leases,
            route=self.route,
            max_retries=self.settings.retries.limit,
            held_for=self.settings.lease,
        )
        moved = self._run(step)
        # only now: who dies before has lost nothing, and what comes again is sorted out
        old.settle([Settlement(lease, SettleAction.ACKNOWLEDGE) for lease in leases])
        self.progress.carried += moved
        self.progress.dropped += len(leases) - moved

    def _carry_timed(self, subscription: Subscription) -> Iterator[None]:
        if self.route.to_log:
            self._run(partial(moving.forget_others, subscription_id=subscription.id))
        else:
            yield from self._carry_pages(subscription, timed_alone=True)

    def _carry_pages(self, subscription: Subscription, *, timed_alone: bool) -> Iterator[None]:
        after = 0
        page = partial(
            moving.page,
            subscription_id=subscription.id,
            route=self.route,
            timed_alone=timed_alone,
        )
        while seqs := self._run(partial(page, after=after)):
            after = seqs[-1]
            here = self._not_moved(subscription, seqs)
            if here:
                self.progress.carried += self._run(partial(moving.make_ready, seqs=here))
                self._relay(subscription)
            yield

    def _not_moved(self, subscription: Subscription, seqs: list[int]) -> list[int]:
        """Return those that the new provider does not have, as far as one of them can tell."""
        if self._old is not None and self._old.capabilities.lists:
            have = self._old.holds(subscription, seqs)
            return [seq for seq in seqs if seq in have]
        have = self._client.ask(partial(_held, subscription=subscription, seqs=seqs))
        if have:
            self._run(partial(moving.mark, seqs=sorted(have), to=self.route.new))
        return [seq for seq in seqs if seq not in have]

    def _relay(self, subscription: Subscription | None = None) -> None:
        """Give the new provider what is ready, beside the services that do."""
        if not self.route.to_log:
            while self._client.relay():
                pass
        elif subscription is not None:
            its = Envelope("", subscription.queue, subscription.event_type, "null")
            found = Delivery(0, subscription.id, its)
            self._client.ask(lambda provider: provider.published([found]))

    def _relaying(self) -> int:
        if self.route.to_log:
            return 0
        ids = [each.id for each in self._active]
        return sum(self._run(partial(moving.ready_counts, ids=ids)).values())

    def _drop_leftovers(self) -> None:
        """Remove copies of what has a time: what they are copies of is at the new provider."""
        if self._old is not None:
            self.progress.dropped += self._old.drop_scheduled(self._active, self._are_over)

    def _are_over(self, seqs: Sequence[int]) -> Set[int]:
        left = self._run(partial(moving.of_old, seqs=seqs, route=self.route))
        return set(seqs) - left

    def _run(self, step: Callable[..., Any]) -> Any:
        return self._client.call(lambda tx: (step(tx), []))

    def _note(self, actor: str, how: str, **detail: Any) -> None:
        target = f"provider {self.route.old} to {self.route.new}"
        deed = Deed(actor, "migrate", target, {"state": how, **detail})
        self._run(partial(trail.note, deed=deed))


def _held(provider: QueueProvider, subscription: Subscription, seqs: Sequence[int]) -> Set[int]:
    return provider.holds(subscription, seqs) if provider.capabilities.lists else set()
