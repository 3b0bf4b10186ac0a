"""How fast redis and rabbitmq are, beside plain nameko on the same RabbitMQ.

    .venv/bin/python -m benchmarks.providers

One dispatching and one consuming process, on private servers. Ours store every event in
MariaDB before ``dispatch`` returns, publish it with confirms, and store its outcome before
it is acknowledged; a rate counts from the first dispatch to the last stored outcome. Plain
nameko publishes with confirms, and its rate counts to the last event handled. Exit status 1
when something falls short of its goal.
"""

import eventlet

eventlet.monkey_patch()

import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.bench import Bench, OwnBench, PlainBench, percentile, report  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.testing.servers import MariaDBServer, RabbitMQServer, RedisServer  # noqa: E402
from tests.conftest import migrate  # noqa: E402

EVENTS = 5000
ROUNDS = 3


@contextmanager
def running(server: object) -> Iterator[object]:
    try:
        server.start()
        yield server
    finally:
        server.close()


def main() -> int:
    with ExitStack() as stack:
        mariadb, redis, rabbitmq = (
            stack.enter_context(running(server()))
            for server in (MariaDBServer, RedisServer, RabbitMQServer)
        )

        def log() -> Mapping[str, str]:
            database = mariadb.create_database()
            migrate(database.environment)
            return database.environment

        uri = load_settings(rabbitmq.environment).rabbitmq_uri
        subjects = {
            "plain nameko": lambda at: PlainBench(at, uri),
            "rabbitmq": lambda at: OwnBench(
                at, {"QUEUE_PROVIDER": "rabbitmq", **rabbitmq.environment, **log()}
            ),
            "redis": lambda at: OwnBench(
                at, {"QUEUE_PROVIDER": "redis", **redis.environment, **log()}
            ),
        }
        return judge({name: measure(name, make) for name, make in subjects.items()})


def measure(name: str, make: object) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        bench: Bench = make(Path(folder))
        try:
            bench.rate("many", 1000, 100)  # warm up
            many = statistics.median(bench.rate("many", EVENTS, 100)[1] for _ in range(ROUNDS))
            singly = statistics.median(bench.rate("singly", EVENTS)[1] for _ in range(ROUNDS))
            slow = bench.latencies(1000, 50)
        finally:
            bench.close()
    figures = {"many": many, "singly": singly, "p50": slow[len(slow) // 2]}
    figures["p99"] = percentile(slow, 99)
    said = "  ".join(f"{key} {value:8.1f}" for key, value in figures.items())
    print(f"{name:14} {said}", flush=True)
    return figures


def judge(figures: Mapping[str, Mapping[str, float]]) -> int:
    plain = figures["plain nameko"]
    met = []
    for name in ("rabbitmq", "redis"):
        ours = figures[name]
        met += [
            report(f"{name}: dispatch.many, times plain nameko", ours["many"] / plain["many"],
                   "x", 2, at_least=True),
            report(f"{name}: single dispatches, times plain nameko",
                   ours["singly"] / plain["singly"], "x", 1, at_least=True),
            report(f"{name}: dispatch to handler at 50/s, p99", ours["p99"], "ms", 10,
                   at_least=False),
        ]  # fmt: skip
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
