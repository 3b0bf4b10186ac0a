"""A service that books each message once, and dies after some of its commits."""

import os
import signal

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.events import event_handler
from shared.store import DatabaseSession
from shared.store.inbox import inbox_table
from tests.flow.apps.recorder import record


class Base(DeclarativeBase):
    pass


class Entry(Base):
    __tablename__ = "ledger_bookings"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    n: Mapped[int]


inbox = inbox_table(Base.metadata, "ledger")


class Ledger:
    name = "ledger"

    db = DatabaseSession(Base)

    @event_handler("source", "entry.made", inbox=os.environ.get("INBOX", "db"))
    def book(self, payload):
        record(what="ran", n=payload["n"])
        self.db.add(Entry(n=payload["n"]))
        self.db.commit()
        if payload["dies"]:
            record(what="died", n=payload["n"])
            os.kill(os.getpid(), signal.SIGKILL)
