"""How fast queue_admin answers on a large log, on SQLite and on MariaDB.

    .venv/bin/python -m benchmarks.admin [sqlite|mariadb] [MESSAGES]

It fills a log of its own with 1,000,000 messages, of which 50,000 failed, starts queue_admin,
and asks over HTTP; each figure is the median of ten answers. It then prints how the database
finds what each call asks for. Exit status 1 when something falls short of its goal.
"""

import eventlet

eventlet.monkey_patch()

import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from datetime import UTC, datetime, timedelta  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import requests  # noqa: E402
from sqlalchemy import Connection, Engine, event, func, insert, select, text  # noqa: E402

from benchmarks.bench import ROOT, report  # noqa: E402
from shared.database import database_url, make_engine, make_reader, utc_now  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.statements import Prepared  # noqa: E402
from shared.store import causes, consumers, failures, listing, overview, queries, stats, trail  # noqa: E402
from shared.store.listing import Filters  # noqa: E402
from shared.store.totals import STEP  # noqa: E402
from shared.store.why import Provider, why  # noqa: E402
from shared.tables import (  # noqa: E402
    attempts,
    audit_log,
    deliveries,
    messages,
    subscriptions,
    totals,
)
from shared.tables import causes as causes_table  # noqa: E402
from shared.tables import failures as failures_table  # noqa: E402
from shared.testing.servers import MariaDBServer, free_port  # noqa: E402
from tests.conftest import migrate  # noqa: E402

MESSAGES = 1_000_000
GOALS_MS = {"sqlite": 100, "mariadb": 50}
QUEUES, TYPES, GROUPS = 5, 4, 30
SECONDS = 30 * 86_400
START = datetime.now(UTC).replace(tzinfo=None, microsecond=0) - timedelta(seconds=SECONDS)
CHUNK = 5_000
COUNTED = select(func.sum(totals.c.messages))
ROUNDS = 10


def main() -> int:
    names = [each for each in sys.argv[1:] if not each.isdigit()] or list(GOALS_MS)
    count = next((int(each) for each in sys.argv[1:] if each.isdigit()), MESSAGES)
    met = [measure(name, count) for name in names]
    return 0 if all(met) else 1


def measure(name: str, count: int) -> bool:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        env = {"QUEUE_DATA_DIR": str(folder)}
        if name == "mariadb":
            server = MariaDBServer()
            stack.callback(server.close)
            server.start()
            env |= server.create_database().environment
        migrate(env)
        start = time.monotonic()
        last = fill(env, count)
        print(
            f"\n{name}: {count:,} messages, filled in {time.monotonic() - start:.0f} s", flush=True
        )
        address = stack.enter_context(queue_admin(folder, env))
        wait_until_counted(env, count)
        met = [ask(address, path, GOALS_MS[name]) for path in paths(last)]
        print_plans(env, last)
        return all(met)


def fill(env: Mapping[str, str], count: int) -> str:
    """Store messages with one delivery each; return the id of one that failed."""
    engine = make_engine(database_url(load_settings(env)), time.sleep)
    with engine.begin() as connection:
        connection.execute(insert(subscriptions), [_subscription(n) for n in range(QUEUES * TYPES)])
    for start in range(0, count, CHUNK):
        numbers = range(start, min(start + CHUNK, count))
        with engine.begin() as connection:
            connection.execute(insert(messages), [_message(n, count) for n in numbers])
            connection.execute(insert(deliveries), [_delivery(n, count) for n in numbers])
            dead = [n for n in numbers if _status(n) == "failed"]
            connection.execute(insert(failures_table), [_failure(n, count) for n in dead])
            connection.execute(insert(attempts), [_attempt(n, count) for n in dead])
            connection.execute(insert(causes_table), [_cause(n) for n in numbers if n % 10 == 9])
    with engine.begin() as connection:
        connection.execute(insert(audit_log), [_deed(n) for n in range(1000)])
        if engine.dialect.name == "sqlite":
            connection.execute(text("ANALYZE"))
    if engine.dialect.name != "sqlite":
        with engine.connect() as connection:
            connection.execute(text("ANALYZE TABLE queue_messages, queue_deliveries"))
    engine.dispose()
    return _id(count - count % 20 - 10)


def _id(n: int) -> str:
    return str(uuid.UUID(int=(1_790_000_000_000 + n) << 80 | 0x7 << 76 | 0b10 << 62 | n))


def _status(n: int) -> str:
    if n % 20 == 10:
        return "failed"
    return {1: "pending", 2: "retry", 3: "processing"}.get(n % 10_000, "completed")


def _at(n: int, count: int) -> datetime:
    return START + timedelta(seconds=n * SECONDS // count)


def _subscription(n: int) -> dict[str, Any]:
    return {
        "id": n + 1,
        "queue_name": f"queue-{n % QUEUES}",
        "source": f"queue-{n % QUEUES}",
        "message_type": f"thing.happened-{n // QUEUES}",
        "subscriber": f"service_{n}.handle",
        "handler_type": "service_pool",
        "reliable": True,
        "created_at": START,
        "seen_at": START,
    }


def _message(n: int, count: int) -> dict[str, Any]:
    status, at = _status(n), _at(n, count)
    body = {"user_id": n, "email": f"user-{n}@example.com", "note": "lorem ipsum " * 10}
    return {
        "id": _id(n),
        "queue_name": f"queue-{n % QUEUES}",
        "message_type": f"thing.happened-{n // QUEUES % TYPES}",
        "payload": json.dumps(body, separators=(",", ":")),
        "status": status,
        "priority": "normal",
        "retry_count": 0,
        "max_retries": 3,
        "processed_at": at if status in ("completed", "failed") else None,
        "error_message": "boom" if status == "failed" else None,
        "metadata": "{}",
        "created_at": at,
        "updated_at": at,
    }


def _delivery(n: int, count: int) -> dict[str, Any]:
    status, at = _status(n), _at(n, count)
    is_dead = status in ("failed", "retry")
    return {
        "seq": n + 1,
        "message_id": _id(n),
        "subscription_id": n % (QUEUES * TYPES) + 1,
        "status": status,
        "attempts": 1,
        "started_at": at,
        "processed_at": at if status in ("completed", "failed") else None,
        "worker": "host:1",
        "error_type": f"Error{n // 20 % GROUPS}" if is_dead else None,
        "error_message": "boom" if is_dead else None,
        "priority_rank": 2,
        "ready": status == "pending",
    }


def _failure(n: int, count: int) -> dict[str, Any]:
    kind, place = f"Error{n // 20 % GROUPS}", "services.thing.handle"
    return {
        "delivery_seq": n + 1,
        "fingerprint": failures.fingerprint(kind, place),
        "error_type": kind,
        "place": place,
        "failed_at": _at(n, count),
    }


def _attempt(n: int, count: int) -> dict[str, Any]:
    return {
        "delivery_seq": n + 1,
        "number": 1,
        "outcome": "failed",
        "ended_at": _at(n, count),
        "error_type": f"Error{n // 20 % GROUPS}",
        "error_message": "boom",
        "traceback": "Traceback (most recent call last): …\n" * 10,
    }


def _cause(n: int) -> dict[str, Any]:
    return {"message_id": _id(n), "cause_id": _id(n - n % 10)}


def _deed(n: int) -> dict[str, Any]:
    return {"at": START, "actor": "somebody", "action": "retry", "target": f"message {_id(n)}"}


# --- what is asked


def paths(last: str) -> Iterator[str]:
    newest = f"{START + timedelta(seconds=SECONDS - 86_400):%Y-%m-%dT%H:%M:%SZ}"
    older = f"{START + timedelta(seconds=SECONDS // 3):%Y-%m-%dT%H:%M:%SZ}"
    yield "/queue/health"
    yield "/queue/stats"
    yield "/queue/stats/queue-1"
    yield "/queue/messages"
    yield "/queue/messages?limit=100"
    yield "/queue/messages?queue=queue-1"
    yield "/queue/messages?status=failed"
    yield "/queue/messages?status=retry"
    yield "/queue/messages?queue=queue-1&status=failed"
    yield f"/queue/messages?createdTo={older}"
    yield "/queue/messages?type=thing.happened-2"
    yield "/queue/messages?subscriber=service_3.handle"
    yield "/queue/messages?exceptionType=Error7"
    yield "/queue/messages?exceptionType=nothing"
    yield f"/queue/messages?text=user-12345@&createdFrom={newest}"
    yield "/queue/messages?text=nothing-has-this"
    yield "/queue/messages?payloadPath=$.user_id&payloadValue=-1"
    yield f"/queue/messages/{last}"
    yield f"/queue/messages/{last}/why"
    yield "/queue/failures"
    yield "/queue/subscriptions"
    yield "/queue/alerts"
    yield "/queue/alerts/thresholds"
    yield "/queue/retention"
    yield "/queue/audit-log"


def ask(address: str, path: str, goal: float) -> bool:
    url, session = f"http://{address}{path}", requests.Session()
    took = []
    for _ in range(ROUNDS + 1):
        start = time.monotonic()
        answer = session.get(url, timeout=60)
        took.append((time.monotonic() - start) * 1000)
        # nobody consumes here, so it is not healthy
        assert answer.status_code == (503 if path == "/queue/health" else 200), answer.text
    name = re.sub(r"messages/[^/]+", "messages/<id>", path)
    return report(name[:70], statistics.median(took[1:]), "ms", goal, at_least=False)


def wait_until_counted(env: Mapping[str, str], count: int) -> None:
    """Wait until queue_admin has marks in all queues near the end."""
    start, deadline = time.monotonic(), time.monotonic() + 600
    engine = make_reader(database_url(load_settings(env)), time.sleep)
    with engine.connect() as connection:
        # what is left in each is less than a step, and what came in the last minute
        while (connection.execute(COUNTED).scalar() or 0) < count - 2 * QUEUES * STEP:
            if time.monotonic() > deadline:
                raise SystemExit("queue_admin does not count")
            time.sleep(0.5)
    engine.dispose()
    print(f"counted once, in {time.monotonic() - start:.0f} s", flush=True)


@contextmanager
def queue_admin(folder: Path, env: Mapping[str, str]) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [Path(sys.executable).parent / "nameko", "run", "services.queue_admin"],
        cwd=ROOT,
        env={**os.environ, **env, "QUEUE_ADMIN_ADDRESS": address, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(address)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            requests.get(f"http://{address}/queue/audit-log", timeout=5)
        except requests.ConnectionError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("queue_admin does not start")


# --- how it is found


def print_plans(env: Mapping[str, str], last: str) -> None:
    engine = make_reader(database_url(load_settings(env)), time.sleep)
    prepared = [
        (name, each)
        for module in (listing, consumers, causes)
        for name, each in vars(module).items()
        if isinstance(each, Prepared) and name not in ("_ADD", "_REMOVE")
    ]
    for name, each in prepared:
        with engine.connect() as connection:
            sql = re.sub(r"\?|%s", "1", str(each.statement.compile(dialect=engine.dialect)))
            steps = _explained(connection, sql.replace("OFFSET 1", "OFFSET 0"), ())
            print(f"\n{name}", *dict.fromkeys(steps), sep="\n    ")
    for name, call in calls(last).items():
        print(f"\n{name}")
        for step in plans(engine, call):
            print(f"    {step}")
    engine.dispose()


def calls(last: str) -> dict[str, Callable[[Connection], Any]]:
    provider = Provider("embedded", True, True)
    return {
        "messages": lambda c: listing.list_messages(c, Filters(queue="queue-1", status="failed")),
        "messages, by exception": lambda c: listing.list_messages(
            c, Filters(queue="queue-1", exception_type="Error7"), limit=1
        ),
        "one message": lambda c: queries.message(c, last),
        "causes": lambda c: causes.caused_by(c, last),
        "effects": lambda c: causes.caused(c, last),
        "why": lambda c: why(c, last, utc_now(c), provider),
        "failures": failures.groups,
        "subscriptions": lambda c: consumers.list_subscriptions(c, utc_now(c), "queue-1"),
        "health": lambda c: queries.silent_subscriptions(c, utc_now(c)),
        "stats": lambda c: stats.queue_stats(c, "queue-1"),
        "overview": lambda c: overview.overview(c, utc_now(c)),
        "audit log": lambda c: trail.entries(c, None, 50),
    }


def plans(engine: Engine, call: Callable[[Connection], Any]) -> list[str]:
    """Return what the database does for each statement of a call, each step once."""
    said: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        said.append((statement, parameters))

    with engine.connect() as connection:
        event.listen(engine, "before_cursor_execute", note)
        call(connection)
        event.remove(engine, "before_cursor_execute", note)
        steps = []
        for statement, parameters in said:
            if "queue_" in statement:
                steps += _explained(connection, statement, parameters)
    return list(dict.fromkeys(steps))


def _explained(connection: Connection, statement: str, parameters: Any) -> list[str]:
    if connection.dialect.name == "sqlite":
        rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        return [row[3] for row in rows if "queue_" in row[3]]
    rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
    return [
        f"{row.table}: {row.type} by {row.key or 'nothing'}"
        for row in rows
        if row.table and row.table.startswith("queue_")
    ]


if __name__ == "__main__":
    sys.exit(main())
