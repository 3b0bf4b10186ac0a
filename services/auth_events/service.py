"""The service: three routes, each of which dispatches its event, and a method to call."""

from __future__ import annotations

import secrets
import unicodedata
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from sqlalchemy import Select, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from werkzeug.wrappers import Request

from services.auth_events.models import Base, Company, User, UserSession
from services.auth_events.passwords import Password, hash_password, is_outdated, is_right
from services.auth_events.schemas import LoginSchema, RegisterSchema
from shared.database import utc_now
from shared.events import Dispatch, EventDispatcher
from shared.rpc import rpc
from shared.store import DatabaseSession
from shared.web import Problem, bearer_token, http

SESSION_SECONDS = 8 * 3600
"""How long an access token is good: a day at work."""

TOKEN_BYTES = 32

LONGEST_USER_AGENT = 512
"""Characters; what the contract of ``user.logged_in`` allows."""

Answer = tuple[int, dict[str, Any] | None]


class AuthEventsService:
    """Signs people up, in and out."""

    name = "auth_events"

    # what a statement that fails was given holds hashes, and the error is logged
    db = DatabaseSession(Base, engine_options={"hide_parameters": True})
    dispatch = EventDispatcher()

    @http("POST", "/auth/register", schema=RegisterSchema)
    def register(self, _request: Request, body: dict[str, Any]) -> Answer:
        """Create a user, and dispatch ``user.registered``."""
        return 201, sign_up(self.db, self.dispatch, body)

    @http("POST", "/auth/login", schema=LoginSchema)
    def login(self, request: Request, body: dict[str, Any]) -> Answer:
        """Open a session, and dispatch ``user.logged_in``."""
        user = authenticate(self.db, body["email"], body["password"])
        return 200, open_session(self.db, self.dispatch, user, _caller(request))

    @http("POST", "/auth/logout")
    def logout(self, request: Request) -> Answer:
        """Revoke the session of the bearer token, and dispatch ``user.logged_out``."""
        close_session(self.db, self.dispatch, bearer_token(request))
        return 204, None

    @rpc(sensitive_arguments="token")
    def get_session(self, token: str) -> dict[str, Any] | None:
        """Say who is logged in, to a service that was shown an access token.

        :returns: ``session_id``, ``user_id``, ``email`` and ``expires_at``; ``None`` when
            the token opens no session, or no longer.
        """
        return find_session(self.db, token)

    @http("GET", "/health")
    def health(self, _request: Request) -> Answer:
        """Answer 200 while the database answers."""
        self.db.execute(text("SELECT 1"))
        return 200, {"status": "ok"}


def sign_up(db: Session, dispatch: Dispatch, body: Mapping[str, Any]) -> dict[str, Any]:
    """Create the user and the event in one transaction.

    :param body: what :class:`RegisterSchema` loads.
    :returns: the user, and the id of the message.
    :raises Problem: 409 when the address is somebody's already.
    """
    person = dict(body)
    # before the transaction, which no other writer shall wait for
    password_hash = hash_password(person.pop("password"))
    try:
        now = _now(db)
        person["role"] = _role(db, person["company_name"], person["company_domain"], now)
        user = User(id=str(uuid.uuid4()), password_hash=password_hash, created_at=now, **person)
        db.add(user)
        db.flush()
        shown = {"user_id": user.id, **person}
        message_id = dispatch("user.registered", shown, session=db)
        db.commit()
    except IntegrityError as exc:
        db.rollback()
        raise _email_taken() from exc
    return {"user": shown, "message_id": message_id}


def authenticate(db: Session, email: str, password: Password) -> User:
    """Return the user of that address and password.

    :raises Problem: 401, the same and as slow for a wrong password and an unknown address.
    """
    user = db.scalar(select(User).where(User.email == email))
    # the transaction ends here: no other writer shall wait for argon2
    db.expunge_all()
    db.rollback()
    if not is_right(user.password_hash if user else None, password) or user is None:
        raise Problem(401, "wrong-credentials", "Email or password is wrong")
    if is_outdated(user.password_hash):
        _rehash(db, user, password)
    return user


def open_session(
    db: Session, dispatch: Dispatch, user: User, caller: Mapping[str, Any]
) -> dict[str, Any]:
    """Create the session and its event in one transaction; return the access token.

    :param caller: ``ip_address`` and ``user_agent``, for the event.
    """
    token, now = secrets.token_urlsafe(TOKEN_BYTES), _now(db)
    session = UserSession(
        id=str(uuid.uuid4()),
        user_id=user.id,
        token_hash=_hash_token(token),
        created_at=now,
        expires_at=now + timedelta(seconds=SESSION_SECONDS),
    )
    db.add(session)
    dispatch("user.logged_in", {**_activity(user, session.id, now), **caller}, session=db)
    db.commit()
    return {
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": SESSION_SECONDS,
        "user_id": user.id,
    }


def close_session(db: Session, dispatch: Dispatch, token: str | None) -> None:
    """Revoke the session and create its event in one transaction.

    :raises Problem: 401 when the token opens no session, or no longer.
    """
    if token is None:
        raise _no_session(None)
    now = _now(db)
    # locked: of two logouts at once, the second finds it revoked
    session = db.scalar(_open_session(token, now).with_for_update())
    if session is None:
        raise _no_session(token)
    session.revoked_at = now
    user = db.get_one(User, session.user_id)
    dispatch("user.logged_out", _activity(user, session.id, now), session=db)
    db.commit()


def find_session(db: Session, token: str) -> dict[str, Any] | None:
    """Return the open session of an access token, with its user."""
    session = db.scalar(_open_session(token, _now(db)))
    if session is None:
        return None
    return {
        "session_id": session.id,
        "user_id": session.user_id,
        "email": db.get_one(User, session.user_id).email,
        "expires_at": _as_text(session.expires_at),
    }


def _open_session(token: str, now: datetime) -> Select[UserSession]:
    return select(UserSession).where(
        UserSession.token_hash == _hash_token(token),
        UserSession.revoked_at.is_(None),
        UserSession.expires_at > now,
    )


def _role(db: Session, company_name: str | None, company_domain: str | None, now: datetime) -> str:
    """The first person of a company is its admin."""
    identity = _identity(company_name, company_domain)
    return "admin" if identity and _is_first(db, identity, now) else "user"


def _identity(company_name: str | None, company_domain: str | None) -> str | None:
    if company_domain:
        return f"domain:{company_domain}"
    if company_name:
        return "name:" + unicodedata.normalize("NFC", company_name.casefold())
    return None


def _is_first(db: Session, identity: str, now: datetime) -> bool:
    # of two at once, the second waits here until the first has committed, or has not
    try:
        with db.begin_nested():
            db.add(Company(identity=identity, created_at=now))
    except IntegrityError:
        return False
    return True


def _rehash(db: Session, user: User, password: Password) -> None:
    renewed = update(User).values(password_hash=hash_password(password))
    db.execute(renewed.where(User.id == user.id, User.password_hash == user.password_hash))


def _activity(user: User, session_id: str, at: datetime) -> dict[str, Any]:
    return {
        "user_id": user.id,
        "email": user.email,
        "session_id": session_id,
        # events arrive in any order; by this one, to the millisecond, they can be sorted
        "occurred_at": _as_text(at),
    }


def _as_text(at: datetime) -> str:
    return at.replace(tzinfo=UTC).isoformat(timespec="milliseconds")


def _caller(request: Request) -> dict[str, Any]:
    agent = "".join(filter(str.isprintable, request.headers.get("User-Agent", "")))
    return {
        # without the interface that an address of one link may name
        "ip_address": (request.remote_addr or "").partition("%")[0] or None,
        "user_agent": agent[:LONGEST_USER_AGENT] or None,
    }


def _now(db: Session) -> datetime:
    return utc_now(db.connection())


def _hash_token(token: str) -> str:
    # it is random and long: nothing is gained by a slow hash
    return sha256(token.encode()).hexdigest()


def _email_taken() -> Problem:
    return Problem(409, "email-taken", "Somebody has this address already")


def _no_session(token: str | None) -> Problem:
    # without a token there is nothing to call invalid (RFC 6750, 3.1)
    challenge = 'Bearer error="invalid_token"' if token else "Bearer"
    return Problem(
        401,
        "not-logged-in",
        "No session is open",
        detail="Send the access token of an open session as Authorization: Bearer",
        headers={"WWW-Authenticate": challenge},
    )
