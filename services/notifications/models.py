"""The tables of the notifications service. Times are naive UTC, by the database's clock."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import Boolean, CheckConstraint, Enum, String, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.store.inbox import inbox_table
from shared.tables import big_key, exact, millis


class Base(DeclarativeBase):
    """What the tables of this service have in common."""


class Status(StrEnum):
    """What is becoming of a mail."""

    SENDING = "sending"
    """Not sent yet; tried again with each attempt of its delivery."""

    SENT = "sent"
    """The mail server took it."""

    REFUSED = "refused"
    """The mail server will not take it."""


class MailRecord(Base):
    """A mail that a message asks for: one row each, whatever becomes of it.

    :param rfc_message_id: its Message-ID header, the same at every attempt.
    :param claimed_by: whoever is just sending it; nobody else may until ``claimed_until``.
    :param error: why it was not sent the last time.
    """

    __tablename__ = "notifications_mails"
    __table_args__ = (
        UniqueConstraint("message_id", "kind", name="uq_notifications_mails"),
        CheckConstraint("status <> 'sent' OR sent_at IS NOT NULL", name="sent_has_time"),
        CheckConstraint("status <> 'refused' OR error IS NOT NULL", name="refused_has_error"),
        {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"},
    )

    id: Mapped[int] = mapped_column(big_key(), primary_key=True, autoincrement=True)
    message_id: Mapped[str] = mapped_column(String(36))
    kind: Mapped[str] = mapped_column(String(20))
    recipient: Mapped[str] = mapped_column(String(254))
    rfc_message_id: Mapped[str] = mapped_column(String(400))
    status: Mapped[str] = mapped_column(
        Enum(*(each.value for each in Status), create_constraint=True, name="mail_status")
    )
    claimed_by: Mapped[str | None] = mapped_column(String(36))
    claimed_until: Mapped[datetime | None] = mapped_column(millis())
    created_at: Mapped[datetime] = mapped_column(millis(), server_default=text("CURRENT_TIMESTAMP"))
    sent_at: Mapped[datetime | None] = mapped_column(millis())
    error: Mapped[str | None] = mapped_column(Text)


class AlertRecord(Base):
    """What is told of an episode of an alert, by mail or by the webhook: one row each.

    :param episode: names it: its id, and when it began, for a database may give an id again.
    :param kind: what it is told by.
    :param is_over: whether its end is told, or about to be.
    :param claimed_by: whoever is just telling of it; nobody else may until ``claimed_until``.
    """

    __tablename__ = "notifications_alerts"
    __table_args__ = ({"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"},)

    episode: Mapped[str] = mapped_column(exact(80), primary_key=True)
    kind: Mapped[str] = mapped_column(exact(20), primary_key=True)
    is_over: Mapped[bool] = mapped_column(Boolean)
    claimed_by: Mapped[str | None] = mapped_column(String(36))
    claimed_until: Mapped[datetime | None] = mapped_column(millis())


inbox = inbox_table(Base.metadata, "notifications")
