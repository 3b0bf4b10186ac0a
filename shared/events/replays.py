"""How a stretch of history is delivered to one subscription, from a service or from a command."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from shared.database import Transaction
from shared.events.operations import LogClient, Reader
from shared.store import consumers, listing, replay, trail
from shared.store.queries import iso
from shared.store.replay import Stretch
from shared.store.trail import Deed
from shared.types import Delivery

BATCH = 200
"""Messages or deliveries that one transaction changes: others wait for it meanwhile."""

MOST_PAGES = 10
"""Searches of one call; the next one goes on from where it ended."""


class Replays:
    """Delivers messages of a stretch of history to a subscription.

    ``actor`` says who does it, for the audit log.
    """

    client: LogClient
    reader: Reader

    def replay(
        self,
        actor: str,
        subscription_id: int,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        again: bool = False,
        mark: int | None = None,
        cursor: str | None = None,
        limit: int = BATCH,
    ) -> dict[str, Any]:
        """Deliver messages of a stretch of history to a subscription, the oldest first.

        Those that it has no delivery of. Done again, it delivers none of them twice.

        :param since: naive UTC, itself included.
        :param until: naive UTC, itself not included.
        :param again: those as well that it has one of, if that is done with.
        :param mark: of an answer, to go on from: by it none of them is delivered twice.
        :param limit: messages at most.
        :returns: how many messages were looked at and are delivered, the mark, and the cursor to
            go on from; ``None`` at the end.
        :raises SubscriptionNotFoundError: when there is none of that id.
        """
        its = self.reader.read(consumers.find, subscription_id)
        if again and mark is None:
            mark = int(self.reader.read(replay.newest))
        stretch = Stretch(since, until, mark or 0)
        place = listing.place_of(cursor) if cursor else None
        searched, replayed = 0, 0
        for _ in range(MOST_PAGES):
            most = min(replay.MOST_SEARCHED, limit - replayed)
            page = self.reader.read(replay.look, its, stretch, place, most)
            for start in range(0, len(page.ids), BATCH):
                ids = page.ids[start : start + BATCH]
                replayed += self._replay_some(actor, subscription_id, stretch, ids)
            searched, place = searched + page.searched, page.next
            if place is None or replayed >= limit:
                break
        return {
            "messages": searched,
            "replayed": replayed,
            "mark": mark,
            "nextCursor": place.cursor() if place else None,
        }

    def _replay_some(
        self, actor: str, subscription_id: int, stretch: Stretch, ids: Sequence[str]
    ) -> int:
        def step(tx: Transaction) -> tuple[int, list[Delivery]]:
            new = replay.replay(tx, subscription_id, ids, stretch.mark)
            if new:
                detail = {"deliveries": len(new), **_told(stretch)}
                trail.note(tx, Deed(actor, "replay", f"subscription {subscription_id}", detail))
            return len(new), new

        return int(self.client.call(step))


def _told(stretch: Stretch) -> dict[str, Any]:
    """Return what somebody needs to go on with a replay."""
    its = {"from": iso(stretch.since), "to": iso(stretch.until)}
    given: dict[str, Any] = {key: value for key, value in its.items() if value is not None}
    return given | ({"again": True, "mark": stretch.mark} if stretch.mark else {})
