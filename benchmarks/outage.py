"""People sign up while the broker is down, beside the same with the broker up.

    .venv/bin/python -m benchmarks.outage

On RabbitMQ, then on Redis, each on private servers with the log in MariaDB: 500 registrations
over HTTP in 60 s with the broker up, 500 more while it was killed, and then how long it takes
until every event of them is delivered, and whether a listener heard of them in the order of the
log. Exit status 1 when something falls short of its goal.
"""

import shared  # noqa: F401, I001 - silences what eventlet says

import eventlet

eventlet.monkey_patch()

import itertools  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from pathlib import Path  # noqa: E402

import requests  # noqa: E402
from sqlalchemy import func, select  # noqa: E402

from benchmarks.bench import percentile, report  # noqa: E402
from benchmarks.providers import running  # noqa: E402
from shared.database import database_url, make_reader  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.tables import deliveries, subscriptions  # noqa: E402
from shared.testing.servers import (  # noqa: E402
    MariaDBServer,
    RabbitMQServer,
    RedisServer,
    free_port,
)
from tests.support.processes import NamekoProcess  # noqa: E402
from tests.support.waiting import wait_until  # noqa: E402

PEOPLE = 500
SECONDS = 60.0
SERVICES = (
    "services.auth_events",
    "services.company",
    "services.notifications",
    "benchmarks.apps:Listener",
)


class Outage:
    """The services of one run, and who signs up at them."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.probes = folder / "probes"
        self.address = f"127.0.0.1:{free_port()}"
        env = {
            **env,
            "PROBES": str(self.probes),
            "QUEUE_DATA_DIR": str(folder),
            "MAIL_URL": f"file:{folder / 'mail'}",
            "AUTH_EVENTS_ADDRESS": self.address,
            "COMPANY_ADDRESS": f"127.0.0.1:{free_port()}",
            "NOTIFICATIONS_ADDRESS": f"127.0.0.1:{free_port()}",
        }
        self._reader = make_reader(database_url(load_settings(env)), eventlet.sleep)
        self.processes = [
            NamekoProcess(name, env=env, log=folder / f"{n}.log") for n, name in enumerate(SERVICES)
        ]
        for each in self.processes:
            wait_until(lambda each=each: "queue ready" in each.output(), 60, each.output)

    def sign_up(self, name: str) -> list[float]:
        """Let people sign up at an even pace; return how many milliseconds each waited, sorted."""
        start = time.monotonic()
        pool = eventlet.GreenPool()
        waits = []

        def one(n: int) -> None:
            person = {
                "email": f"{name}-{n}@example.com",
                "password": "long enough",
                "first_name": "P",
                "last_name": str(n),
            }
            began = time.monotonic()
            answer = requests.post(f"http://{self.address}/auth/register", json=person, timeout=30)
            waits.append((time.monotonic() - began) * 1000)
            if answer.status_code != 201:
                raise SystemExit(f"{name}-{n}: {answer.status_code} {answer.text}")

        for n in range(PEOPLE):
            eventlet.sleep(max(0, start + n * SECONDS / PEOPLE - time.monotonic()))
            pool.spawn_n(one, n)
        pool.waitall()
        return sorted(waits)

    def undelivered(self) -> int:
        with self._reader.connect() as connection:
            query = select(func.count()).where(deliveries.c.status != "completed")
            return connection.execute(query).scalar_one()

    def out_of_order(self) -> int:
        """Count the events that somebody heard of after a younger one."""
        with self._reader.connect() as connection:
            query = (
                select(deliveries.c.message_id)
                .join(subscriptions, subscriptions.c.id == deliveries.c.subscription_id)
                .where(subscriptions.c.subscriber == "listener.hear")
                .order_by(deliveries.c.seq)
            )
            place = {id_: n for n, id_ in enumerate(connection.execute(query).scalars())}
        heard = [place[id_] for id_ in self.probes.read_text().split()]
        assert len(set(heard)) == len(place)
        return sum(one > next_ for one, next_ in itertools.pairwise(heard))

    def close(self) -> None:
        for each in self.processes:
            each.stop()


def main() -> int:
    met = []
    with ExitStack() as stack:
        mariadb = stack.enter_context(running(MariaDBServer()))
        for name, server in (("rabbitmq", RabbitMQServer()), ("redis", RedisServer())):
            stack.enter_context(running(server))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            database = mariadb.create_database()
            _upgrade(database.environment)
            outage = Outage(
                folder, {"QUEUE_PROVIDER": name, **server.environment, **database.environment}
            )
            try:
                met += measure(name, server, outage)
            finally:
                outage.close()
    return 0 if all(met) else 1


def _upgrade(database: dict[str, str]) -> None:
    queuectl = Path(sys.executable).parent / "queuectl"
    environment = {**os.environ, **database}
    subprocess.run([queuectl, "db", "upgrade"], env=environment, check=True, capture_output=True)


def measure(name: str, server: RabbitMQServer | RedisServer, outage: Outage) -> list[bool]:
    up = outage.sign_up("up")
    wait_until(lambda: outage.undelivered() == 0, 60, "all to be delivered", every=0.05)
    server.kill()
    down = outage.sign_up("down")
    waiting = outage.undelivered()
    server.start()
    began = time.monotonic()
    wait_until(lambda: outage.undelivered() == 0, 120, "all to be delivered", every=0.05)
    took = time.monotonic() - began
    for which, waits in (("up", up), ("down", down)):
        p50, p99 = percentile(waits, 50), percentile(waits, 99)
        print(f"{name}: {which}: {len(waits)} answered 201, p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    p99 = percentile(down, 99) / percentile(up, 99)
    return [
        report(f"{name}: p99 while it is down, times p99 with it up", p99, "x", 1.2,
               at_least=False),
        report(f"{name}: all of {waiting} deliveries done after its return", took, "s", 10,
               at_least=False),
        report(f"{name}: events heard of out of their order", outage.out_of_order(), "", 0,
               at_least=False),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
