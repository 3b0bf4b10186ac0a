"""Writes what events tell, so that it comes out the same in whatever order they arrive.

Every event has a place in one order: its time, then its message id. Where two events
tell the same thing, that order decides and not the order of arrival. A message that was
recorded before changes nothing. The user's row is locked first: two handlers never work
on one user at the same time; who lost a race for a row that is not there yet begins again.
"""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Session

from services.company.models import Activity, Company, Kind, User
from services.company.schemas import Event, LoggedIn, LoggedOut, Registered
from services.company.sessions import replay_sessions
from shared.database import is_transient

Row = TypeVar("Row", bound=DeclarativeBase)

TRIES = 10
"""Handlers that make one company at the same time lose to each other, all but one a time."""


def record(db: Session, event: Event) -> None:
    """Record an event and commit, whatever else is being recorded at the same time."""
    for tries_left in reversed(range(TRIES)):
        try:
            _record(db, event)
            db.commit()
            return
        except (IntegrityError, OperationalError) as exc:
            db.rollback()
            if not tries_left or not _lost_a_race(exc):
                raise


def _lost_a_race(exc: DBAPIError) -> bool:
    # somebody made the same row first, or the database chose us to end a deadlock
    return isinstance(exc, IntegrityError) or is_transient(exc)


def _record(db: Session, event: Event) -> None:
    match event:
        case Registered():
            _record_registration(db, event)
        case LoggedIn():
            _record_login(db, event)
        case LoggedOut():
            _record_logout(db, event)


def _record_registration(db: Session, event: Registered) -> None:
    """Create or complete the user, and the company where the event tells one."""
    user = _locked_user(db, event.user_id)
    if not _is_new(db, event, Kind.REGISTERED):
        return
    _tell_email(user, event)
    company = _company_of(db, event)
    if event.place >= _place(user.registered_at, user.registered_by):
        user.registered_at, user.registered_by = event.place
        user.first_name, user.last_name, user.role = event.first_name, event.last_name, event.role
        user.company = company


def _record_login(db: Session, event: LoggedIn) -> None:
    """Note the login and open its session."""
    user = _locked_user(db, event.user_id)
    if not _is_new(db, event, Kind.LOGGED_IN, event.session_id, event.ip_address, event.user_agent):
        return
    _tell_email(user, event)
    user.last_login_at = max(user.last_login_at or event.at, event.at)
    replay_sessions(db, event.user_id, since=event.at)


def _record_logout(db: Session, event: LoggedOut) -> None:
    """Note the logout and close its session, be that known yet or not."""
    user = _locked_user(db, event.user_id)
    if not _is_new(db, event, Kind.LOGGED_OUT, event.session_id):
        return
    _tell_email(user, event)
    replay_sessions(db, event.user_id, since=event.at)


def _locked_user(db: Session, user_id: str) -> User:
    found = select(User).where(User.user_id == user_id)
    return _find_or_make(db, found, User(user_id=user_id))


def _find_or_make(db: Session, query: Select[Any], new: Row) -> Row:
    """Return the row of ``query``, else ``new``, locked until the transaction ends.

    :raises IntegrityError: when somebody else made it in the meantime.
    """
    found: Row | None = db.scalar(query.with_for_update())
    if found is not None:
        return found
    db.add(new)
    db.flush()
    return new


def _is_new(
    db: Session,
    event: Event,
    kind: Kind,
    session_id: str | None = None,
    ip_address: str | None = None,
    user_agent: str | None = None,
) -> bool:
    """Record the event as activity; say whether this is the first time that it arrives."""
    if db.get(Activity, event.message_id) is not None:
        return False
    db.add(
        Activity(
            message_id=event.message_id,
            user_id=event.user_id,
            kind=kind,
            occurred_at=event.at,
            session_id=session_id,
            ip_address=ip_address,
            user_agent=user_agent,
        )
    )
    db.flush()
    return True


def _tell_email(user: User, event: Event) -> None:
    if event.email and event.place >= _place(user.email_at, user.email_by):
        user.email = event.email
        user.email_at, user.email_by = event.place


def plain_domain(text: str | None) -> str:
    """Return a domain as companies are known by it: in lower case."""
    return _plain((text or "").lower())


def _company_of(db: Session, event: Registered) -> Company | None:
    name, domain = (event.company_name or "").strip(), plain_domain(event.company_domain)
    if not name and not domain:
        return None
    identity = f"domain:{domain}" if domain else f"name:{_plain(name.casefold())}"
    company = _find_or_make(
        db,
        select(Company).where(Company.identity == identity),
        Company(identity=identity, domain=domain or None),
    )
    if name and (company.name is None or event.place < _place(company.named_at, company.named_by)):
        company.name = name
        company.named_at, company.named_by = event.place
    return company


def _plain(text: str) -> str:
    # one spelling for what looks the same: é is one character or two
    return unicodedata.normalize("NFC", text).strip()


def _place(at: datetime | None, message_id: str | None) -> tuple[datetime, str]:
    """Return where a stored fact comes from; one that nobody told lies before all events."""
    return at or datetime.min, message_id or ""
