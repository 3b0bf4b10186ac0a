"""Companies, users, sessions, and the outbox of their events."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

from shared.tables import big_key, exact, millis

revision = "0001"
down_revision = None

CHARSET = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.create_table(
        "auth_events_companies",
        sa.Column("identity", exact(320), primary_key=True),
        sa.Column("created_at", millis(), nullable=False),
        **CHARSET,
    )
    op.create_table(
        "auth_events_users",
        sa.Column("id", exact(36), primary_key=True),
        sa.Column("email", exact(254), nullable=False, unique=True),
        sa.Column("password_hash", exact(255), nullable=False),
        sa.Column("first_name", sa.String(100), nullable=False),
        sa.Column("last_name", sa.String(100), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("company_name", sa.String(100)),
        sa.Column("company_domain", sa.String(100)),
        sa.Column("created_at", millis(), nullable=False),
        **CHARSET,
    )
    op.create_table(
        "auth_events_sessions",
        sa.Column("id", exact(36), primary_key=True),
        sa.Column("user_id", exact(36), sa.ForeignKey("auth_events_users.id"), nullable=False),
        sa.Column("token_hash", exact(64), nullable=False, unique=True),
        sa.Column("created_at", millis(), nullable=False),
        sa.Column("expires_at", millis(), nullable=False),
        sa.Column("revoked_at", millis()),
        **CHARSET,
    )
    op.create_index("ix_auth_events_sessions_user_id", "auth_events_sessions", ["user_id"])
    op.create_table(
        "auth_events_outbox",
        sa.Column("seq", big_key(), primary_key=True, autoincrement=True),
        sa.Column(
            "envelope", sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=False
        ),
        sa.Column(
            "created_at", sa.DateTime, nullable=False, server_default=sa.text("CURRENT_TIMESTAMP")
        ),
        **CHARSET,
    )


def downgrade() -> None:
    for table in ("outbox", "sessions", "users", "companies"):
        op.drop_table(f"auth_events_{table}")
