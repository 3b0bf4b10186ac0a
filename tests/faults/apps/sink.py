"""A service whose handlers do what the payload says, and append a line each time they run."""

from __future__ import annotations

import os
import time
from typing import Any

import eventlet
from sqlalchemy import String
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.events import Backoff, MessageContext, event_handler
from shared.store import DatabaseSession
from shared.store.inbox import inbox_table
from tests.faults.apps.source import append

FAST = Backoff(base=0.05, factor=2, cap=1)


class ToldToFailError(Exception):
    """Raised since the payload says so."""


class Base(DeclarativeBase):
    """The tables of this service."""


class Booking(Base):
    """A row for each time that an event was booked: nothing keeps it from being there twice."""

    __tablename__ = "sink_bookings"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    n: Mapped[str] = mapped_column(String(32))


inbox = inbox_table(Base.metadata, "sink")


class Sink:
    """Four subscriptions; two of them for the same events."""

    name = "sink"

    db = DatabaseSession(Base)
    message = MessageContext()

    @event_handler("source", "unit.sent")
    def note(self, payload: Any) -> None:
        self._note("note", "ran", self.message, payload)

    @event_handler("source", "unit.sent", backoff=FAST, expected_exceptions=ToldToFailError)
    def obey(self, payload: Any) -> None:
        self._note("obey", "ran", self.message, payload)
        if self.message.attempt <= payload.get("fail", 0):
            raise ToldToFailError(f"attempt {self.message.attempt}")
        eventlet.sleep(payload.get("sleep", 0))
        end = time.monotonic() + payload.get("burn", 0)
        while time.monotonic() < end:
            pass
        self._note("obey", "done", self.message, payload)

    @event_handler("source", "unit.grouped", batch_size=10, batch_timeout=0.1)
    def group(self, payloads: list[Any]) -> None:
        for message, payload in zip(self.message, payloads, strict=True):
            self._note("group", "ran", message, payload)

    @event_handler(
        "source", "unit.booked", inbox="db", backoff=FAST, expected_exceptions=SQLAlchemyError
    )
    def book(self, payload: Any) -> None:
        self.db.add(Booking(n=payload["n"]))
        self.db.flush()
        self._note("book", "ran", self.message, payload)
        self.db.commit()
        # what is killed here has its effects, and comes again
        eventlet.sleep(payload.get("sleep", 0.01))

    @staticmethod
    def _note(handler: str, what: str, message: Any, payload: Any) -> None:
        line = {"handler": handler, "what": what, "id": message.id, "n": payload["n"]}
        append(
            os.environ["EFFECTS"],
            **line,
            attempt=message.attempt,
            pid=os.getpid(),
            at=time.monotonic(),
        )
