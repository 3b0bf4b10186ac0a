"""Ramps: dead letters of a group that are retried step by step, and how far that is."""

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, big_key, millis

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "queue_ramps",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("fingerprint", sa.String(16), nullable=False),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("running", sa.String(16), nullable=True),
        sa.Column("started_by", sa.String(255), nullable=False),
        sa.Column("rate", sa.Integer, nullable=False),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("released", sa.Integer, nullable=False),
        sa.Column("next_at", millis(), nullable=False),
        sa.Column("started_at", millis(), nullable=False),
        sa.Column("ended_at", millis(), nullable=True),
        sa.Column("reason", sa.Text, nullable=True),
        sa.UniqueConstraint("running", name="uq_queue_ramps_running"),
        **TEXT,
    )
    op.create_table(
        "queue_ramp_deliveries",
        sa.Column("ramp_id", big_key(), primary_key=True, autoincrement=False),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("delivery_seq", big_key(), primary_key=True, autoincrement=False),
        **TEXT,
    )


def downgrade() -> None:
    op.drop_table("queue_ramp_deliveries")
    op.drop_table("queue_ramps")
