"""What comes in, as values; what goes out, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError

from services.company.models import Company, User
from shared.contracts.user import UserLoggedIn, UserLoggedOut, UserRegistered
from shared.errors import Reject
from shared.events import Message

_REGISTERED = UserRegistered(unknown=EXCLUDE)
_LOGGED_IN = UserLoggedIn(unknown=EXCLUDE)
_LOGGED_OUT = UserLoggedOut(unknown=EXCLUDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that a user did.

    :param at: when it happened, naive UTC, to the millisecond.
    """

    message_id: str
    at: datetime
    user_id: str
    email: str | None = None

    @property
    def place(self) -> tuple[datetime, str]:
        """Its place in the one order that all events have, however they arrive."""
        return self.at, self.message_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered(Event):
    """Somebody signed up, perhaps for a company."""

    first_name: str
    last_name: str
    role: str | None = None
    company_name: str | None = None
    company_domain: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedIn(Event):
    """Somebody logged in; ``session_id`` names the session where the source has names."""

    session_id: str | None = None
    ip_address: str | None = None
    user_agent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedOut(Event):
    """Somebody logged out, of ``session_id`` or of the session opened last."""

    session_id: str | None = None


def read_registered(payload: Any, message: Message) -> Registered:
    """Read ``user.registered``.

    :raises Reject: when it breaks its contract.
    """
    return Registered(**_read(_REGISTERED, payload, message))


def read_logged_in(payload: Any, message: Message) -> LoggedIn:
    """Read ``user.logged_in``.

    :raises Reject: when it breaks its contract.
    """
    return LoggedIn(**_read(_LOGGED_IN, payload, message))


def read_logged_out(payload: Any, message: Message) -> LoggedOut:
    """Read ``user.logged_out``.

    :raises Reject: when it breaks its contract.
    """
    return LoggedOut(**_read(_LOGGED_OUT, payload, message))


def _read(schema: Schema, payload: Any, message: Message) -> dict[str, Any]:
    try:
        fields = dict(schema.load(payload))
    except ValidationError as exc:
        raise Reject(f"the payload breaks its contract: {exc.messages}") from exc
    occurred_at = fields.pop("occurred_at", None)
    at = _naive_utc(occurred_at) if occurred_at else _stored_at(message)
    return {**fields, "message_id": message.id, "at": _to_millisecond(at)}


def _stored_at(message: Message) -> datetime:
    # without a message log nobody noted the time: that of its arrival is the nearest
    return message.created_at or datetime.now(UTC).replace(tzinfo=None)


def _naive_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC).replace(tzinfo=None)
    except OverflowError as exc:
        raise Reject(f"occurred_at: {moment} lies outside of the calendar in UTC") from exc


def _to_millisecond(moment: datetime) -> datetime:
    # as a database would keep it, so that what was read equals what was written
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def user_as_json(user: User, open_sessions: int) -> dict[str, Any]:
    """Return a user as JSON; fields that no event told yet are ``null``."""
    return {
        "user_id": user.user_id,
        "email": user.email,
        "first_name": user.first_name,
        "last_name": user.last_name,
        "role": user.role,
        "company": _company_as_json(user.company),
        "last_login_at": _time_as_text(user.last_login_at),
        "open_sessions": open_sessions,
    }


def _company_as_json(company: Company | None) -> Mapping[str, str | None] | None:
    return {"name": company.name, "domain": company.domain} if company else None


def _time_as_text(moment: datetime | None) -> str | None:
    return f"{moment.isoformat(timespec='milliseconds')}Z" if moment else None
