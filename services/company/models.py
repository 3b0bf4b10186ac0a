"""The tables of the company service. Times are naive UTC, to the millisecond."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from shared.store.inbox import inbox_table
from shared.tables import big_key, exact, millis


class Base(DeclarativeBase):
    """What the tables of this service have in common."""


class Kind(StrEnum):
    """What a user did."""

    REGISTERED = "registered"
    LOGGED_IN = "logged_in"
    LOGGED_OUT = "logged_out"


class Company(Base):
    """A company, known by its domain, or by its name where nobody told a domain.

    :param identity: ``domain:`` or ``name:`` and what it is known by.
    :param name: as the first who registered for it spelled it; that is the event
        ``named_by`` of the time ``named_at``, whichever arrived first here.
    """

    __tablename__ = "company_companies"

    id: Mapped[int] = mapped_column(big_key(), primary_key=True, autoincrement=True)
    identity: Mapped[str] = mapped_column(exact(320), unique=True)
    name: Mapped[str | None] = mapped_column(String(100))
    domain: Mapped[str | None] = mapped_column(exact(320), index=True)
    named_at: Mapped[datetime | None] = mapped_column(millis())
    named_by: Mapped[str | None] = mapped_column(exact(36))


class User(Base):
    """A user; without ``registered_at``, one of whom only logins or logouts were seen yet.

    :param registered_at: when the newest registration that was seen happened.
    :param registered_by: the id of its message.
    :param email: the one in the newest event that told any: ``email_by``, at ``email_at``.
    """

    __tablename__ = "company_users"

    user_id: Mapped[str] = mapped_column(exact(100), primary_key=True)
    email: Mapped[str | None] = mapped_column(String(254))
    email_at: Mapped[datetime | None] = mapped_column(millis())
    email_by: Mapped[str | None] = mapped_column(exact(36))
    first_name: Mapped[str | None] = mapped_column(String(100))
    last_name: Mapped[str | None] = mapped_column(String(100))
    role: Mapped[str | None] = mapped_column(String(100))
    company_id: Mapped[int | None] = mapped_column(ForeignKey("company_companies.id"), index=True)
    registered_at: Mapped[datetime | None] = mapped_column(millis())
    registered_by: Mapped[str | None] = mapped_column(exact(36))
    last_login_at: Mapped[datetime | None] = mapped_column(millis())

    company: Mapped[Company | None] = relationship()


class UserSession(Base):
    """A session, open from ``opened_at`` until ``closed_at``.

    Without ``opened_at`` it is one whose logout arrived before its login.

    :param session_id: as the events name it, or the id of the message that opened it.
    """

    __tablename__ = "company_sessions"
    __table_args__ = (
        Index("ix_company_sessions_closed", "user_id", "closed_at"),
        Index("ix_company_sessions_opened", "user_id", "opened_at"),
    )

    user_id: Mapped[str] = mapped_column(ForeignKey("company_users.user_id"), primary_key=True)
    session_id: Mapped[str] = mapped_column(exact(100), primary_key=True)
    opened_at: Mapped[datetime | None] = mapped_column(millis())
    opened_by: Mapped[str | None] = mapped_column(exact(36))
    closed_at: Mapped[datetime | None] = mapped_column(millis())
    ip_address: Mapped[str | None] = mapped_column(String(45))
    user_agent: Mapped[str | None] = mapped_column(String(512))


class Activity(Base):
    """One event of a user, recorded once however often its message arrives."""

    __tablename__ = "company_activity"
    __table_args__ = (Index("ix_company_activity_user", "user_id", "occurred_at", "message_id"),)

    message_id: Mapped[str] = mapped_column(exact(36), primary_key=True)
    user_id: Mapped[str] = mapped_column(ForeignKey("company_users.user_id"))
    kind: Mapped[str] = mapped_column(String(20))
    occurred_at: Mapped[datetime] = mapped_column(millis())
    session_id: Mapped[str | None] = mapped_column(exact(100))
    ip_address: Mapped[str | None] = mapped_column(String(45))
    user_agent: Mapped[str | None] = mapped_column(String(512))


inbox = inbox_table(Base.metadata, "company")
