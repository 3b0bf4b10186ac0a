"""By what a dispatch is known again, so that it is stored once."""

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, exact, millis

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "queue_dedupe_keys",
        sa.Column("dedupe_key", exact(200), primary_key=True),
        sa.Column("queue_name", exact(200), primary_key=True),
        sa.Column("message_id", sa.String(36), nullable=False),
        sa.Column("fingerprint", sa.String(64)),
        sa.Column("expires_at", millis(), nullable=False),
        **TEXT,
    )
    op.create_index("ix_queue_dedupe_keys_expires", "queue_dedupe_keys", ["expires_at"])


def downgrade() -> None:
    op.drop_table("queue_dedupe_keys")
