"""Why an event of the outbox cannot be relayed, and since when it is left out."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("auth_events_outbox", sa.Column("failed_at", sa.DateTime))
    op.add_column("auth_events_outbox", sa.Column("error", sa.Text))


def downgrade() -> None:
    op.drop_column("auth_events_outbox", "error")
    op.drop_column("auth_events_outbox", "failed_at")
