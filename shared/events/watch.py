"""Whether work comes that waits at the provider.

A consumer may be connected and get nothing all the same: RabbitMQ forgot that it consumes, or
nobody hears any more what Redis has to say. The log knows what waits, so it is held against
what comes. What does not come is not signed for, so that health tells of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import monotonic

from shared.types import Lease, Subscription

FIRST_PAUSE_SECONDS = 10.0
"""How long after connecting anew it is not done again; each time twice as long."""

LONGEST_PAUSE_SECONDS = 320.0


class Watch:
    """Knows which subscriptions are stuck: the same delivery waits, and nothing comes."""

    def __init__(self) -> None:
        self.stuck: set[int] = set()
        self.is_changed = False
        """Whether others are stuck than were signed for so far."""
        self._came: set[int] = set()
        self._oldest: Mapping[int, int] = {}
        self._pause = FIRST_PAUSE_SECONDS
        self._revive_at = 0.0

    def came(self, leases: Iterable[Lease]) -> None:
        """Note that deliveries came: who gets some is not stuck."""
        its = {lease.delivery.subscription_id for lease in leases}
        self._came |= its
        if self.stuck & its:
            self._pause, self._revive_at = FIRST_PAUSE_SECONDS, 0.0
            self._set(self.stuck - its)

    def is_stuck(self, subscriptions: Iterable[Subscription]) -> None:
        """Note that these get nothing although they should."""
        self._set(self.stuck | {each.id for each in subscriptions})

    def idle(self, mine: Sequence[Subscription]) -> list[int]:
        """Return the subscriptions that got nothing since this was last asked."""
        came, self._came = self._came, set()
        return [each.id for each in mine if each.id not in came]

    def suspects(self, oldest: Mapping[int, int]) -> set[int]:
        """Return the subscriptions for which it is time to connect anew.

        :param oldest: for each that is idle the delivery that has to come next, if any has to.
        """
        same = {each for each, seq in oldest.items() if self._oldest.get(each) == seq}
        self._oldest = oldest
        if self.stuck - oldest.keys():
            self._set(self.stuck & oldest.keys())
        if not same or monotonic() < self._revive_at:
            return set()
        self._revive_at = monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        return same

    def _set(self, stuck: set[int]) -> None:
        self.is_changed |= stuck != self.stuck
        self.stuck = stuck
