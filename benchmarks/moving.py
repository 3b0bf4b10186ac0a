"""Moves a fleet from one provider to another at full size, and accounts for every event.

    .venv/bin/python -m benchmarks.moving redis:rabbitmq embedded:redis
    .venv/bin/python -m benchmarks.moving --back redis:rabbitmq

On private servers, with the log in MariaDB. 20,000 deliveries wait, 2,000 are scheduled and 100
dead, and 200 events a second come in, while four processes are restarted one by one and
``queuectl migrate`` carries over what waits. With ``--back`` that command is killed half-way, the
fleet is restarted the other way round, and the move is taken back. What was dispatched and handled
is compared by files that the processes append to. Prints one JSON object for each move; ends with
status 1 when anything was lost or doubled, or a receipt is wrong.
"""

import shared  # noqa: F401, I001 - silences what eventlet says

import eventlet

eventlet.monkey_patch()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from nameko.containers import ServiceContainer  # noqa: E402
from nameko.testing.services import entrypoint_hook  # noqa: E402
from sqlalchemy import func, select  # noqa: E402

from benchmarks.providers import running  # noqa: E402
from shared.database import database_url, make_reader  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.tables import deliveries as d  # noqa: E402
from shared.tables import messages  # noqa: E402
from shared.tables import subscriptions as s  # noqa: E402
from shared.testing.servers import MariaDBServer, RabbitMQServer, RedisServer  # noqa: E402
from tests.support.processes import NamekoProcess  # noqa: E402
from tests.support.waiting import wait_until  # noqa: E402

MOVES = [
    f"{old}:{new}"
    for old in ("redis", "rabbitmq", "embedded")
    for new in ("redis", "rabbitmq", "embedded")
    if old != new
]
FLEET = "benchmarks.fleet"
QUEUECTL = Path(sys.executable).parent / "queuectl"

WAITING = int(os.environ.get("WAITING", "20000"))
SCHEDULED = int(os.environ.get("SCHEDULED", "2000"))
DEAD = int(os.environ.get("DEAD", "100"))
PER_SECOND = int(os.environ.get("PER_SECOND", "200"))
LATER_SECONDS = float(os.environ.get("LATER_SECONDS", "150"))
MOST_SECONDS = 900
"""How long all of it may take to be handled."""


class World:
    """One move: the fleet, the log, and what the processes wrote down."""

    def __init__(self, folder: Path, env: dict[str, str], old: str) -> None:
        self.folder = folder
        self.effects = folder / "effects"
        self.env = {
            **env,
            "QUEUE_PROVIDER": old,
            "QUEUE_DATA_DIR": str(folder),
            "EFFECTS": str(self.effects),
            "PER_TICK": str(PER_SECOND // 20),
            # what holds a worker for a second leaves most of it waiting until the move is over
            "HOLD_SECONDS": "1",
        }
        os.environ["EFFECTS"] = str(self.effects)
        self._reader = make_reader(database_url(load_settings(self.env)), eventlet.sleep)
        self._started = 0
        names = ["Crew", "Crew", "Ticker", "Ticker"]
        self.fleet = [(name, self.start(name)) for name in names]

    def start(self, name: str, **env: str) -> NamekoProcess:
        self._started += 1
        log = self.folder / f"{self._started}-{name}.log"
        process = NamekoProcess(f"{FLEET}:{name}", env={**self.env, **env}, log=log)
        wait_until(lambda: "queue ready" in process.output(), 90, process.output)
        return process

    def fill(self) -> None:
        from benchmarks.fleet import Source

        container = ServiceContainer(Source, dict(self.env))
        container.start()

        def send(event_type: str, count: int, **options: Any) -> None:
            for start in range(0, count, 500):
                some = range(start, min(start + 500, count))
                with entrypoint_hook(container, "send") as call:
                    call([(event_type, {"n": n}) for n in some], options)

        send("work.broken", DEAD, priority="urgent")
        send("work.put_off", SCHEDULED, delay=LATER_SECONDS)
        send("work.sent", WAITING)
        wait_until(lambda: self.count("failed") == DEAD, 120, "the dead letters")
        wait_until(lambda: not self.unpublished(), 180, "all to be published", every=0.5)
        container.stop()

    def restart(self, new: str, old: str) -> None:
        """Restart each process in its turn."""
        env = {"QUEUE_PROVIDER": new, "QUEUE_PROVIDER_DRAIN": old}
        for place, (name, process) in enumerate(self.fleet):
            process.terminate(60)
            self.fleet[place] = name, self.start(name, **env)

    def count(self, *statuses: str) -> int:
        with self._reader.connect() as connection:
            query = select(func.count()).where(d.c.status.in_(statuses))
            return int(connection.execute(query).scalar_one())

    def unpublished(self) -> int:
        if self.env["QUEUE_PROVIDER"] == "embedded":
            return 0
        with self._reader.connect() as connection:
            query = select(func.count()).where(d.c.ready.is_(True))
            return int(connection.execute(query).scalar_one())

    def waiting(self) -> dict[str, int]:
        """Return what waits, by subscriber; what has a time apart."""
        with self._reader.connect() as connection:
            query = (
                select(s.c.subscriber, func.count())
                .join(d, d.c.subscription_id == s.c.id)
                .where(d.c.status.in_(["pending", "retry"]))
                .group_by(s.c.subscriber)
            )
            return {row[0]: int(row[1]) for row in connection.execute(query)}

    def ctl(self, *command: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **self.env}
        called = [QUEUECTL, *command]
        return subprocess.run(called, env=env, capture_output=True, text=True, check=False)

    def half_way(self, old: str, new: str) -> None:
        """Begin to migrate, and kill that when about half is carried over."""
        env = {**os.environ, **self.env}
        process = subprocess.Popen([QUEUECTL, "migrate", "--from", old, "--to", new], env=env)
        wait_until(lambda: self.at(new) > WAITING // 2, 300, "half of it", every=0.2)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError("the move was over before it could be killed")

    def at(self, provider: str) -> int:
        """Count what waits at a provider: what was handled there has its name, too."""
        with self._reader.connect() as connection:
            its = d.c.ready.is_(True) if provider == "embedded" else d.c.provider == provider
            query = select(func.count()).where(its, d.c.status.in_(["pending", "retry"]))
            return int(connection.execute(query).scalar_one())

    def ticks_per_second(self) -> float:
        """Return how many came in each second, restarts included, by the times in the log."""
        m = messages.c
        with self._reader.connect() as connection:
            query = select(func.count(), func.min(m.created_at), func.max(m.created_at))
            count, first, last = connection.execute(
                query.where(m.message_type == "tick.sent")
            ).one()
        return round(count / (last - first).total_seconds(), 1)

    def stop(self, name: str) -> None:
        for which, process in self.fleet:
            if which == name:
                process.terminate(60)
        self.fleet = [each for each in self.fleet if each[0] != name]

    def close(self) -> None:
        for _, process in self.fleet:
            process.kill()
        self._reader.dispose()

    def account(self) -> dict[str, int]:
        """Compare what was dispatched with what was handled, by the files alone."""
        sent: set[str] = set()
        ran: Counter[tuple[str, str]] = Counter()
        for line in self.effects.read_text().splitlines():
            what, *words = line.split()
            if what == "sent":
                sent.update(words)
            else:
                ran[what, words[0]] += 1
        expected = {("tick", n) for n in sent}
        for what, count in (("work", WAITING), ("later", SCHEDULED), ("broken", DEAD)):
            expected |= {(what, str(n)) for n in range(count)}
        return {
            "ticks": len(sent),
            "handled": len(ran),
            "lost": len(expected - ran.keys()),
            "doubled": sum(count > 1 for count in ran.values()),
        }


def move(folder: Path, env: dict[str, str], old: str, new: str, is_back: bool) -> dict[str, Any]:
    world = World(folder, env, old)
    try:
        return _moved(world, old, new, is_back)
    finally:
        world.close()


def _moved(world: World, old: str, new: str, is_back: bool) -> dict[str, Any]:
    world.fill()
    before = world.waiting()
    began = time.monotonic()
    world.restart(new, old)
    restarted = time.monotonic()
    at_start = world.waiting()
    if is_back:
        world.half_way(old, new)
        old, new = new, old
        world.restart(new, old)
    started = time.monotonic()
    receipt = world.folder / "receipt.json"
    done = world.ctl("migrate", "--from", old, "--to", new, "--receipt", str(receipt))
    migrated = time.monotonic()
    at_end = world.waiting()
    Path(f"{world.effects}.mended").touch()
    retried = world.ctl("retry", "--type", "work.broken", "--limit", "1000")
    world.stop("Ticker")
    wait_until(
        lambda: not world.count("pending", "retry", "processing", "failed"),
        MOST_SECONDS,
        lambda: str(world.waiting()),
        every=1,
    )
    handled = time.monotonic()
    world.stop("Crew")
    world.env["QUEUE_PROVIDER"] = new
    audit = world.ctl("audit", "--json")
    given = json.loads(receipt.read_text()) if receipt.exists() else {}
    rows = given.get("subscriptions", [])
    return {
        "from": old,
        "to": new,
        "isBack": is_back,
        "waitingAtFirst": before,
        "waitingWhenRestarted": at_start,
        "waitingAtReceipt": at_end,
        "restartSeconds": round(restarted - began, 1),
        "migrateSeconds": round(migrated - started, 1),
        "handledSeconds": round(handled - migrated, 1),
        "migrateStatus": done.returncode,
        "said": (done.stdout.strip().splitlines() or [""])[-1] + done.stderr.strip(),
        "retryStatus": retried.returncode,
        "carried": given.get("carried"),
        "dropped": given.get("dropped"),
        "receiptIsRight": bool(rows) and given["isComplete"] and all(map(_balances, rows)),
        "auditStatus": audit.returncode,
        "ticksPerSecond": world.ticks_per_second(),
        **world.account(),
    }


def _balances(row: dict[str, Any]) -> bool:
    ended = row["completed"] + row["dead"] + row["discarded"]
    return bool(row["dispatched"] == ended + row["waiting"])


def _is_good(result: dict[str, Any]) -> bool:
    statuses = result["migrateStatus"], result["retryStatus"], result["auditStatus"]
    return (
        not any(statuses)
        and not result["lost"]
        and not result["doubled"]
        and result["receiptIsRight"]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moves", nargs="*", metavar="OLD:NEW", help="the default is all six")
    parser.add_argument("--back", action="store_true", help="take it back half-way")
    given = parser.parse_args()
    are_good = []
    with ExitStack() as stack:
        mariadb = stack.enter_context(running(MariaDBServer()))
        redis = stack.enter_context(running(RedisServer()))
        rabbitmq = stack.enter_context(running(RabbitMQServer()))
        for each in given.moves or MOVES:
            old, new = each.split(":")
            database = mariadb.create_database().environment
            redis.empty()
            env = {
                **redis.environment,
                **rabbitmq.environment,
                "RABBITMQ_VHOST": rabbitmq.new_vhost(),
                **database,
            }
            subprocess.run(
                [QUEUECTL, "db", "upgrade"],
                env={**os.environ, **database},
                check=True,
                capture_output=True,
            )
            with tempfile.TemporaryDirectory() as folder:
                result = move(Path(folder), env, old, new, given.back)
            print(json.dumps(result), flush=True)
            are_good.append(_is_good(result))
    return 0 if all(are_good) else 1


if __name__ == "__main__":
    sys.exit(main())
