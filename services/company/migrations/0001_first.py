"""Companies, users, sessions, activity."""

import sqlalchemy as sa
from alembic import op

from shared.tables import big_key, exact, millis

revision = "0001"
down_revision = None

CHARSET = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"}


def upgrade() -> None:
    op.create_table(
        "company_companies",
        sa.Column("id", big_key(), primary_key=True, autoincrement=True),
        sa.Column("identity", exact(320), nullable=False, unique=True),
        sa.Column("name", sa.String(100)),
        sa.Column("domain", exact(320)),
        sa.Column("named_at", millis()),
        sa.Column("named_by", exact(36)),
        **CHARSET,
    )
    op.create_index("ix_company_companies_domain", "company_companies", ["domain"])
    op.create_table(
        "company_users",
        sa.Column("user_id", exact(100), primary_key=True),
        sa.Column("email", sa.String(254)),
        sa.Column("email_at", millis()),
        sa.Column("email_by", exact(36)),
        sa.Column("first_name", sa.String(100)),
        sa.Column("last_name", sa.String(100)),
        sa.Column("role", sa.String(100)),
        sa.Column("company_id", big_key(), sa.ForeignKey("company_companies.id")),
        sa.Column("registered_at", millis()),
        sa.Column("registered_by", exact(36)),
        sa.Column("last_login_at", millis()),
        **CHARSET,
    )
    op.create_index("ix_company_users_company_id", "company_users", ["company_id"])
    op.create_table(
        "company_sessions",
        sa.Column("user_id", exact(100), sa.ForeignKey("company_users.user_id"), primary_key=True),
        sa.Column("session_id", exact(100), primary_key=True),
        sa.Column("opened_at", millis()),
        sa.Column("opened_by", exact(36)),
        sa.Column("closed_at", millis()),
        sa.Column("ip_address", sa.String(45)),
        sa.Column("user_agent", sa.String(512)),
        **CHARSET,
    )
    op.create_index("ix_company_sessions_closed", "company_sessions", ["user_id", "closed_at"])
    op.create_index("ix_company_sessions_opened", "company_sessions", ["user_id", "opened_at"])
    op.create_table(
        "company_activity",
        sa.Column("message_id", exact(36), primary_key=True),
        sa.Column("user_id", exact(100), sa.ForeignKey("company_users.user_id"), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("occurred_at", millis(), nullable=False),
        sa.Column("session_id", exact(100)),
        sa.Column("ip_address", sa.String(45)),
        sa.Column("user_agent", sa.String(512)),
        **CHARSET,
    )
    op.create_index(
        "ix_company_activity_user", "company_activity", ["user_id", "occurred_at", "message_id"]
    )


def downgrade() -> None:
    for table in ("activity", "sessions", "users", "companies"):
        op.drop_table(f"company_{table}")
