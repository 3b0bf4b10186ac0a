"""A single event, stored by the hub itself while the pump rests.

To tell the pump's thread of each, and to be told of the end of it, takes a quarter of what this
process does for an event. What is dispatched while another is stored goes to the pump, which stores
all that gathered together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

import eventlet
from eventlet import hubs
from eventlet.semaphore import Semaphore
from greenlet import getcurrent, greenlet
from sqlalchemy.exc import SQLAlchemyError

from shared.database import CommitUncertainError, Database, Transaction, database_url
from shared.errors import DispatchUncertainError, QueueError
from shared.events.apart import ApartPump, Opening
from shared.events.commands import Append, Call, Doubt
from shared.events.pump import Pump
from shared.events.unlogged import UnloggedPump
from shared.native import Mailbox, Promise
from shared.observe.counts import PumpCounts
from shared.settings import Settings
from shared.store import log
from shared.store.log import Handover
from shared.types import Delivery, Envelope

_log = logging.getLogger(__name__)


class Aside:
    """A call in a greenlet of its own: whoever interrupts who waits for it does not interrupt it.

    Unlike a greenthread's it begins at once, and its end takes no turn of the hub.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function = partial(function, *args)
        self._greenlet = greenlet(self._run, hubs.get_hub().greenlet)
        self._waiting: Any = None

    @property
    def is_over(self) -> bool:
        """Whether it ended."""
        return bool(self._greenlet.dead)

    def result(self) -> Any:
        """Begin, and return what it returns; once only.

        :raises BaseException: what it raises, or what is thrown at who waits: then it goes on.
        """
        self._waiting = getcurrent()
        try:
            return self._greenlet.switch()
        except BaseException:
            self._waiting = None
            raise

    def _run(self) -> Any:
        try:
            return self._function()
        except BaseException:
            if self._waiting is not None:
                raise
            _log.exception("what nobody waited for any more")
        finally:
            # each wait made the hub its parent, which is where it returns to
            if self._waiting is not None:
                self._greenlet.parent = self._waiting


class Shortcut:
    """Has a connection to the message log of its own: see the module's docstring."""

    def __init__(
        self, settings: Settings, pump: ApartPump, mailbox: Mailbox, counts: PumpCounts
    ) -> None:
        self._limit = settings.retries.limit
        self._pump = pump
        self._mailbox = mailbox
        self._counts = counts
        self._database = Database(database_url(settings), eventlet.sleep, is_on_hub=True)
        self._turn = Semaphore(1)
        self._is_left = False
        self._is_closed = False
        self._is_over = False

    @classmethod
    def beside(
        cls, pump: Pump | UnloggedPump, settings: Settings, mailbox: Mailbox, counts: PumpCounts
    ) -> Shortcut | None:
        """Return one, unless everything is for this pump to store.

        SQLite stops the hub, and while the provider is changed the log says who has what.
        """
        if isinstance(pump, ApartPump) and settings.database and not settings.drain:
            return cls(settings, pump, mailbox, counts)
        return None

    def append(self, envelopes: Sequence[Envelope], *, again: bool) -> bool:
        """Store an event and have it published, unless that is for the pump to do.

        :returns: whether it is stored. Otherwise nothing is, and the pump finds out why not.
        :raises DispatchError: when nothing was stored.
        :raises DispatchUncertainError: when that could not be found out.
        """
        if self._is_left:
            # whoever dispatched that was interrupted, and goes on with what must not overtake it
            with self._turn:
                pass
        opening = self._pump.opening(envelopes[0]) if len(envelopes) == 1 and not again else None
        if opening is None or self._is_closed or not self._turn.acquire(blocking=False):
            return False
        storing = Aside(self._store, envelopes[0], opening)
        try:
            is_stored: bool = storing.result()
        except BaseException:
            self._is_left = not storing.is_over
            raise
        return is_stored

    def _store(self, envelope: Envelope, opening: Opening) -> bool:
        began = monotonic()
        try:
            new = self._database.run(partial(self._step, envelope, opening.handover))
        except CommitUncertainError as exc:
            if self._is_over:
                raise DispatchUncertainError([envelope.id], str(exc)) from exc
            promise = Promise()
            # before anything that is dispatched next
            self._mailbox.send(Doubt(Append([envelope], promise), exc))
        except (QueueError, SQLAlchemyError):
            self._database.drop_connection()
            return False
        else:
            self._counts.flushed(monotonic() - began, 1)
            self._publish(envelope, new, opening.setbacks)
            return True
        finally:
            self._is_left = False
            self._turn.release()
        promise.wait()
        return True

    def _step(self, envelope: Envelope, handover: Handover, tx: Transaction) -> list[Delivery]:
        return log.append(tx, [envelope], self._limit, handover=handover, is_last=True)

    def _publish(self, envelope: Envelope, new: list[Delivery], setbacks: int) -> None:
        if new:
            self._pump.publish(new, setbacks)
        else:
            self._pump.is_unwanted(envelope)
            self._mailbox.send(Call(partial(_finish, envelope), Promise()))

    def close(self, seconds: float) -> None:
        """Leave everything to the pump from now on; wait so long for what is on its way."""
        self._is_closed = True
        with eventlet.Timeout(seconds, False):
            self._turn.acquire()
        # from here on there may be no pump to find anything out
        self._is_over = True
        self._database.close()


def _finish(envelope: Envelope, tx: Transaction) -> tuple[None, list[Delivery]]:
    log.finish(tx, [envelope.id])
    return None, []
