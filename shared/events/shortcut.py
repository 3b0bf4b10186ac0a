"""A single event, stored by the hub itself while the pump rests.

To tell the pump's thread of each, and to be told of the end of it, takes as long as all else that
this process does for an event. What is dispatched while another is stored goes to the pump, which
stores all that gathered together.
"""

from __future__ import annotations

from functools import partial
from time import monotonic

import eventlet
from eventlet.semaphore import Semaphore
from sqlalchemy.exc import SQLAlchemyError

from shared.database import CommitUncertainError, Database, Transaction, database_url
from shared.errors import QueueError
from shared.events.apart import ApartPump
from shared.events.commands import Append, Call, Doubt
from shared.events.pump import Pump
from shared.events.unlogged import UnloggedPump
from shared.native import Mailbox, Promise
from shared.observe.counts import PumpCounts
from shared.settings import Settings
from shared.store import log
from shared.store.log import Handover
from shared.types import Delivery, Envelope


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

    def append(self, envelope: Envelope) -> bool:
        """Store an event and have it published, unless that is for the pump to do.

        :returns: whether it is stored. Otherwise nothing is, and the pump finds out why not.
        :raises DispatchError: when nothing was stored.
        :raises DispatchUncertainError: when that could not be found out.
        """
        opening = self._pump.opening(envelope)
        if opening is None or not self._turn.acquire(blocking=False):
            return False
        began = monotonic()
        try:
            new = self._database.run(partial(self._store, envelope, opening.handover))
        except CommitUncertainError as exc:
            doubt = exc
        except (QueueError, SQLAlchemyError):
            self._database.drop_connection()
            return False
        except BaseException:  # whoever waits was killed, or waited for too long
            self._database.drop_connection()
            raise
        else:
            self._counts.flushed(monotonic() - began, 1)
            self._publish(envelope, new, opening.setbacks)
            return True
        finally:
            self._turn.release()
        self._find_out(envelope, doubt)
        return True

    def _store(self, envelope: Envelope, handover: Handover, tx: Transaction) -> list[Delivery]:
        # all in one round trip: whatever is raised during it leaves the COMMIT in doubt
        return log.append(tx, [envelope], self._limit, handover=handover, is_last=True)

    def _publish(self, envelope: Envelope, new: list[Delivery], setbacks: int) -> None:
        if new:
            self._pump.publish(new, setbacks)
        else:
            self._pump.is_unwanted(envelope)
            self._mailbox.send(Call(partial(_finish, envelope), Promise()))

    def _find_out(self, envelope: Envelope, doubt: CommitUncertainError) -> None:
        promise = Promise()
        self._mailbox.send(Doubt(Append([envelope], promise), doubt))
        if doubt.__cause__ is not None and not isinstance(doubt.__cause__, SQLAlchemyError):
            raise doubt.__cause__  # it is no answer: whoever waits was killed, or for too long
        promise.wait()

    def close(self) -> None:
        """Leave everything to the pump from now on, and wait for what is on its way."""
        self._turn.acquire()
        self._database.close()


def _finish(envelope: Envelope, tx: Transaction) -> tuple[None, list[Delivery]]:
    log.finish(tx, [envelope.id])
    return None, []
