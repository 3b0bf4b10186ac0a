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
from collections.abc import Callable, Iterator, Mapping  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

from benchmarks.bench import Bench, OwnBench, PlainBench, percentile, report  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.testing.servers import MariaDBServer, RabbitMQServer, RedisServer  # noqa: E402
from tests.conftest import migrate  # noqa: E402

EVENTS = 5000
ROUNDS = 5


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

        def broker() -> Mapping[str, str]:
            return {**rabbitmq.environment, "RABBITMQ_VHOST": rabbitmq.new_vhost()}

        uri = load_settings(broker()).rabbitmq_uri
        subjects = {
            "plain nameko": lambda at: PlainBench(at, uri),
            "rabbitmq": lambda at: OwnBench(
                at, {"QUEUE_PROVIDER": "rabbitmq", **broker(), **log()}
            ),
            "redis": lambda at: OwnBench(
                at, {"QUEUE_PROVIDER": "redis", **redis.environment, **log()}
            ),
        }
        benches = {name: stack.enter_context(consuming(make)) for name, make in subjects.items()}
        return judge(measure(benches))


@contextmanager
def consuming(make: Callable[[Path], Bench]) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = make(Path(folder))
        try:
            bench.rate("many", 1000, 100)  # warm up
            yield bench
        finally:
            bench.close()


def measure(benches: Mapping[str, Bench]) -> dict[str, dict[str, float]]:
    """Return the figures of each. They take turns: a machine is not as fast all the time."""
    rounds = [
        {
            name: (bench.rate("many", EVENTS, 100)[1], bench.rate("singly", EVENTS)[1])
            for name, bench in benches.items()
        }
        for _ in range(ROUNDS)
    ]
    figures = {}
    for name, bench in benches.items():
        many, singly = zip(*(one[name] for one in rounds), strict=True)
        slow = bench.latencies(1000, 50)
        figures[name] = {
            "many": statistics.median(many),
            "singly": statistics.median(singly),
            "p50": percentile(slow, 50),
            "p99": percentile(slow, 99),
        }
        said = "  ".join(f"{key} {value:8.1f}" for key, value in figures[name].items())
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
