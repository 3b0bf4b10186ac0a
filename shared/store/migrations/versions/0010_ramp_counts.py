"""What had become of the dead letters of a ramp when it ended."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("queue_ramps", sa.Column("counts", sa.Text, nullable=True))


def downgrade() -> None:
    op.drop_column("queue_ramps", "counts")
