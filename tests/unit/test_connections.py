"""Who opens connections to a database closes them, and leaves that to no collector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from click.testing import CliRunner
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook
from sqlalchemy import event
from sqlalchemy.pool import Pool

from shared.cli import main
from shared.events import MessageLog
from shared.testing.servers import free_port


@pytest.fixture
def left_open() -> Iterator[Callable[[], list[Any]]]:
    """Says which connections were made since, by whatever engine, and not closed."""
    made: list[Any] = []

    def connected(connection: Any, _record: Any) -> None:
        made.append(connection)

    def closed(connection: Any, _record: Any) -> None:
        if connection in made:
            made.remove(connection)

    event.listen(Pool, "connect", connected)
    event.listen(Pool, "close", closed)
    yield lambda: list(made)
    event.remove(Pool, "connect", connected)
    event.remove(Pool, "close", closed)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("alive my_audit", "nobody consumes"),
        ("db upgrade", "queue: up to date"),
        ("rabbitmq upgrade-queues", "127.0.0.1"),
    ],
)
def test_a_command_closes_its_own(
    log_settings: Mapping[str, str], left_open: Callable[[], list[Any]], command: str, said: str
) -> None:
    # of RabbitMQ the log is asked first, and nobody listens there
    env = {**log_settings, "RABBITMQ_PORT": str(free_port())}

    done = CliRunner().invoke(main, command.split(), env=env)

    assert said in done.output
    assert left_open() == []


class Reading:
    name = "reading"

    log = MessageLog()

    @dummy
    def stats(self) -> object:
        return self.log.queue_stats("orders")


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_service_that_reads_the_log_closes_its_own(
    log_settings: Mapping[str, str], left_open: Callable[[], list[Any]], end: str
) -> None:
    container = ServiceContainer(Reading, dict(log_settings))
    container.start()
    with entrypoint_hook(container, "stats") as stats:
        stats()
    assert left_open() != []

    getattr(container, end)()

    assert left_open() == []
