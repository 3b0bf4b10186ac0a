"""Which messages are handled."""

import sqlalchemy as sa
from alembic import op

from shared.tables import exact, millis

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "company_inbox",
        sa.Column("message_id", exact(36), primary_key=True),
        sa.Column("subscriber", exact(255), primary_key=True),
        sa.Column(
            "handled_at", millis(), nullable=False, server_default=sa.text("CURRENT_TIMESTAMP")
        ),
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )
    op.create_index("ix_company_inbox_handled_at", "company_inbox", ["handled_at"])


def downgrade() -> None:
    op.drop_table("company_inbox")
