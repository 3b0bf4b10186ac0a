"""Sends each mail once.

A row is claimed before the mail server is talked to and marked as sent right after;
no transaction is open in between. A claim keeps others from sending the same mail; it
ends by itself for the case that its holder died. So a mail goes out twice only where
its sender died after the server took it and before that was noted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.message import EmailMessage
from enum import Enum, auto
from typing import Any
from uuid import uuid4

import eventlet
from sqlalchemy import ColumnElement, select, update
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.orm import Session

from services.notifications.mail import SEND_SECONDS, Mailer, MailRefusedError
from services.notifications.models import MailRecord, Status
from shared.database import utc_now
from shared.errors import Reject

_log = logging.getLogger(__name__)

CLAIM_SECONDS = SEND_SECONDS + 5
"""How long a claim lasts: longer than its holder can be sending."""

POLL_SECONDS = 0.25
"""How often somebody else's claim is looked at."""

LONGEST_PAUSE_SECONDS = 2.0
"""The most between two tries to note in a database that is away that a mail was sent."""


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail that a message asks for.

    :param compose: makes the mail itself; called only where it has to be sent.
    """

    message_id: str
    kind: str
    recipient: str
    rfc_message_id: str
    compose: Callable[[], EmailMessage]


class Claim(Enum):
    """What came of asking for a mail."""

    OURS = auto()
    HELD = auto()
    SENT = auto()


def send_once(db: Session, mailer: Mailer, mail: Mail) -> bool:
    """Send a mail unless it was sent; say whether it was sent just now.

    :raises Reject: when it is refused for good.
    :raises MailUnavailableError: when it is to be tried again.
    """
    claimant = str(uuid4())
    if not _wait_for_claim(db, mail, claimant):
        _log.info("sent before message_id=%s kind=%s", mail.message_id, mail.kind)
        return False
    try:
        mailer.send(mail.compose())
    except MailRefusedError as exc:
        _release(db, mail, claimant, status=Status.REFUSED, error=str(exc))
        raise Reject(str(exc)) from exc
    except Exception as exc:
        with contextlib.suppress(SQLAlchemyError):
            _release(db, mail, claimant, error=str(exc))
        raise
    _note_sent(db, mail)
    return True


def _wait_for_claim(db: Session, mail: Mail, claimant: str) -> bool:
    """Claim the mail; return whether it is still to be sent."""
    while (claim := _claim(db, mail, claimant)) is Claim.HELD:
        eventlet.sleep(POLL_SECONDS)
    return claim is Claim.OURS


def _claim(db: Session, mail: Mail, claimant: str) -> Claim:
    try:
        record, now = _locked_record(db, mail), utc_now(db.connection())
    except IntegrityError:
        db.rollback()
        if _find(db, mail) is None:
            raise
        # somebody made the row just now, to send the mail
        return Claim.HELD
    claim = _state_of(record, now)
    if claim is Claim.OURS:
        record.status = Status.SENDING
        record.claimed_by = claimant
        record.claimed_until = now + timedelta(seconds=CLAIM_SECONDS)
    db.commit()
    return claim


def _state_of(record: MailRecord, now: datetime) -> Claim:
    if record.status == Status.SENT:
        return Claim.SENT
    held = record.claimed_until is not None and record.claimed_until > now
    return Claim.HELD if held else Claim.OURS


def _locked_record(db: Session, mail: Mail) -> MailRecord:
    found = _find(db, mail)
    if found is not None:
        return found
    new = _new_record(mail)
    db.add(new)
    db.flush()
    return new


def _find(db: Session, mail: Mail) -> MailRecord | None:
    return db.scalar(select(MailRecord).where(*_is(mail)).with_for_update())


def _new_record(mail: Mail) -> MailRecord:
    return MailRecord(
        message_id=mail.message_id,
        kind=mail.kind,
        recipient=mail.recipient,
        rfc_message_id=mail.rfc_message_id,
        status=Status.SENDING,
    )


def _release(db: Session, mail: Mail, claimant: str, **changes: Any) -> None:
    """Give the claim back, if it is still ours."""
    _end_claim(db, mail, MailRecord.claimed_by == claimant, **changes)


def _note_sent(db: Session, mail: Mail) -> None:
    """Note that a mail was sent, however long the database is away: nothing else knows it."""
    for pause in _pauses():
        try:
            now = utc_now(db.connection())
            unsent = MailRecord.status != Status.SENT
            _end_claim(db, mail, unsent, status=Status.SENT, sent_at=now, error=None)
            return
        except (OperationalError, InterfaceError) as exc:
            _log.warning("not noted yet as sent message_id=%s: %s", mail.message_id, exc.orig)
            db.rollback()
            eventlet.sleep(pause)


def _pauses() -> Iterator[float]:
    pause = 0.05
    while True:
        yield pause
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def _end_claim(db: Session, mail: Mail, condition: ColumnElement[bool], **changes: Any) -> None:
    db.execute(
        update(MailRecord)
        .where(*_is(mail), condition)
        .values(claimed_by=None, claimed_until=None, **changes)
        .execution_options(synchronize_session=False)
    )
    db.commit()


def _is(mail: Mail) -> tuple[Any, ...]:
    return MailRecord.message_id == mail.message_id, MailRecord.kind == mail.kind
