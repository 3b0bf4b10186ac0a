"""Limits of subscriptions, and what each process has and may take of them."""

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, exact, millis

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "queue_limits",
        sa.Column("subscription_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("concurrency", sa.Integer, nullable=True),
        sa.Column("rate", sa.Double, nullable=True),
        sa.Column("burst", sa.Integer, nullable=True),
        sa.Column("tokens", sa.Double, nullable=False),
        sa.Column("refilled_at", millis(), nullable=False),
        **TEXT,
    )
    op.create_table(
        "queue_permits",
        sa.Column("subscription_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker", exact(255), primary_key=True),
        sa.Column("held", sa.Integer, nullable=False),
        sa.Column("spare", sa.Integer, nullable=False),
        sa.Column("expires_at", millis(), nullable=False),
        **TEXT,
    )


def downgrade() -> None:
    op.drop_table("queue_permits")
    op.drop_table("queue_limits")
