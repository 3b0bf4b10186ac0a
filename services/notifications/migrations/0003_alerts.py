"""Which alerts are over, and which is just being told."""

import sqlalchemy as sa
from alembic import op

from shared.tables import exact, millis

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "notifications_alerts",
        sa.Column("episode", exact(80), primary_key=True),
        sa.Column("kind", exact(20), primary_key=True),
        sa.Column("is_over", sa.Boolean, nullable=False),
        sa.Column("claimed_by", sa.String(36)),
        sa.Column("claimed_until", millis()),
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )


def downgrade() -> None:
    op.drop_table("notifications_alerts")
