"""What became of a COMMIT whose answer was lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from shared.clock import monotonic
from shared.database import CommitUncertainError, Database, Transaction
from shared.errors import DispatchError, DispatchUncertainError, QueueError
from shared.events.commands import Append
from shared.native import Mailbox, sleep
from shared.store import log
from shared.store.dedupe import First

UNCERTAIN_SECONDS = 10.0
"""How long it is looked for before the caller is told that it is unknown."""

AGAIN_SECONDS = 0.1
"""How long to wait before it is looked for again."""


class Fate:
    """Finds it out by the ids that the client made, and tells who dispatched.

    :param store: stores events, some of which may be stored already, and tells who dispatched
        them; raises CommitUncertainError when the answer to that is lost as well.
    :param take_back: sees to it that what was to be handed over next is so soon.
    """

    def __init__(
        self,
        database: Database,
        mailbox: Mailbox,
        store: Callable[[list[Append]], None],
        take_back: Callable[[Transaction, Sequence[str]], None],
    ) -> None:
        self._database = database
        self._mailbox = mailbox
        self._store = store
        self._take_back = take_back

    def resolve(
        self, appends: Sequence[Append], firsts: Mapping[str, First], exc: CommitUncertainError
    ) -> None:
        """Tell who dispatched whether their events are stored, or that nobody knows.

        Where the whole transaction went with its COMMIT, to look does not decide that: it may
        arrive yet. So it is stored once more, and what comes late is refused as a duplicate.

        :param firsts: by message id, what was dispatched with its key before.
        """
        asked = [(append, _ids_of(append, firsts)) for append in appends]
        deadline = monotonic() + UNCERTAIN_SECONDS
        while monotonic() < deadline:
            try:
                stored = self._decided(asked)
                if exc.is_whole:
                    self._store([replace(append, again=True) for append in appends])
                else:
                    self._tell(asked, firsts, stored, exc)
            except (QueueError, SQLAlchemyError):
                sleep(AGAIN_SECONDS)
            else:
                return
        for append, ids in asked:
            self._answer(append.promise.reject, DispatchUncertainError(ids, str(exc)))

    def _decided(self, asked: Sequence[tuple[Append, list[str]]]) -> set[str]:
        """Return which of these are stored, and take them up; raise while one may yet be.

        That is while a transaction which stores any is open.
        """
        own = [envelope.id for append, _ in asked for envelope in append.envelopes]
        with self._database.transaction() as tx:
            stored = log.decided_ids(tx, [each for _, ids in asked for each in ids])
            self._take_back(tx, own)
        return stored

    def _tell(
        self,
        asked: Sequence[tuple[Append, list[str]]],
        firsts: Mapping[str, First],
        stored: set[str],
        exc: CommitUncertainError,
    ) -> None:
        for append, ids in asked:
            if stored.issuperset(ids):
                self._answer(append.promise.resolve, firsts)
            else:
                self._answer(append.promise.reject, DispatchError(f"nothing was stored: {exc}"))

    def _answer(self, callback: Callable[[Any], None], value: Any) -> None:
        self._mailbox.answer(callback, value)


def _ids_of(append: Append, firsts: Mapping[str, First]) -> list[str]:
    """Return the ids by which its events are stored."""
    return [firsts[e.id].message_id if e.id in firsts else e.id for e in append.envelopes]
