"""What faults happen to: servers, and processes that dispatch and handle, with proxies between."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import eventlet
from sqlalchemy import Engine, MetaData

from shared.database import database_url, make_engine
from shared.testing.servers import MariaDBServer, RabbitMQServer, RedisServer, Server
from tests.conftest import migrate
from tests.faults.apps import sink, source
from tests.faults.clock import Clock
from tests.faults.proxy import Proxy
from tests.flow.conftest import Flow
from tests.support.processes import NamekoProcess
from tests.support.waiting import wait_until

SOURCE = "tests.faults.apps.source"
SINK = "tests.faults.apps.sink"

OWN_TABLES: Mapping[str, MetaData] = {
    "source": source.Base.metadata,
    "sink": sink.Base.metadata,
}

SETTINGS = {
    "QUEUE_LEASE_SECONDS": "2",
    "QUEUE_GRACE_SECONDS": "4",
    "QUEUE_RETRY_BASE_SECONDS": "0.05",
}


class Member:
    """One process, and its own way to each server."""

    def __init__(self, name: str, process: NamekoProcess, proxies: Mapping[str, Proxy]) -> None:
        self.name = name
        self.process = process
        self.proxies = proxies


class World:
    """A message log on one of the backends, its servers, and who uses them.

    :param backend: one of :data:`BACKENDS`.
    """

    def __init__(self, folder: Path, backend: str, **env: str) -> None:
        self.folder = folder
        self.backend = backend
        self.clock = Clock(folder)
        self.servers: dict[str, Server] = {}
        self.members: list[Member] = []
        self.has_lost = False
        """Whether the provider lost what it had, so that an audit has to find it."""
        self._read = self._handled = 0
        self._env = {**SETTINGS, **env}
        for name, ports in BACKENDS[backend].items():
            self._add_server(name, ports)
        self.stop_file = folder / "stop"
        self.record = folder / "record"
        self.flow = Flow(
            folder, {**self._env, "RECORD": str(self.record), "STOP": str(self.stop_file)}
        )

    @property
    def sources(self) -> list[Member]:
        return [member for member in self.members if "source" in member.name]

    @property
    def sinks(self) -> list[Member]:
        return [member for member in self.members if "sink" in member.name]

    def start(self, sources: int = 2, sinks: int = 2) -> None:
        """Start the processes; return once the handlers are there, and dispatching began."""
        for service, its in OWN_TABLES.items():
            with self.own_engine(service) as engine:
                its.create_all(engine)
        for number in range(sinks):
            self._join(f"sink-{number}", SINK)
        wait_until(self._are_subscribed, 60, self.state)
        for number in range(sources):
            self._join(f"source-{number}", SOURCE)
        wait_until(self.flow.effects.path.exists, 60, self.state)

    def handled(self) -> int:
        """Return how many lines the handlers wrote."""
        with self.flow.effects.path.open("rb") as effects:
            effects.seek(self._read)
            new = effects.read()
        self._read += len(new)
        self._handled += new.count(b"\n")
        return self._handled

    @contextlib.contextmanager
    def own_engine(self, service: str) -> Iterator[Engine]:
        """Connect to a service's own database."""
        engine = make_engine(database_url(self.flow.settings, service), eventlet.sleep)
        try:
            yield engine
        finally:
            engine.dispose()

    def _are_subscribed(self) -> bool:
        return all("queue ready" in member.process.output() for member in self.sinks)

    def state(self) -> str:
        """Say what is up, and what the processes said last."""
        servers = {
            name: (server.answers(), server._last_words()[-500:])
            for name, server in self.servers.items()
        }
        words = {member.name: member.process.output()[-300:] for member in self.members}
        return f"servers that answer: {servers}; {words}"

    def close(self) -> None:
        self.flow.close()
        for member in self.members:
            for proxy in member.proxies.values():
                proxy.close()
        for server in self.servers.values():
            server.close()

    def _add_server(self, name: str, make: Callable[[], Server]) -> None:
        server = make()
        self.servers[name] = server
        # MariaDB was seen to crash with it, and Erlang follows no clock that jumps
        if isinstance(server, RedisServer):
            variables = {**os.environ, **self.clock.environment}
            server._variables = lambda: variables  # type: ignore[method-assign]
        server.start()
        if isinstance(server, MariaDBServer):
            database = server.create_database()
            self._env |= database.environment
            migrate({**database.environment, "QUEUE_DATA_DIR": str(self.folder / "var")})
        else:
            environment: Mapping[str, str] = server.environment  # type: ignore[attr-defined]
            self._env |= {"QUEUE_PROVIDER": self.backend, **environment}

    def _join(self, name: str, service: str) -> None:
        proxies = {server: Proxy(its.port) for server, its in self.servers.items()}
        ports = {PORTS[type(self.servers[x])]: str(proxy.port) for x, proxy in proxies.items()}
        # where there is no server the clock of the host decides
        clock = {} if self.servers else self.clock.environment
        config = ("--config", "config.yml")  # what nameko itself is to know
        process = self.flow.run(service, wait=False, arguments=config, **ports, **clock)
        self.members.append(Member(name, process, proxies))


PORTS: Mapping[type[Server], str] = {
    MariaDBServer: "DB_PORT",
    RedisServer: "REDIS_PORT",
    RabbitMQServer: "RABBITMQ_PORT",
}
"""The settings that say where a server is."""

Servers = Mapping[str, Callable[[], Any]]


def _redis() -> RedisServer:
    # each write is on the disk before it is answered: else a kill loses what was answered
    return RedisServer("--appendfsync", "always")


BACKENDS: Mapping[str, Servers] = {
    "sqlite": {},
    "mariadb": {"database": MariaDBServer},
    "redis": {"database": MariaDBServer, "broker": _redis},
    "rabbitmq": {"database": MariaDBServer, "broker": RabbitMQServer},
}
"""The servers of each: embedded on SQLite and on MariaDB, and the brokers beside MariaDB."""
