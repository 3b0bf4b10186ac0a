"""Which provider was given a delivery: known while two of them are in use."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("queue_deliveries", sa.Column("provider", sa.String(200), nullable=True))


def downgrade() -> None:
    op.drop_column("queue_deliveries", "provider")
