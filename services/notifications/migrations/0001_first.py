"""One row a mail."""

import sqlalchemy as sa
from alembic import op

from shared.tables import big_key, millis

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "notifications_mails",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("message_id", sa.String(36), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("recipient", sa.String(254), nullable=False),
        sa.Column("rfc_message_id", sa.String(400), nullable=False),
        sa.Column(
            "status",
            sa.Enum("sending", "sent", "refused", create_constraint=True, name="mail_status"),
            nullable=False,
        ),
        sa.Column("claimed_by", sa.String(36)),
        sa.Column("claimed_until", millis()),
        sa.Column(
            "created_at", millis(), nullable=False, server_default=sa.text("CURRENT_TIMESTAMP")
        ),
        sa.Column("sent_at", millis()),
        sa.Column("error", sa.Text),
        sa.UniqueConstraint("message_id", "kind", name="uq_notifications_mails"),
        sa.CheckConstraint("status <> 'sent' OR sent_at IS NOT NULL", name="sent_has_time"),
        sa.CheckConstraint("status <> 'refused' OR error IS NOT NULL", name="refused_has_error"),
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )


def downgrade() -> None:
    op.drop_table("notifications_mails")
