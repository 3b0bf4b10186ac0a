"""How much of the log the way of an event looks at: no more, however much there is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.testing.servers import MariaDBServer
from tests.conftest import migrate
from tests.flow.conftest import Flow

pytestmark = pytest.mark.flow

SERVICES = ("tests.flow.apps.recorder", "tests.flow.apps.tally")
ENDED = 20_000
"""Messages of long ago."""


@pytest.fixture
def server() -> Iterator[MariaDBServer]:
    # what it takes a table to hold stays what it was when it opened that
    made = MariaDBServer("--innodb-stats-auto-recalc=0")
    made.start()
    yield made
    made.close()


@pytest.fixture(params=["embedded", "redis", "rabbitmq"])
def flow(request: pytest.FixtureRequest, server: MariaDBServer, tmp_path: Path) -> Iterator[Flow]:
    broker = {}
    if request.param == "redis":
        redis = request.getfixturevalue("redis_server")
        redis.empty()
        broker = {"QUEUE_PROVIDER": "redis", **redis.environment}
    elif request.param == "rabbitmq":
        rabbitmq = request.getfixturevalue("rabbitmq_server")
        vhost = {"RABBITMQ_VHOST": rabbitmq.new_vhost()}
        broker = {"QUEUE_PROVIDER": "rabbitmq", **rabbitmq.environment, **vhost}
    database = server.create_database()
    migrate(database.environment)
    made = Flow(tmp_path, {**broker, **database.environment})
    yield made
    made.close()


def test_what_ended_long_ago_is_not_gone_through(flow: Flow, server: MariaDBServer) -> None:
    """Given a server that opened the tables when they were nearly empty."""
    flow.run(*SERVICES).terminate()
    flow.stop_source()
    add_ended(flow, server, 1, 50)
    server.execute(
        f"USE {flow.settings.database.name}",
        "ANALYZE TABLE queue_messages, queue_deliveries",
        "FLUSH TABLES",
        "SELECT COUNT(*) FROM queue_messages",
        "SELECT COUNT(*) FROM queue_deliveries",
    )
    add_ended(flow, server, 51, ENDED)
    before = looked_at(server)

    flow.run(*SERVICES)
    for n in range(5):
        flow.send("unit.sent", {"n": n})
    flow.send_many([("unit.sent", {"n": n}) for n in range(100, 200)])
    flow.send("unit.sent", {"n": 5}, delay=0.5)
    again = flow.send("thing.happened", {"n": 6, "fail": 1})
    dead = flow.send("thing.happened", {"n": 7, "fail": 9}, max_retries=0)
    unwanted = flow.send("thing.unwanted", {})
    flow.wait_for_status(dead, "failed")
    flow.retry(dead)
    for each in (again, unwanted):
        flow.wait_for_status(each, "completed")
    for n in (*range(6), 199):
        flow.effects.wait_for(1, n=n)

    assert looked_at(server) - before < ENDED / 2


def add_ended(flow: Flow, server: MariaDBServer, first: int, last: int) -> None:
    an_id = "CONCAT('01900000-0000-7000-8000-', LPAD(HEX(seq), 12, '0'))"
    server.execute(
        f"USE {flow.settings.database.name}",
        "INSERT INTO queue_messages (id, queue_name, message_type, payload, status, priority,"
        " max_retries, processed_at, metadata, created_at, updated_at)"
        f" SELECT {an_id}, 'source', 'unit.sent', '{{}}', 'completed', 'normal',"
        f" 3, NOW(3), '{{}}', NOW(3), NOW(3) FROM seq_{first}_to_{last}",
        "INSERT INTO queue_deliveries (message_id, subscription_id, status, attempts,"
        " processed_at, priority_rank)"
        f" SELECT {an_id}, id, 'completed', 1, NOW(3), 2 FROM seq_{first}_to_{last}"
        " JOIN queue_subscriptions WHERE message_type IN ('unit.sent', 'thing.happened')",
    )


def looked_at(server: MariaDBServer) -> int:
    """Return how many rows it has read since it started, and entries of indexes."""
    found = server.execute("SHOW GLOBAL STATUS WHERE Variable_name LIKE 'Handler\\_%'")
    return sum(
        int(value)
        for name, value in found
        if name.startswith("Handler_read") or name == "Handler_icp_attempts"
    )
