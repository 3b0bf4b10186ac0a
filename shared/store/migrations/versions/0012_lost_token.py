"""Which lease was taken over from a worker that seemed dead, so that it can say that it lives."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("queue_attempts", sa.Column("lost_token", sa.BigInteger, nullable=True))


def downgrade() -> None:
    op.drop_column("queue_attempts", "lost_token")
