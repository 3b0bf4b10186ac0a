"""Retention: finished messages are removed, by a service now and then, or by a command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import Connection

from shared.database import Transaction, utc_now
from shared.events.operations import LogClient, Reader
from shared.native import sleep
from shared.settings import Settings
from shared.store import retention, timers
from shared.store.dedupe import DEDUPE_SECONDS
from shared.store.retention import BEGIN, Found, Kept, Removed, Stretch
from shared.types import Delivery

TIMER = "retention"

EVERY_SECONDS = 3600.0
"""How often a service removes what is old enough; the first time so long after it first could."""

PAUSE_SECONDS = 0.01
"""Between two transactions: who waits for the lock of an SQLite file gets it then."""

Say = Callable[[Removed], bool]


def kept(settings: Settings) -> Kept:
    """Return what the settings say."""
    return Kept(settings.completed_days, settings.dead_days)


class Retention:
    """Shows what is kept and for how long."""

    client: LogClient
    reader: Reader

    def retention(self) -> dict[str, Any]:
        """Return what is kept, for how long, and when it was last seen to."""
        settings = self.client.settings
        return {
            "completedDays": settings.completed_days,
            "deadDays": settings.dead_days,
            "inboxDays": settings.inbox_days,
            "dedupeKeyHours": DEDUPE_SECONDS / 3600,
            **self.reader.read(timers.shown, TIMER),
        }


class Pruner:
    """Removes what is old enough. For a native thread or a command: it waits in between.

    :param actor: who does it, for the audit log.
    :param say: is told after each transaction what was removed so far, and answers whether to
        go on.
    """

    def __init__(
        self, client: LogClient, reader: Reader, actor: str, say: Say = lambda _: True
    ) -> None:
        self._client = client
        self._reader = reader
        self._actor = actor
        self._say = say
        self._kept = kept(client.settings)
        self._entry: int | None = None
        self.done = Removed()

    def count(self) -> Removed:
        """Return how many messages would be removed, and remove none."""
        self._go_through(self._count)
        return self.done

    def prune(self) -> Removed:
        """Remove what is old enough; return how many messages and deliveries."""
        self._go_through(self._remove)
        return self.done

    def _go_through(self, deal_with: Callable[[Stretch, list[str]], None]) -> None:
        for stretch in self._reader.read(_stretches, self._kept):
            place: tuple[Any, str] | None = BEGIN
            while place is not None:
                found: Found = self._reader.read(_find, stretch, place)
                if found.ids:
                    deal_with(stretch, found.ids)
                if not self._say(self.done):
                    return
                place = found.place

    def _count(self, _stretch: Stretch, ids: list[str]) -> None:
        self.done = self.done.and_also(Removed(len(ids)))

    def _remove(self, stretch: Stretch, ids: list[str]) -> None:
        self.done, self._entry = self._client.call(partial(self._step, stretch, ids))
        sleep(PAUSE_SECONDS)

    def _step(
        self, stretch: Stretch, ids: list[str], tx: Transaction
    ) -> tuple[tuple[Removed, int | None], list[Delivery]]:
        more = retention.remove(tx, stretch, ids)
        done, entry = self.done.and_also(more), self._entry
        if more.messages and entry is None:
            entry = retention.begin_entry(tx, self._actor, done._asdict())
        elif more.messages and entry is not None:
            retention.update_entry(tx, entry, done._asdict())
        return (done, entry), []


def prune_when_due(
    client: LogClient, reader: Reader, actor: str, say: Say = lambda _: True
) -> Removed | None:
    """Remove what is old enough, if that is due and nobody else's; return how many.

    :param say: as for :class:`Pruner`.
    """
    if not reader.read(_is_due) or not client.call(_take):
        return None
    return _prune(client, reader, actor, say)


def prune_now(client: LogClient, reader: Reader, actor: str, say: Say = lambda _: True) -> Removed:
    """Remove what is old enough, as when it is due; return how many.

    :param say: as for :class:`Pruner`.
    """
    client.call(_start)
    return _prune(client, reader, actor, say)


def _prune(client: LogClient, reader: Reader, actor: str, say: Say) -> Removed:
    done = Pruner(client, reader, actor, say).prune()
    client.call(partial(_end, kept(client.settings), done))
    return done


def _stretches(connection: Connection, its: Kept) -> list[Stretch]:
    return retention.stretches(connection, its, utc_now(connection))


def _find(connection: Connection, stretch: Stretch, place: tuple[Any, str]) -> Found:
    return retention.find(connection, stretch, place, utc_now(connection))


def _is_due(connection: Connection) -> bool:
    return timers.is_due(connection, TIMER, utc_now(connection))


def _take(tx: Transaction) -> tuple[bool, list[Delivery]]:
    return timers.take(tx, TIMER, EVERY_SECONDS, first=EVERY_SECONDS), []


def _start(tx: Transaction) -> tuple[None, list[Delivery]]:
    timers.start(tx, TIMER, EVERY_SECONDS)
    return None, []


def _end(its: Kept, done: Removed, tx: Transaction) -> tuple[None, list[Delivery]]:
    if its.completed:
        [(_, before), *_] = its.cutoffs(tx.now)
        retention.remove_alerts(tx, before)
    timers.note(tx, TIMER, done._asdict())
    return None, []
