"""Alerts and their thresholds, what is done now and then, and counts of what was removed."""

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, JsonText, big_key, exact, millis

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "queue_alerts",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("queue_name", sa.String(200), nullable=False),
        sa.Column("rule", sa.String(30), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("current", exact(240), nullable=True),
        sa.Column("value", sa.Double(), nullable=True),
        sa.Column("threshold", sa.Double(), nullable=False),
        sa.Column("looks", sa.Integer, nullable=False),
        sa.Column("began_at", millis(), nullable=False),
        sa.Column("ended_at", millis(), nullable=True),
        sa.Column("message_id", sa.String(36), nullable=True),
        sa.Column("end_message_id", sa.String(36), nullable=True),
        sa.Column("detail", JsonText(), nullable=True),
        sa.UniqueConstraint("current", name="uq_queue_alerts_current"),
        **TEXT,
    )
    op.create_table(
        "queue_alert_thresholds",
        sa.Column("queue_name", exact(200), primary_key=True),
        sa.Column("rule", exact(30), primary_key=True),
        sa.Column("threshold", sa.Double(), nullable=False),
        **TEXT,
    )
    op.create_table(
        "queue_timers",
        sa.Column("name", exact(30), primary_key=True),
        sa.Column("next_at", millis(), nullable=False),
        sa.Column("last_at", millis(), nullable=True),
        sa.Column("result", JsonText(), nullable=True),
        **TEXT,
    )
    op.create_table(
        "queue_removed",
        sa.Column("subscription_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("completed", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("dead", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("discarded", sa.BigInteger, nullable=False, server_default="0"),
        **TEXT,
    )


def downgrade() -> None:
    for name in ("removed", "timers", "alert_thresholds", "alerts"):
        op.drop_table(f"queue_{name}")
