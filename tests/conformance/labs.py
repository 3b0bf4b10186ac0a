"""The labs of the providers that come with the suite."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from shared.testing.conformance.lab import ProviderLab
from tests.support.servers import MariaDBServer, RedisCluster, RedisServer


class EmbeddedOnSQLite(ProviderLab):
    """A file, which no test can take away: there is no server."""

    def options(self) -> Mapping[str, str]:
        return {"QUEUE_PROVIDER": "embedded"}


class EmbeddedOnMariaDB(ProviderLab):
    """The message log's own MariaDB."""

    can_stop = True
    server: MariaDBServer

    @classmethod
    def from_fixtures(cls, request: pytest.FixtureRequest) -> ProviderLab:
        lab = cls(request.getfixturevalue("mariadb_log"))
        lab.server = request.getfixturevalue("mariadb_server")
        return lab

    def options(self) -> Mapping[str, str]:
        return {"QUEUE_PROVIDER": "embedded"}

    def stop_server(self) -> None:
        self.server.stop()

    def start_server(self) -> None:
        self.server.start()


class OnRedis(ProviderLab):
    """A Redis of its own beside a message log on SQLite."""

    can_stop = True
    server: RedisServer | RedisCluster
    fixture = "redis_server"

    @classmethod
    def from_fixtures(cls, request: pytest.FixtureRequest) -> ProviderLab:
        server = request.getfixturevalue(cls.fixture)
        lab = cls({**request.getfixturevalue("sqlite_log"), **server.environment})
        lab.server = server
        return lab

    def options(self) -> Mapping[str, str]:
        return {"QUEUE_PROVIDER": "redis"}

    def clear(self) -> None:
        self.server.empty()

    def stop_server(self) -> None:
        self.server.stop()

    def start_server(self) -> None:
        self.server.start()


class OnRedisCluster(OnRedis):
    """Three nodes, named by REDIS_URL."""

    fixture = "redis_cluster"
