"""How fast the default is: one dispatching and one consuming process on one SQLite file.

    .venv/bin/python -m benchmarks.embedded

Every event is stored before ``dispatch`` returns, delivered to a handler in the other
process, and its outcome stored; a rate counts from the first dispatch to the last stored
outcome. Exit status 1 when something falls short of its goal.
"""

import eventlet

eventlet.monkey_patch()

import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from nameko.containers import ServiceContainer  # noqa: E402
from nameko.testing.services import entrypoint_hook  # noqa: E402
from sqlalchemy import func, select  # noqa: E402

from benchmarks.apps import Producer  # noqa: E402
from shared.database import database_url, make_reader  # noqa: E402
from shared.settings import load_settings  # noqa: E402
from shared.tables import deliveries  # noqa: E402

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 120


class Bench:
    def __init__(self, folder: Path) -> None:
        self.config = {"QUEUE_DATA_DIR": str(folder), "QUEUE_PROVIDER": "embedded"}
        self.probes = folder / "probes"
        self.producer = ServiceContainer(Producer, self.config)
        self.producer.start()
        self.reader = make_reader(database_url(load_settings(self.config)), eventlet.sleep)
        environment = {**os.environ, **self.config, "PROBES": str(self.probes)}
        self.consumer = subprocess.Popen(
            [Path(sys.executable).parent / "nameko", "run", "benchmarks.apps:Consumer"],
            cwd=ROOT,
            env=environment | {"PYTHONWARNINGS": "ignore"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self.wait_for_consumer()

    def wait_for_consumer(self) -> None:
        """Dispatch until something arrives: the consumer has subscribed by then."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.completed() == 0 and time.monotonic() < deadline:
            self.call("singly", 1)
            time.sleep(0.1)

    def call(self, method: str, *args: float) -> None:
        with entrypoint_hook(self.producer, method, timeout=DEADLINE_SECONDS) as call:
            call(*args)

    def completed(self) -> int:
        with self.reader.connect() as connection:
            query = select(func.count()).where(deliveries.c.status == "completed")
            return connection.execute(query).scalar_one()

    def rate(self, method: str, count: int, *args: float) -> tuple[float, float]:
        """Return events a second, dispatched and end to end."""
        before = self.completed()
        start = time.monotonic()
        self.call(method, count, *args)
        dispatched = time.monotonic() - start
        while self.completed() < before + count:
            if time.monotonic() > start + DEADLINE_SECONDS:
                raise SystemExit(f"{method}: only {self.completed() - before} of {count}")
            time.sleep(0.02)
        return count / dispatched, count / (time.monotonic() - start)

    def latencies(self, count: int, per_second: float) -> list[float]:
        """Return the sorted milliseconds from dispatch to handler."""
        self.call("steadily", count, 1 / per_second)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(self.lines()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        found = sorted(json.loads(line) * 1000 for line in self.lines())
        self.probes.unlink()
        return found

    def lines(self) -> list[str]:
        return self.probes.read_text().splitlines() if self.probes.exists() else []

    def idle(self, seconds: float) -> float:
        """Return the share of one core, in percent, that the consumer takes with no work."""
        before = self.processor_seconds()
        time.sleep(seconds)
        return (self.processor_seconds() - before) / seconds * 100

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.consumer.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_megabytes(self) -> float:
        status = Path(f"/proc/{self.consumer.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024

    def close(self) -> None:
        self.consumer.terminate()
        self.consumer.wait(15)
        self.producer.stop()


def percentile(values: list[float], percent: float) -> float:
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def report(name: str, value: float, unit: str, goal: float, *, at_least: bool) -> bool:
    is_met = value >= goal if at_least else value <= goal
    bound = "at least" if at_least else "at most"
    verdict = "" if is_met else "   FALLS SHORT"
    print(f"{name:44} {value:9.1f} {unit:4} ({bound} {goal:g}){verdict}", flush=True)
    return is_met


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        try:
            return measure(bench)
        finally:
            bench.close()


def measure(bench: Bench) -> int:
    bench.rate("many", 2000, 100)  # warm up
    met = []
    sent, whole = bench.rate("many", 10_000, 100)
    print(f"{'dispatch.many of 100, dispatching alone':44} {sent:9.1f} /s")
    met.append(report("dispatch.many of 100, end to end", whole, "/s", 2000, at_least=True))
    sent, whole = bench.rate("singly", 4000)
    print(f"{'single dispatches, dispatching alone':44} {sent:9.1f} /s")
    met.append(report("single dispatches, end to end", whole, "/s", 800, at_least=True))
    sent, whole = bench.rate("at_once", 10_000, 10)
    print(f"{'single dispatches of ten workers, dispatching':44} {sent:9.1f} /s")
    met.append(report("single dispatches of ten workers, end to end", whole, "/s", 800,
                      at_least=True))  # fmt: skip
    slow = bench.latencies(1000, 50)
    met.append(report("dispatch to handler at 50/s, median", statistics.median(slow), "ms", 5,
                      at_least=False))  # fmt: skip
    met.append(report("dispatch to handler at 50/s, p99", percentile(slow, 99), "ms", 20,
                      at_least=False))  # fmt: skip
    met.append(report("idle consumer, share of a core", bench.idle(5), "%", 1, at_least=False))
    met.append(report("peak memory of the consumer", bench.memory_megabytes(), "MB", 100,
                      at_least=False))  # fmt: skip
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
