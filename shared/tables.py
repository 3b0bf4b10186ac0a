"""The tables of the message log, below both ``store`` and ``providers``.

``queue_messages`` has exactly the columns, types and names of the system that
this one succeeds. ``queue_deliveries`` holds what it cannot. Times are UTC;
the database's clock sets them.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    Enum,
    FetchedValue,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.mysql import DATETIME, LONGTEXT, TIMESTAMP, VARCHAR
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.types import Boolean, UserDefinedType

from shared.lifecycle import DeliveryStatus, MessageStatus
from shared.types import Envelope, Priority, Subscription

metadata = MetaData()

TEXT: dict[str, Any] = {"mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
"""How MySQL and MariaDB keep text: names that differ in case are different names."""


class JsonText(UserDefinedType[str]):
    """A JSON column that takes and gives JSON text.

    A payload is encoded once, at dispatch, and decoded once, for its handler.
    """

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Name the column's type."""
        return "JSON"


@compiles(JsonText, "sqlite")
def _text_column(_element: JsonText, _compiler: Any, **_: Any) -> str:
    # to SQLite JSON is a kind of number: it would keep 5 and 1e400 as such, and give them back so
    return "TEXT"


@compiles(JsonText, "mysql", "mariadb")
def _json_column(_element: JsonText, compiler: Any, **_: Any) -> str:
    # MariaDB's JSON is this and a check, which refuses what nests deeper than 32 levels
    is_mariadb = getattr(compiler.dialect, "is_mariadb", False)
    return "LONGTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" if is_mariadb else "JSON"


def _words(enum: Any) -> Enum:
    # ENUM on MySQL and MariaDB, as the seed has it; a checked VARCHAR elsewhere.
    values = [member.value for member in enum]
    return Enum(*values, native_enum=True, create_constraint=True, name=enum.__name__.lower())


def _seconds() -> Any:
    return DateTime().with_variant(TIMESTAMP(), "mysql", "mariadb")


def millis() -> Any:
    """A time to the millisecond."""
    return DateTime().with_variant(DATETIME(fsp=3), "mysql", "mariadb")


def exact(length: int) -> Any:
    """A text that equals itself alone: the default of MySQL takes ``É`` for ``e``."""
    return String(length).with_variant(VARCHAR(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def big_key() -> Any:
    """A 64-bit number that counts by itself (SQLite does that for INTEGER alone)."""
    return BigInteger().with_variant(Integer(), "sqlite")


NOW = text("CURRENT_TIMESTAMP")

messages = Table(
    "queue_messages",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("queue_name", String(255), nullable=False),
    Column("message_type", String(255), nullable=False),
    Column("payload", JsonText(), nullable=False),
    Column("status", _words(MessageStatus), server_default="pending"),
    Column("priority", _words(Priority), server_default="normal"),
    Column("retry_count", Integer, server_default="0"),
    Column("max_retries", Integer, server_default="3"),
    Column("processed_at", _seconds(), nullable=True),
    Column("scheduled_at", _seconds(), nullable=True),
    Column("error_message", Text, nullable=True),
    Column("metadata", JsonText(), nullable=True),
    Column("created_at", _seconds(), server_default=NOW),
    # MySQL and MariaDB add ON UPDATE in the migration; elsewhere each move sets it.
    Column("updated_at", _seconds(), server_default=NOW, server_onupdate=FetchedValue()),
    CheckConstraint(
        "status <> 'completed' OR processed_at IS NOT NULL", name="completed_is_processed"
    ),
    Index("ix_queue_messages_queue_status", "queue_name", "status", "created_at"),
    Index(
        "ix_queue_messages_status",
        "status",
        "created_at",
        # each move of a message is written to each of its indices: SQLite keeps the rare ones
        sqlite_where=text("status = 'failed'"),
    ),
    **TEXT,
)

subscriptions = Table(
    "queue_subscriptions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("queue_name", String(200), nullable=False),
    Column("source", String(200), nullable=False),
    Column("message_type", String(200), nullable=False),
    Column("subscriber", String(255), nullable=False),
    Column("handler_type", String(20), nullable=False),
    Column("reliable", Boolean, nullable=False),
    Column("created_at", millis(), nullable=False),
    # The last sign of life of an instance that consumes it.
    Column("seen_at", millis(), nullable=True),
    # Set when nobody shall get events by it any more; registering takes it back.
    Column("retired_at", millis(), nullable=True),
    # While set, nothing is reserved for it.
    Column("paused_at", millis(), nullable=True),
    UniqueConstraint("queue_name", "message_type", "subscriber", name="uq_queue_subscriptions"),
    **TEXT,
)

deliveries = Table(
    "queue_deliveries",
    metadata,
    Column("seq", big_key(), primary_key=True, autoincrement=True),
    Column("message_id", String(36), ForeignKey("queue_messages.id"), nullable=False),
    Column("subscription_id", Integer, ForeignKey("queue_subscriptions.id"), nullable=False),
    Column("status", _words(DeliveryStatus), nullable=False, server_default="pending"),
    # Attempts burnt: handed back and taken over ones do not count.
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("takeovers", Integer, nullable=False, server_default="0"),
    # Set while it waits for a time: its schedule, or the next attempt.
    Column("available_at", millis(), nullable=True),
    Column("started_at", millis(), nullable=True),
    Column("processed_at", millis(), nullable=True),
    Column("worker", String(255), nullable=True),
    Column("error_type", String(255), nullable=True),
    Column("error_message", Text, nullable=True),
    # What the embedded provider queues by. ``ready`` is 1 while it may be reserved;
    # ``priority_rank`` 0 goes first, then the smaller ``seq``. With another provider it is
    # 1 while it is still to be published there, and the lease is that of who does so.
    Column("priority_rank", SmallInteger, nullable=False),
    Column("ready", Boolean, nullable=False, server_default="0"),
    # The fencing token; the log compares it before it believes an outcome.
    Column("lease_token", BigInteger, nullable=False, server_default="0"),
    Column("lease_expires_at", millis(), nullable=True),
    # While two providers are in use: the one that was given it last, as far as that is known.
    Column("provider", String(200), nullable=True),
    CheckConstraint(
        "status <> 'completed' OR processed_at IS NOT NULL", name="delivery_completed_is_processed"
    ),
    CheckConstraint("status <> 'failed' OR error_message IS NOT NULL", name="failed_has_error"),
    Index("ix_queue_deliveries_message", "message_id"),
    Index(
        "ix_queue_deliveries_status",
        "subscription_id",
        "status",
        sqlite_where=text("status <> 'completed'"),
    ),
    Index(
        "ix_queue_deliveries_ready",
        "subscription_id",
        "ready",
        "priority_rank",
        "seq",
        sqlite_where=text("ready = 1"),
    ),
    Index(
        "ix_queue_deliveries_available",
        "subscription_id",
        "available_at",
        sqlite_where=text("available_at IS NOT NULL"),
    ),
    Index(
        "ix_queue_deliveries_lease",
        "subscription_id",
        "lease_expires_at",
        sqlite_where=text("lease_expires_at IS NOT NULL"),
    ),
    **TEXT,
)

attempts = Table(
    "queue_attempts",
    metadata,
    Column("id", big_key(), primary_key=True, autoincrement=True),
    Column("delivery_seq", big_key(), ForeignKey("queue_deliveries.seq"), nullable=False),
    # 1 is the first; an operator's retry starts again from 1.
    Column("number", Integer, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("started_at", millis(), nullable=True),
    Column("ended_at", millis(), nullable=False),
    # When the next attempt was to start, where there was to be one.
    Column("retry_at", millis(), nullable=True),
    Column("worker", String(255), nullable=True),
    Column("error_type", String(255), nullable=True),
    Column("error_message", Text, nullable=True),
    Column("traceback", Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=True),
    # Of the lease of a worker that seemed dead, until it tells that it lives.
    Column("lost_token", BigInteger, nullable=True),
    Index("ix_queue_attempts_delivery", "delivery_seq"),
    **TEXT,
)
"""The history: one row for each attempt that ended otherwise than by completing."""

pauses = Table(
    "queue_pauses",
    metadata,
    Column("subscription_id", Integer, primary_key=True, autoincrement=False),
    Column("paused_by", String(255), nullable=False),
    **TEXT,
)
"""Who paused a subscription, for as long as it is paused."""

limits = Table(
    "queue_limits",
    metadata,
    Column("subscription_id", Integer, primary_key=True, autoincrement=False),
    # Deliveries that may be in hand at once, over all processes.
    Column("concurrency", Integer, nullable=True),
    # Attempts that may begin in a second, over all processes, and how many of them together.
    Column("rate", Double, nullable=True),
    Column("burst", Integer, nullable=True),
    # How many might have begun at ``refilled_at``; since then the rate adds to it.
    Column("tokens", Double, nullable=False),
    Column("refilled_at", millis(), nullable=False),
    **TEXT,
)
"""How much may be handled of a subscription: a row for those that have limits."""

permits = Table(
    "queue_permits",
    metadata,
    Column("subscription_id", Integer, primary_key=True, autoincrement=False),
    # host:pid, and what tells the pumps of one process apart
    Column("worker", exact(255), primary_key=True),
    # Deliveries that it has in hand, and how many more it may reserve.
    Column("held", Integer, nullable=False),
    Column("spare", Integer, nullable=False),
    # Renewed as leases are: those of who died run out.
    Column("expires_at", millis(), nullable=False),
    **TEXT,
)
"""What each process has of the subscriptions that have limits, and what it may take."""

failures = Table(
    "queue_failures",
    metadata,
    Column("delivery_seq", big_key(), primary_key=True, autoincrement=False),
    Column("fingerprint", String(16), nullable=False),
    Column("error_type", String(255), nullable=False),
    # Module and function of the last frame that is neither a library's nor the suite's.
    Column("place", String(255), nullable=False),
    Column("failed_at", millis(), nullable=False),
    Index("ix_queue_failures_fingerprint", "fingerprint", "failed_at", "delivery_seq"),
    **TEXT,
)
"""The dead letters that there are, each with the group that it belongs to."""

ramps = Table(
    "queue_ramps",
    metadata,
    Column("id", big_key(), primary_key=True, autoincrement=True),
    Column("fingerprint", String(16), nullable=False),
    Column("status", String(20), nullable=False),
    # The fingerprint while it runs: so no two ramps of one group do.
    Column("running", String(16), nullable=True),
    Column("started_by", String(255), nullable=False),
    # Dead letters a second.
    Column("rate", Integer, nullable=False),
    # How many the group had when it began.
    Column("total", Integer, nullable=False),
    # How many dead letters its step has, and how many of them are retried so far.
    Column("step", Integer, nullable=False),
    Column("released", Integer, nullable=False),
    # When it is to be looked after next, by whoever comes first.
    Column("next_at", millis(), nullable=False),
    Column("started_at", millis(), nullable=False),
    Column("ended_at", millis(), nullable=True),
    Column("reason", Text, nullable=True),
    # What had become of its dead letters when it ended, as JSON.
    Column("counts", Text, nullable=True),
    UniqueConstraint("running", name="uq_queue_ramps_running"),
    **TEXT,
)
"""Groups of dead letters that are retried step by step, and were."""

ramp_deliveries = Table(
    "queue_ramp_deliveries",
    metadata,
    Column("ramp_id", big_key(), primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("delivery_seq", big_key(), primary_key=True, autoincrement=False),
    **TEXT,
)
"""What each step of a ramp retried."""

causes = Table(
    "queue_causes",
    metadata,
    Column("message_id", String(36), primary_key=True),
    Column("cause_id", String(36), nullable=False),
    Index("ix_queue_causes_cause", "cause_id", "message_id"),
    **TEXT,
)
"""Which message's handler dispatched a message: a row for those that one did."""

alerts = Table(
    "queue_alerts",
    metadata,
    Column("id", big_key(), primary_key=True, autoincrement=True),
    Column("queue_name", String(200), nullable=False),
    Column("rule", String(30), nullable=False),
    Column("status", String(20), nullable=False),
    # Queue and rule until it is over: so no two episodes of one rule run.
    Column("current", exact(240), nullable=True),
    Column("value", Double(), nullable=True),
    # What it was when the value reached it.
    Column("threshold", Double(), nullable=False),
    # Looks in a row that would have it move on to its next status.
    Column("looks", Integer, nullable=False),
    Column("began_at", millis(), nullable=False),
    Column("ended_at", millis(), nullable=True),
    # The messages that told of it.
    Column("message_id", String(36), nullable=True),
    Column("end_message_id", String(36), nullable=True),
    Column("detail", JsonText(), nullable=True),
    UniqueConstraint("current", name="uq_queue_alerts_current"),
    **TEXT,
)
"""Episodes of alerts: those that go on, and those that are over."""

alert_thresholds = Table(
    "queue_alert_thresholds",
    metadata,
    Column("queue_name", exact(200), primary_key=True),
    Column("rule", exact(30), primary_key=True),
    Column("threshold", Double(), nullable=False),
    **TEXT,
)
"""Thresholds that a queue has of its own, in place of those of the settings."""

timers = Table(
    "queue_timers",
    metadata,
    Column("name", exact(30), primary_key=True),
    # Who comes first at this time or later does what is to be done.
    Column("next_at", millis(), nullable=False),
    Column("last_at", millis(), nullable=True),
    # What came of it the last time.
    Column("result", JsonText(), nullable=True),
    **TEXT,
)
"""What one process does for all, now and then: when it is due, and when it was done."""

removed = Table(
    "queue_removed",
    metadata,
    Column("subscription_id", Integer, primary_key=True, autoincrement=False),
    Column("completed", BigInteger, nullable=False, server_default="0"),
    Column("dead", BigInteger, nullable=False, server_default="0"),
    Column("discarded", BigInteger, nullable=False, server_default="0"),
    **TEXT,
)
"""How many deliveries of a subscription were removed with their messages, by how they ended."""

totals = Table(
    "queue_totals",
    metadata,
    Column("queue_name", exact(255), primary_key=True),
    # Once a day all is counted anew, in a second row that then takes the place of the first.
    Column("is_anew", Boolean, primary_key=True, autoincrement=False),
    # The messages stored before this time are counted here.
    Column("counted_to", millis(), nullable=False),
    Column("messages", BigInteger, nullable=False),
    # How many of them have no delivery.
    Column("unrouted", BigInteger, nullable=False),
    # When counting began, from the first message on.
    Column("begun_at", millis(), nullable=False),
    **TEXT,
)
"""How many messages queues have: a row for those that have many, or had some removed."""

audit_log = Table(
    "queue_audit_log",
    metadata,
    Column("id", big_key(), primary_key=True, autoincrement=True),
    Column("at", millis(), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(50), nullable=False),
    Column("target", String(255), nullable=False),
    Column("detail", JsonText(), nullable=True),
    **TEXT,
)
"""Who did what through queue_admin or queuectl."""

schedules = Table(
    "queue_schedules",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("queue_name", String(200), nullable=False),
    Column("message_type", String(200), nullable=False),
    Column("payload", JsonText(), nullable=False),
    Column("priority", String(20), nullable=False),
    Column("metadata", JsonText(), nullable=True),
    Column("cron", String(255), nullable=False),
    Column("time_zone", String(255), nullable=False),
    Column("enabled", Boolean, nullable=False),
    # The next occurrence; none while it is paused, or when there is none any more. Who
    # dispatches one moves it on in the same transaction, if it is still what it was.
    Column("next_at", millis(), nullable=True),
    # The occurrence that was dispatched last, or when it was run by hand; and as what.
    Column("last_at", millis(), nullable=True),
    Column("last_message_id", String(36), nullable=True),
    # Occurrences that were missed, and for which a later one stands.
    Column("skipped", BigInteger, nullable=False, server_default="0"),
    # Why the last one could not be dispatched, if it could not.
    Column("error", Text, nullable=True),
    Column("error_at", millis(), nullable=True),
    Column("updated_by", String(255), nullable=False),
    Column("updated_at", millis(), nullable=False),
    Index("ix_queue_schedules_next", "next_at"),
    **TEXT,
)
"""What is dispatched at the times of a cron expression."""

rpc_services = Table(
    "queue_rpc_services",
    metadata,
    Column("queue", exact(255), primary_key=True),
    Column("created_at", millis(), nullable=False),
    **TEXT,
)
"""The request queues of the services that ever had methods to call."""

rpc_messages = Table(
    "queue_rpc_messages",
    metadata,
    Column("id", big_key(), primary_key=True, autoincrement=True),
    Column("queue", exact(255), nullable=False),
    Column("body", Text().with_variant(LONGTEXT(), "mysql", "mariadb"), nullable=False),
    # Nobody waits for it any longer.
    Column("expires_at", millis(), nullable=False),
    Index("ix_queue_rpc_messages_queue", "queue", "id"),
    Index("ix_queue_rpc_messages_expires", "expires_at"),
    **TEXT,
)
"""Requests and replies that nobody took yet: no part of the log, and gone once they are taken."""

dedupe_keys = Table(
    "queue_dedupe_keys",
    metadata,
    Column("dedupe_key", exact(200), primary_key=True),
    # Or what is no queue's name: then the key is unique over all of them.
    Column("queue_name", exact(200), primary_key=True),
    Column("message_id", String(36), nullable=False),
    Column("fingerprint", String(64), nullable=True),
    Column("expires_at", millis(), nullable=False),
    Index("ix_queue_dedupe_keys_expires", "expires_at"),
    **TEXT,
)
"""By what dispatches are known again, for some time; the message may be gone sooner."""


OWN_METADATA = "nameko"
"""The key of ``queue_messages.metadata`` under which the suite keeps what it needs itself."""

MESSAGE_COLUMNS = (
    messages.c.id,
    messages.c.queue_name,
    messages.c.message_type,
    messages.c.payload,
    messages.c.priority,
    messages.c.scheduled_at,
    messages.c.metadata,
    messages.c.created_at,
)
"""What :func:`envelope_of` reads."""


def envelope_of(row: Any) -> Envelope:
    """Make the envelope again from a row with :data:`MESSAGE_COLUMNS`."""
    kept = json.loads(row.metadata or "{}")
    return Envelope(
        id=row.id,
        queue=row.queue_name,
        type=row.message_type,
        body=row.payload,
        priority=Priority(row.priority),
        max_retries=kept.get(OWN_METADATA, {}).get("max_retries"),
        scheduled_at=row.scheduled_at,
        metadata=kept,
        created_at=row.created_at,
    )


SUBSCRIPTION_COLUMNS = (
    subscriptions.c.id,
    subscriptions.c.queue_name,
    subscriptions.c.source,
    subscriptions.c.message_type,
    subscriptions.c.subscriber,
    subscriptions.c.handler_type,
    subscriptions.c.reliable,
)
"""What :func:`subscription_of` reads."""


def subscription_of(row: Any) -> Subscription:
    """Make a subscription from a row with :data:`SUBSCRIPTION_COLUMNS`."""
    return Subscription(
        queue=row.queue_name,
        source=row.source,
        event_type=row.message_type,
        subscriber=row.subscriber,
        handler_type=row.handler_type,
        reliable=bool(row.reliable),
        id=row.id,
    )
