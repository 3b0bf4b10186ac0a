"""The labs of the providers that come with the suite."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest

from shared.providers.rabbitmq.layout import DELAY_LEVELS, beside, queue_name
from shared.testing.conformance.lab import ProviderLab, Worker
from shared.testing.servers import (
    START_SECONDS,
    MariaDBServer,
    RabbitMQServer,
    RedisCluster,
    RedisServer,
)
from tests.support.waiting import wait_until


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


class OnRabbitMQ(ProviderLab):
    """A RabbitMQ of its own beside a message log on SQLite."""

    can_stop = True
    server: RabbitMQServer

    @classmethod
    def from_fixtures(cls, request: pytest.FixtureRequest) -> ProviderLab:
        server = request.getfixturevalue("rabbitmq_server")
        lab = cls({**request.getfixturevalue("sqlite_log"), **server.environment})
        lab.server = server
        return lab

    def options(self) -> Mapping[str, str]:
        return {"QUEUE_PROVIDER": "rabbitmq"}

    def clear(self) -> None:
        names = [queue_name(each) for each in self.subscriptions()]
        ends = ("dead", "paused")
        self.server.delete_queues(
            *names,
            *[beside(name, end) for name in names for end in ends],
            *[f"nameko.{kind}delay.{n}" for kind in ("", "quorum-") for n in range(DELAY_LEVELS)],
        )

    def lose_leases(self, worker: Worker) -> None:
        worker.provider._inlet.connection.sock.shutdown(socket.SHUT_RDWR)

    def stop_server(self) -> None:
        self.server.stop()

    def start_server(self) -> None:
        self.server.start()


class OnRabbitMQQuorum(OnRabbitMQ):
    """The same, with quorum queues."""

    released_is_first = False

    def options(self) -> Mapping[str, str]:
        return {**super().options(), "RABBITMQ_QUEUE_TYPE": "quorum"}

    def stop_server(self) -> None:
        self.server.shut_down()

    def start_server(self) -> None:
        super().start_server()
        names = [queue_name(each) for each in self.subscriptions()]
        # its queues begin to serve after the server does
        wait_until(lambda: self.server.serves(*names), START_SECONDS, "the queues to serve")
