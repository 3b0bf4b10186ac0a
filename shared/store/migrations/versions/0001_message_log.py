"""The message log: messages, subscriptions, deliveries, attempts, audit log."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

from shared.tables import TEXT, JsonText, big_key, millis

revision = "0001"
down_revision = None


def _words(name: str, *words: str) -> sa.Enum:
    return sa.Enum(*words, name=name, create_constraint=True)


def _seconds() -> Any:
    return sa.DateTime().with_variant(sa.TIMESTAMP(), "mysql", "mariadb")


def _now(*, on_update: bool = False) -> Any:
    on_mysql = op.get_bind().dialect.name in ("mysql", "mariadb")
    suffix = " ON UPDATE CURRENT_TIMESTAMP" if on_update and on_mysql else ""
    return sa.text("CURRENT_TIMESTAMP" + suffix)


def upgrade() -> None:
    _create_messages()
    _create_subscriptions()
    _create_deliveries()
    _create_attempts()
    _create_audit_log()


def _create_messages() -> None:
    op.create_table(
        "queue_messages",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("queue_name", sa.String(255), nullable=False),
        sa.Column("message_type", sa.String(255), nullable=False),
        sa.Column("payload", JsonText(), nullable=False),
        sa.Column(
            "status",
            _words("messagestatus", "pending", "processing", "completed", "failed", "retry"),
            server_default="pending",
        ),
        sa.Column(
            "priority",
            _words("priority", "low", "normal", "high", "urgent"),
            server_default="normal",
        ),
        sa.Column("retry_count", sa.Integer, server_default="0"),
        sa.Column("max_retries", sa.Integer, server_default="3"),
        sa.Column("processed_at", _seconds(), nullable=True),
        sa.Column("scheduled_at", _seconds(), nullable=True),
        sa.Column("error_message", sa.Text, nullable=True),
        sa.Column("metadata", JsonText(), nullable=True),
        sa.Column("created_at", _seconds(), server_default=_now()),
        sa.Column("updated_at", _seconds(), server_default=_now(on_update=True)),
        sa.CheckConstraint(
            "status <> 'completed' OR processed_at IS NOT NULL", name="completed_is_processed"
        ),
        **TEXT,
    )
    op.create_index(
        "ix_queue_messages_queue_status", "queue_messages", ["queue_name", "status", "created_at"]
    )
    op.create_index(
        "ix_queue_messages_status",
        "queue_messages",
        ["status", "created_at"],
        sqlite_where=sa.text("status = 'failed'"),
    )


def _create_subscriptions() -> None:
    op.create_table(
        "queue_subscriptions",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("queue_name", sa.String(200), nullable=False),
        sa.Column("source", sa.String(200), nullable=False),
        sa.Column("message_type", sa.String(200), nullable=False),
        sa.Column("subscriber", sa.String(255), nullable=False),
        sa.Column("handler_type", sa.String(20), nullable=False),
        sa.Column("reliable", sa.Boolean, nullable=False),
        sa.Column("created_at", millis(), nullable=False),
        sa.Column("seen_at", millis(), nullable=True),
        sa.Column("retired_at", millis(), nullable=True),
        sa.Column("paused_at", millis(), nullable=True),
        sa.UniqueConstraint(
            "queue_name", "message_type", "subscriber", name="uq_queue_subscriptions"
        ),
        **TEXT,
    )


def _create_deliveries() -> None:
    op.create_table(
        "queue_deliveries",
        sa.Column("seq", big_key(), primary_key=True, autoincrement=True),
        sa.Column("message_id", sa.String(36), sa.ForeignKey("queue_messages.id"), nullable=False),
        sa.Column(
            "subscription_id", sa.Integer, sa.ForeignKey("queue_subscriptions.id"), nullable=False
        ),
        sa.Column(
            "status",
            _words(
                "deliverystatus",
                "pending",
                "processing",
                "completed",
                "failed",
                "retry",
                "discarded",
            ),
            nullable=False,
            server_default="pending",
        ),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("takeovers", sa.Integer, nullable=False, server_default="0"),
        sa.Column("available_at", millis(), nullable=True),
        sa.Column("started_at", millis(), nullable=True),
        sa.Column("processed_at", millis(), nullable=True),
        sa.Column("worker", sa.String(255), nullable=True),
        sa.Column("error_type", sa.String(255), nullable=True),
        sa.Column("error_message", sa.Text, nullable=True),
        sa.Column("priority_rank", sa.SmallInteger, nullable=False),
        sa.Column("ready", sa.Boolean, nullable=False, server_default="0"),
        sa.Column("lease_token", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_expires_at", millis(), nullable=True),
        sa.CheckConstraint(
            "status <> 'completed' OR processed_at IS NOT NULL",
            name="delivery_completed_is_processed",
        ),
        sa.CheckConstraint(
            "status <> 'failed' OR error_message IS NOT NULL", name="failed_has_error"
        ),
        **TEXT,
    )
    table = "queue_deliveries"
    op.create_index("ix_queue_deliveries_message", table, ["message_id"])
    op.create_index(
        "ix_queue_deliveries_status",
        table,
        ["subscription_id", "status"],
        sqlite_where=sa.text("status <> 'completed'"),
    )
    op.create_index(
        "ix_queue_deliveries_ready",
        table,
        ["subscription_id", "ready", "priority_rank", "seq"],
        sqlite_where=sa.text("ready = 1"),
    )
    op.create_index(
        "ix_queue_deliveries_available",
        table,
        ["subscription_id", "available_at"],
        sqlite_where=sa.text("available_at IS NOT NULL"),
    )
    op.create_index(
        "ix_queue_deliveries_lease",
        table,
        ["subscription_id", "lease_expires_at"],
        sqlite_where=sa.text("lease_expires_at IS NOT NULL"),
    )


def _create_attempts() -> None:
    op.create_table(
        "queue_attempts",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("delivery_seq", big_key(), sa.ForeignKey("queue_deliveries.seq"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String(20), nullable=False),
        sa.Column("started_at", millis(), nullable=True),
        sa.Column("ended_at", millis(), nullable=False),
        sa.Column("retry_at", millis(), nullable=True),
        sa.Column("worker", sa.String(255), nullable=True),
        sa.Column("error_type", sa.String(255), nullable=True),
        sa.Column("error_message", sa.Text, nullable=True),
        sa.Column(
            "traceback", sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=True
        ),
        **TEXT,
    )
    op.create_index("ix_queue_attempts_delivery", "queue_attempts", ["delivery_seq"])


def _create_audit_log() -> None:
    op.create_table(
        "queue_audit_log",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("at", millis(), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("action", sa.String(50), nullable=False),
        sa.Column("target", sa.String(255), nullable=False),
        sa.Column("detail", JsonText(), nullable=True),
        **TEXT,
    )


def downgrade() -> None:
    for table in (
        "queue_audit_log",
        "queue_attempts",
        "queue_deliveries",
        "queue_subscriptions",
        "queue_messages",
    ):
        op.drop_table(table)
