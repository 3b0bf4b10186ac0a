"""Schedules: what is dispatched at the times of a cron expression."""

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, JsonText, millis

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "queue_schedules",
        sa.Column("name", sa.String(200), primary_key=True),
        sa.Column("queue_name", sa.String(200), nullable=False),
        sa.Column("message_type", sa.String(200), nullable=False),
        sa.Column("payload", JsonText(), nullable=False),
        sa.Column("priority", sa.String(20), nullable=False),
        sa.Column("metadata", JsonText(), nullable=True),
        sa.Column("cron", sa.String(255), nullable=False),
        sa.Column("time_zone", sa.String(255), nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("next_at", millis(), nullable=True),
        sa.Column("last_at", millis(), nullable=True),
        sa.Column("last_message_id", sa.String(36), nullable=True),
        sa.Column("skipped", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("error_at", millis(), nullable=True),
        sa.Column("updated_by", sa.String(255), nullable=False),
        sa.Column("updated_at", millis(), nullable=False),
        **TEXT,
    )
    op.create_index("ix_queue_schedules_next", "queue_schedules", ["next_at"])


def downgrade() -> None:
    op.drop_table("queue_schedules")
