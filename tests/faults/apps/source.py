"""A service that dispatches all the while, and records what it was told of each event.

Before each call it appends what it is about to dispatch, and after it what came of that; so
what has no second line was being dispatched when the process was killed.

Some of it goes with a row of the service's own, through the outbox: there that row tells
what was committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import uuid
from pathlib import Path
from typing import Any

import eventlet
from nameko.testing.services import once
from sqlalchemy import String
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.errors import DispatchError, DispatchUncertainError
from shared.events import EventDispatcher
from shared.store import DatabaseSession
from shared.store.outbox import outbox_table

PRIORITIES = ["low", "normal", "normal", "normal", "high", "urgent"]

BOOKED_RETRIES = 100

PAUSE_SECONDS = 0.4
"""Between two calls, on average: with less the processors are busy with events, and not with what
comes of faults."""

TROUBLES = os.environ.get("TROUBLES", "yes") == "yes"
"""Whether handlers are told to fail, or to take long."""


def append(path: str, **line: Any) -> None:
    """Append a line in one piece, which is there even when the process is killed next."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(line) + "\n").encode())
    os.close(descriptor)


class Base(DeclarativeBase):
    """The tables of this service."""


class Unit(Base):
    """What is committed or rolled back together with its event."""

    __tablename__ = "source_units"

    n: Mapped[str] = mapped_column(String(32), primary_key=True)


outbox = outbox_table(Base.metadata, "source")


class Source:
    """Dispatches until the file ``STOP`` is there."""

    name = "source"

    db = DatabaseSession(Base)
    dispatch = EventDispatcher()

    @once
    def run(self) -> None:
        stop, record = Path(os.environ["STOP"]), os.environ["RECORD"]
        while not stop.exists():
            events = _events(random.choice([1, 1, 1, 5, 30]))
            # all of one transaction are relayed together, or none is
            act = self._commit if random.random() < 0.25 else self._dispatch
            act(record, events)
            eventlet.sleep(random.uniform(0, 2 * PAUSE_SECONDS))
        append(record, what="stopped", pid=os.getpid())

    def _dispatch(self, record: str, events: list[tuple[str, dict[str, Any], Any]]) -> None:
        names = [payload["n"] for _, payload, _ in events]
        payloads = [payload for _, payload, _ in events]
        append(record, what="dispatching", events=payloads, at=time.monotonic())
        try:
            if len(events) == 1:
                [(event_type, payload, options)] = events
                ids = [self.dispatch(event_type, payload, **options)]
            else:
                ids = self.dispatch.many([event[:2] for event in events], **events[0][2])
        except DispatchUncertainError as exc:
            append(record, what="uncertain", names=names, ids=list(exc.message_ids))
        except DispatchError as exc:
            append(record, what="raised", names=names, error=str(exc))
        except Exception as exc:
            append(record, what="surprised", names=names, error=repr(exc))
        else:
            append(record, what="stored", names=names, ids=ids, at=time.monotonic())

    def _commit(self, record: str, events: list[tuple[str, dict[str, Any], Any]]) -> None:
        names = [payload["n"] for _, payload, _ in events]
        payloads = [payload for _, payload, _ in events]
        append(record, what="committing", events=payloads, at=time.monotonic())
        try:
            ids = [self.dispatch(kind, its, session=self.db, **how) for kind, its, how in events]
            self.db.add_all([Unit(n=name) for name in names])
            if random.random() < 0.2:
                self.db.rollback()
                append(record, what="rolled back", names=names)
            else:
                self.db.commit()
                append(record, what="committed", names=names, ids=ids)
        except (SQLAlchemyError, DispatchError):
            # whether it took place is for its row to tell
            with contextlib.suppress(SQLAlchemyError):
                self.db.rollback()
        except Exception as exc:
            append(record, what="surprised", names=names, error=repr(exc))
            self.db.rollback()


def _events(count: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return events that can be dispatched in one call: all with the same options."""
    options: dict[str, Any] = {"priority": random.choice(PRIORITIES), "max_retries": 3}
    types = ["unit.sent", "unit.sent", "unit.grouped"]
    if random.random() < 0.25:
        # its handler fails whenever its database does, and then is to be tried again
        types, options["max_retries"] = ["unit.booked"], BOOKED_RETRIES
    if random.random() < 0.15:
        options["delay"] = random.uniform(0.1, 3)
    return [(random.choice(types), _payload(options), options) for _ in range(count)]


def _payload(options: dict[str, Any]) -> dict[str, Any]:
    payload: dict[str, Any] = {"n": uuid.uuid4().hex, "delay": options.get("delay", 0)}
    kind = random.random() if TROUBLES else 1
    if kind < 0.1:
        # one more than it is tried: a dead letter
        payload["fail"] = random.choice([1, 1, 2, 3, 9])
    elif kind < 0.2:
        payload["sleep"] = random.choice([0.05, 0.3, 1, 3])
    elif kind < 0.21:
        payload["burn"] = 0.5
    return payload
