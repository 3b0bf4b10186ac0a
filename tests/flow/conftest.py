"""Fixtures of the flow tests: processes, a source of events, and what became of them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from sqlalchemy import Connection

from shared.database import database_url, make_reader
from shared.events import EventDispatcher, QueueService
from shared.settings import load_settings
from shared.store import queries, stats
from shared.testing.servers import MariaDBDatabase, MariaDBServer
from tests.conftest import migrate
from tests.support.processes import Effects, NamekoProcess
from tests.support.waiting import wait_until

LOGS = "process-*.log"


class Source:
    """The service whose events the tests dispatch."""

    name = "source"

    dispatch = EventDispatcher()
    queue_service = QueueService()

    @dummy
    def send(self, *args: Any, **options: Any) -> str:
        return self.dispatch(*args, **options)

    @dummy
    def send_many(self, *args: Any, **options: Any) -> list[str]:
        return self.dispatch.many(*args, **options)

    @dummy
    def retry(self, message_id: str) -> int:
        return self.queue_service.retry_message(message_id)


class Flow:
    """One message log, who dispatches into it, and who handles."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.env = {
            "QUEUE_DATA_DIR": str(folder / "var"),
            "QUEUE_LEASE_SECONDS": "2",
            "QUEUE_RETRY_BASE_SECONDS": "0.05",
            "EFFECTS": str(folder / "effects"),
            **env,
        }
        self.effects = Effects(folder / "effects")
        self.settings = load_settings(self.env)
        self.processes: list[NamekoProcess] = []
        self._numbers = itertools.count()
        self._container: ServiceContainer | None = None
        self._reader = make_reader(database_url(self.settings), lambda _: None)

    def run(
        self,
        *services: str,
        arguments: Sequence[str] = (),
        before: Sequence[str] = (),
        wait: bool = True,
        ready: int = 0,
        **env: str,
    ) -> NamekoProcess:
        """Start ``nameko run`` and wait until it says that it is ready.

        :param ready: how many services there are, where a module has several.
        """
        log = self.folder / f"process-{next(self._numbers)}.log"
        process = NamekoProcess(
            *services, env={**self.env, **env}, log=log, arguments=arguments, before=before
        )
        self.processes.append(process)
        if wait:
            _wait_until_ready(process, ready or len(services))
        return process

    def run_twice(self, service: str, **env: str) -> list[NamekoProcess]:
        """Start two processes of a service at once, and wait until both are ready."""
        processes = [self.run(service, wait=False, **env) for _ in range(2)]
        for process in processes:
            _wait_until_ready(process, 1)
        return processes

    def send(self, event_type: str, payload: Any, **options: Any) -> str:
        return self._call("send", event_type, payload, **options)

    def send_many(self, events: Any, **options: Any) -> list[str]:
        return self._call("send_many", events, **options)

    def retry(self, message_id: str) -> int:
        return self._call("retry", message_id)

    def message(self, message_id: str) -> dict[str, Any]:
        with self._reader.connect() as connection:
            return queries.message(connection, message_id)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read the log."""
        with self._reader.connect() as connection:
            yield connection

    def stats(self) -> dict[str, Any]:
        with self._reader.connect() as connection:
            return stats.queue_stats(connection, "source") or {}

    def wait_for_status(self, message_id: str, status: str, timeout: float = 20) -> dict[str, Any]:
        wait_until(
            lambda: self.message(message_id)["status"] == status,
            timeout,
            lambda: f"{status}: {self.message(message_id)}",
        )
        return self.message(message_id)

    def wait_for_counts(self, timeout: float = 60, **counts: int) -> None:
        """Wait until so many messages have these statuses."""
        wait_until(
            lambda: counts.items() <= self.stats().items(),
            timeout,
            lambda: f"{counts}: {self.stats()}",
            # to count many takes the database time that the flow needs
            every=0.1,
        )

    def stop_source(self) -> None:
        """Have the service stopped that dispatches for the test; the next call starts it anew."""
        if self._container is not None:
            self._container.stop()
            self._container = None

    def close(self) -> None:
        # how a process stops is tested where it is asked to; here it is in nobody's way
        for process in self.processes:
            process.kill()
        self.stop_source()
        self._reader.dispose()

    @property
    def container(self) -> ServiceContainer:
        if self._container is None:
            self._container = ServiceContainer(Source, dict(self.env))
            self._container.start()
        return self._container

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        with entrypoint_hook(self.container, method) as call:
            return call(*args, **options)


def _wait_until_ready(process: NamekoProcess, services: int) -> None:
    wait_until(
        lambda: process.output().count("queue ready") == services,
        20,
        lambda: f"{process.arguments} to be ready: {process.output()}",
    )


@pytest.fixture
def mariadb_flow(tmp_path: Path) -> Iterator[tuple[Flow, MariaDBServer]]:
    """A flow on a server of its own, which the test may kill."""
    server = MariaDBServer()
    server.start()
    database = server.create_database()
    migrate(database.environment)
    made = Flow(tmp_path, dict(database.environment))
    yield made, server
    made.close()
    server.close()


@pytest.fixture
def flow_on(tmp_path: Path) -> Iterator[Callable[[Mapping[str, str]], Flow]]:
    """Makes a flow with further settings."""
    made: list[Flow] = []

    def make(env: Mapping[str, str]) -> Flow:
        made.append(Flow(tmp_path, dict(env)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def flow(tmp_path: Path) -> Iterator[Flow]:
    made = Flow(tmp_path, {})
    yield made
    made.close()


def _embedded(_request: pytest.FixtureRequest) -> Mapping[str, str]:
    return {}


def _redis(request: pytest.FixtureRequest) -> Mapping[str, str]:
    server = request.getfixturevalue("redis_server")
    server.empty()
    return {"QUEUE_PROVIDER": "redis", **server.environment, **_empty_log(request)}


def _rabbitmq(request: pytest.FixtureRequest) -> Mapping[str, str]:
    server = request.getfixturevalue("rabbitmq_server")
    broker = {**server.environment, "RABBITMQ_VHOST": server.new_vhost()}
    return {"QUEUE_PROVIDER": "rabbitmq", **broker, **_empty_log(request)}


def _empty_log(request: pytest.FixtureRequest) -> Mapping[str, str]:
    # as mariadb_log does, for fixtures of whole modules as well
    database: MariaDBDatabase = request.getfixturevalue("migrated_mariadb")
    request.getfixturevalue("mariadb_server").empty(database)
    return database.environment


def _shared_redis(request: pytest.FixtureRequest) -> Mapping[str, str]:
    server = request.getfixturevalue("shared_redis_server")
    server.empty()
    log = request.getfixturevalue("new_mariadb_log")()
    return {"QUEUE_PROVIDER": "redis", **server.environment, **log}


def _shared_rabbitmq(request: pytest.FixtureRequest) -> Mapping[str, str]:
    server = request.getfixturevalue("rabbitmq_server")
    broker = {**server.environment, "RABBITMQ_VHOST": server.new_vhost()}
    return {"QUEUE_PROVIDER": "rabbitmq", **broker, **request.getfixturevalue("new_mariadb_log")()}


BACKENDS = {"embedded": _embedded, "redis": _redis, "rabbitmq": _rabbitmq}
"""What the way of an event has to be the same on: SQLite alone, or a broker and MariaDB.

All on MariaDB have one database: no two of them at once.
"""


@pytest.fixture(params=list(BACKENDS))
def backend_flow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Flow]:
    """A flow on each provider."""
    made = Flow(tmp_path, dict(BACKENDS[request.param](request)))
    yield made
    made.close()


SHARED: Mapping[str, Callable[[pytest.FixtureRequest], Mapping[str, str]]] = {
    "embedded": _embedded,
    "redis": _shared_redis,
    "rabbitmq": _shared_rabbitmq,
}
"""The same for a flow that outlives a test, which no other test empties."""

_shared_folders: list[Path] = []


@pytest.fixture(scope="module")
def shared_flow_on(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Mapping[str, str]], Flow]]:
    """Makes a flow that the tests of a module share: each looks for its own events alone."""
    made: list[Flow] = []

    def make(env: Mapping[str, str]) -> Flow:
        folder = tmp_path_factory.mktemp("shared")
        _shared_folders.append(folder)
        made.append(Flow(folder, dict(env)))
        return made[-1]

    yield make
    for each in made:
        each.close()
    _shared_folders.clear()


@pytest.fixture(autouse=True)
def _show_logs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Print what the processes said, when the test failed."""
    yield
    for log in sorted(log for each in (tmp_path, *_shared_folders) for log in each.glob(LOGS)):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")
