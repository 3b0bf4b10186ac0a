"""Operations: what caused a message, groups of dead letters, and who paused a subscription."""

import hashlib

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, big_key, millis

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "queue_causes",
        sa.Column("message_id", sa.String(36), primary_key=True),
        sa.Column("cause_id", sa.String(36), nullable=False),
        **TEXT,
    )
    op.create_index("ix_queue_causes_cause", "queue_causes", ["cause_id", "message_id"])
    op.create_table(
        "queue_failures",
        sa.Column("delivery_seq", big_key(), primary_key=True, autoincrement=False),
        sa.Column("fingerprint", sa.String(16), nullable=False),
        sa.Column("error_type", sa.String(255), nullable=False),
        sa.Column("place", sa.String(255), nullable=False),
        sa.Column("failed_at", millis(), nullable=False),
        **TEXT,
    )
    op.create_index(
        "ix_queue_failures_fingerprint",
        "queue_failures",
        ["fingerprint", "failed_at", "delivery_seq"],
    )
    op.create_table(
        "queue_pauses",
        sa.Column("subscription_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("paused_by", sa.String(255), nullable=False),
        **TEXT,
    )
    _group_what_failed_before()


def _group_what_failed_before() -> None:
    """Group the dead letters that there are by their exception: nobody noted its place."""
    connection = op.get_bind()
    found = connection.execute(
        sa.text(
            "SELECT seq, error_type, processed_at FROM queue_deliveries "
            "WHERE status = 'failed' AND processed_at IS NOT NULL"
        ).columns(processed_at=millis())
    )
    rows = [
        {
            "delivery_seq": row.seq,
            "fingerprint": hashlib.sha256(f"{row.error_type or ''}\n".encode()).hexdigest()[:16],
            "error_type": row.error_type or "",
            "place": "",
            "failed_at": row.processed_at,
        }
        for row in found
    ]
    if rows:
        op.bulk_insert(
            sa.table(
                "queue_failures",
                sa.column("delivery_seq"),
                sa.column("fingerprint"),
                sa.column("error_type"),
                sa.column("place"),
                sa.column("failed_at", millis()),
            ),
            rows,
        )


def downgrade() -> None:
    op.drop_table("queue_pauses")
    op.drop_table("queue_failures")
    op.drop_table("queue_causes")
