"""Which sessions are open follows from the logins and logouts in their own order.

A login opens its session, once. A logout closes the session that it names; one that
names none closes the session, of those open at its time, that was opened last. A named
session that was closed stays closed, also when its login has the later time.

An event that arrives late changes nothing before its own time. So the sessions are
taken back to that time and what happened since is played again; for the newest event,
the usual case, that is the event alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from services.company.models import Activity, Kind, UserSession


def replay_sessions(db: Session, user_id: str, since: datetime) -> None:
    """Bring a user's sessions up to date with the recorded activity from ``since`` on.

    The user's row must be locked.
    """
    opened = _sessions_open_at(db, user_id, since)
    for event in _activity_since(db, user_id, since):
        session = _session_of(db, event, opened)
        if session is None:
            continue
        if event.kind == Kind.LOGGED_IN:
            _open(session, event, opened)
        else:
            _close(session, event, opened)


def open_sessions(db: Session, user_ids: Sequence[str]) -> dict[str, int]:
    """Return how many sessions each user has open; who has none is left out."""
    counts = (
        select(UserSession.user_id, func.count())
        .where(
            UserSession.user_id.in_(user_ids),
            UserSession.opened_at.is_not(None),
            UserSession.closed_at.is_(None),
        )
        .group_by(UserSession.user_id)
    )
    return dict(db.execute(counts).all())


def _sessions_open_at(db: Session, user_id: str, since: datetime) -> list[UserSession]:
    """Take the sessions back to just before ``since``; return the open ones, newest last."""
    later = or_(
        UserSession.opened_at >= since,
        UserSession.closed_at >= since,
        UserSession.closed_at.is_(None),
    )
    sessions = db.scalars(select(UserSession).where(UserSession.user_id == user_id, later)).all()
    for session in sessions:
        if session.opened_at is not None and session.opened_at >= since:
            session.opened_at = None
        if session.closed_at is not None and session.closed_at >= since:
            session.closed_at = None
    opened = [each for each in sessions if each.opened_at is not None and each.closed_at is None]
    return sorted(opened, key=lambda each: (each.opened_at, each.opened_by))


def _activity_since(db: Session, user_id: str, since: datetime) -> Sequence[Activity]:
    return db.scalars(
        select(Activity)
        .where(
            Activity.user_id == user_id,
            Activity.occurred_at >= since,
            Activity.kind != Kind.REGISTERED,
        )
        .order_by(Activity.occurred_at, Activity.message_id)
    ).all()


def _session_of(db: Session, event: Activity, opened: list[UserSession]) -> UserSession | None:
    """Return the session that an event is about, made where it is the first to tell of it."""
    session_id = event.session_id
    if session_id is None and event.kind == Kind.LOGGED_OUT:
        return opened[-1] if opened else None
    key = (event.user_id, session_id or event.message_id)
    session = db.get(UserSession, key)
    if session is None:
        session = UserSession(user_id=key[0], session_id=key[1])
        db.add(session)
        db.flush()
    return session


def _open(session: UserSession, event: Activity, opened: list[UserSession]) -> None:
    if session.opened_at is not None:
        return
    session.opened_at, session.opened_by = event.occurred_at, event.message_id
    session.ip_address, session.user_agent = event.ip_address, event.user_agent
    if session.closed_at is None:
        opened.append(session)


def _close(session: UserSession, event: Activity, opened: list[UserSession]) -> None:
    if session.closed_at is None:
        session.closed_at = event.occurred_at
    if session in opened:
        opened.remove(session)
