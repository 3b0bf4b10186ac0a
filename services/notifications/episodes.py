"""Tells of an alert in its order: never that it fires once it was told that it is over.

That it fires may have to be tried again while its end is told already. So whoever tells of the
end notes that first, and who would tell of the firing looks there first. Of one alert one
handler tells one thing at a time: what is on its way is waited for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import timedelta
from enum import Enum, auto
from typing import Any
from uuid import uuid4

import eventlet
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from services.notifications import outgoing
from services.notifications.mail import SEND_SECONDS
from services.notifications.models import AlertRecord
from services.notifications.schemas import Alert
from shared.database import utc_now

_log = logging.getLogger(__name__)

CLAIM_SECONDS = outgoing.CLAIM_SECONDS + SEND_SECONDS + 5
"""How long a claim lasts whose holder died: longer than it can wait for a mail, and send it."""


class _Turn(Enum):
    """What came of asking for a turn."""

    OURS = auto()
    HELD = auto()
    OVER = auto()


@contextlib.contextmanager
def telling(db: Session, told: Alert, kind: str) -> Iterator[bool]:
    """Wait until nobody else tells of this alert; give whether it is to be told.

    :param kind: what it is told by: each of them is told by itself.
    """
    claimant = str(uuid4())
    while (turn := _ask(db, told, kind, claimant)) is _Turn.HELD:
        eventlet.sleep(outgoing.POLL_SECONDS)
    if turn is _Turn.OVER:
        _log.info("alert %s is over, and is not told by %s any more", told.alert_id, kind)
        yield False
        return
    try:
        yield True
    finally:
        # it ends by itself, where this cannot be noted
        with contextlib.suppress(SQLAlchemyError):
            _give_back(db, told, kind, claimant)


def _ask(db: Session, told: Alert, kind: str, claimant: str) -> _Turn:
    _make_row(db, told, kind)
    its = _is(told, kind)
    [row] = db.scalars(
        select(AlertRecord).where(*its).with_for_update().execution_options(populate_existing=True)
    )
    now = utc_now(db.connection())
    if told.is_firing and row.is_over:
        turn = _Turn.OVER
    else:
        # at once: what fires is not begun any more while this one waits for its turn
        row.is_over = not told.is_firing
        is_held = row.claimed_until is not None and row.claimed_until > now
        turn = _Turn.HELD if is_held else _Turn.OURS
    if turn is _Turn.OURS:
        row.claimed_by, row.claimed_until = claimant, now + timedelta(seconds=CLAIM_SECONDS)
    db.commit()
    return turn


def _make_row(db: Session, told: Alert, kind: str) -> None:
    # committed by itself, so that everybody has a row to lock
    if db.scalar(select(AlertRecord.kind).where(*_is(told, kind))) is None:
        db.add(AlertRecord(episode=told.episode, kind=kind, is_over=False))
    try:
        db.commit()
    except IntegrityError:
        db.rollback()  # somebody else just did


def _give_back(db: Session, told: Alert, kind: str, claimant: str) -> None:
    db.execute(
        update(AlertRecord)
        .where(*_is(told, kind), AlertRecord.claimed_by == claimant)
        .values(claimed_by=None, claimed_until=None)
        .execution_options(synchronize_session=False)
    )
    db.commit()


def _is(told: Alert, kind: str) -> tuple[Any, ...]:
    return AlertRecord.episode == told.episode, AlertRecord.kind == kind
