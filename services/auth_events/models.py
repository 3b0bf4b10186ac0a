"""The tables of auth_events. Times are naive UTC, to the millisecond."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.store.outbox import outbox_table
from shared.tables import exact, millis


class Base(DeclarativeBase):
    """What the tables of this service have in common."""


class Company(Base):
    """A company of which somebody signed up; whoever inserted the row did so first.

    :param identity: ``domain:`` or ``name:`` and what it is known by.
    """

    __tablename__ = "auth_events_companies"

    identity: Mapped[str] = mapped_column(exact(320), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(millis())


class User(Base):
    """Somebody who signed up.

    :param email: in lower case.
    """

    __tablename__ = "auth_events_users"

    id: Mapped[str] = mapped_column(exact(36), primary_key=True)
    email: Mapped[str] = mapped_column(exact(254), unique=True)
    password_hash: Mapped[str] = mapped_column(exact(255))
    first_name: Mapped[str] = mapped_column(String(100))
    last_name: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(20))
    company_name: Mapped[str | None] = mapped_column(String(100))
    company_domain: Mapped[str | None] = mapped_column(String(100))
    created_at: Mapped[datetime] = mapped_column(millis())


class UserSession(Base):
    """A login, until it is revoked or expires.

    :param token_hash: the SHA-256 of the access token, which itself is not kept.
    """

    __tablename__ = "auth_events_sessions"

    id: Mapped[str] = mapped_column(exact(36), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey(User.id), index=True)
    token_hash: Mapped[str] = mapped_column(exact(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(millis())
    expires_at: Mapped[datetime] = mapped_column(millis())
    revoked_at: Mapped[datetime | None] = mapped_column(millis())


outbox = outbox_table(Base.metadata, "auth_events")
