"""How many messages a queue had before some time, so that nobody counts them again."""

import sqlalchemy as sa
from alembic import op

from shared.tables import TEXT, exact, millis

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "queue_totals",
        sa.Column("queue_name", exact(255), primary_key=True),
        sa.Column("is_anew", sa.Boolean, primary_key=True, autoincrement=False),
        sa.Column("counted_to", millis(), nullable=False),
        sa.Column("messages", sa.BigInteger, nullable=False),
        sa.Column("unrouted", sa.BigInteger, nullable=False),
        sa.Column("begun_at", millis(), nullable=False),
        **TEXT,
    )


def downgrade() -> None:
    op.drop_table("queue_totals")
