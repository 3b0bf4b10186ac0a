"""RPC over the database: who can be called, and the requests and replies on their way."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

from shared.tables import TEXT, big_key, exact, millis

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "queue_rpc_services",
        sa.Column("queue", exact(255), primary_key=True),
        sa.Column("created_at", millis(), nullable=False),
        **TEXT,
    )
    op.create_table(
        "queue_rpc_messages",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("queue", exact(255), nullable=False),
        sa.Column("body", sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=False),
        sa.Column("expires_at", millis(), nullable=False),
        **TEXT,
    )
    op.create_index("ix_queue_rpc_messages_queue", "queue_rpc_messages", ["queue", "id"])
    op.create_index("ix_queue_rpc_messages_expires", "queue_rpc_messages", ["expires_at"])


def downgrade() -> None:
    op.drop_table("queue_rpc_messages")
    op.drop_table("queue_rpc_services")
