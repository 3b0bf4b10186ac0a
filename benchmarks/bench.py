"""What the benchmarks have in common: a producer, a consumer's process, and their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import eventlet
from nameko.containers import ServiceContainer
from nameko.testing.services import entrypoint_hook
from sqlalchemy import Select, func, select

from benchmarks.apps import PlainProducer, Producer
from shared.database import database_url, make_reader
from shared.settings import load_settings
from shared.tables import deliveries

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 120


class Bench(ABC):
    """A producer in this process, and a consumer in another."""

    def __init__(
        self, folder: Path, producer: type, consumer: str, config: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self.config = dict(config)
        self.probes = folder / "probes"
        self.producer = ServiceContainer(producer, self.config)
        self.producer.start()
        self.consumer = self._start_consumer(consumer)
        self._wait_for_consumer()

    def _start_consumer(self, name: str) -> subprocess.Popen[bytes]:
        config = self.folder / "config.json"  # JSON is YAML
        config.write_text(json.dumps(self.config))
        nameko = Path(sys.executable).parent / "nameko"
        environment = {**os.environ, "PROBES": str(self.probes), "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(
            [nameko, "run", "--config", config, f"benchmarks.apps:{name}"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    @abstractmethod
    def done(self) -> int:
        """Return how many events are done with, of those that are measured."""

    def is_done(self, count: int) -> bool:
        """Say whether so many are: asked again and again, so it must cost next to nothing."""
        return self.done() >= count

    def _wait_for_consumer(self) -> None:
        """Dispatch until something arrives: the consumer has subscribed by then."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.done() == 0:
            if time.monotonic() > deadline:
                raise SystemExit("the consumer does not consume")
            self.call("singly", 1)
            eventlet.sleep(0.2)
        eventlet.sleep(1)

    def call(self, method: str, *args: float) -> None:
        with entrypoint_hook(self.producer, method, timeout=DEADLINE_SECONDS) as call:
            call(*args)

    def rate(self, method: str, count: int, *args: float) -> tuple[float, float]:
        """Return events a second, dispatched and end to end."""
        before = self.done()
        start = time.monotonic()
        self.call(method, count, *args)
        dispatched = time.monotonic() - start
        while not self.is_done(before + count):
            if time.monotonic() > start + DEADLINE_SECONDS:
                raise SystemExit(f"{method}: only {self.done() - before} of {count}")
            eventlet.sleep(0.02)
        return count / dispatched, count / (time.monotonic() - start)

    def latencies(self, count: int, per_second: float) -> list[float]:
        """Return the sorted milliseconds from dispatch to handler."""
        self.call("steadily", count, 1 / per_second)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(self._lines()) < count and time.monotonic() < deadline:
            eventlet.sleep(0.05)
        found = sorted(json.loads(line) * 1000 for line in self._lines())
        self.probes.unlink()
        return found

    def _lines(self) -> list[str]:
        return self.probes.read_text().splitlines() if self.probes.exists() else []

    def idle(self, seconds: float) -> float:
        """Return the share of one core, in percent, that the consumer takes with no work."""
        before = self._processor_seconds()
        time.sleep(seconds)
        return (self._processor_seconds() - before) / seconds * 100

    def _processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.consumer.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_megabytes(self) -> float:
        status = Path(f"/proc/{self.consumer.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024

    def close(self) -> None:
        self.consumer.terminate()
        try:
            self.consumer.wait(15)
        except subprocess.TimeoutExpired:
            self.consumer.kill()
        self.producer.stop()


class OwnBench(Bench):
    """The suite, by the settings given; done is an event whose outcome is stored."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        config = {"QUEUE_DATA_DIR": str(folder), **settings}
        self._reader = make_reader(database_url(load_settings(config)), eventlet.sleep)
        self._last = 0
        super().__init__(folder, Producer, "Consumer", config)

    def done(self) -> int:
        return self._ask(
            select(func.count()).where(
                deliveries.c.seq > self._last, deliveries.c.status == "completed"
            )
        )

    def is_done(self, count: int) -> bool:
        # most often the newest is not: to count all each time took a tenth of the server's time
        newest = (
            select(deliveries.c.status)
            .where(deliveries.c.seq > self._last)
            .order_by(deliveries.c.seq.desc())
            .limit(1)
        )
        return self._ask(newest) == "completed" and super().is_done(count)

    def rate(self, method: str, count: int, *args: float) -> tuple[float, float]:
        # to count all again and again would take the server from what is measured
        self._last = self._ask(select(func.max(deliveries.c.seq)))
        return super().rate(method, count, *args)

    def _ask(self, query: Select[tuple[Any]]) -> Any:
        with self._reader.connect() as connection:
            return connection.execute(query).scalar_one()


class PlainBench(Bench):
    """Plain nameko; done is an event that was handled."""

    def __init__(self, folder: Path, uri: str) -> None:
        super().__init__(folder, PlainProducer, "PlainConsumer", {"AMQP_URI": uri})

    def done(self) -> int:
        # the consumer writes a byte for each event
        path = self.probes.with_name("probes.count")
        return path.stat().st_size if path.exists() else 0


def percentile(values: list[float], percent: float) -> float:
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def report(name: str, value: float, unit: str, goal: float, *, at_least: bool) -> bool:
    is_met = value >= goal if at_least else value <= goal
    bound = "at least" if at_least else "at most"
    verdict = "" if is_met else "   FALLS SHORT"
    print(f"{name:48} {value:9.1f} {unit:4} ({bound} {goal:g}){verdict}", flush=True)
    return is_met
