"""The servers that a provider needs: private ones, where the settings name none."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from services.demo.processes import DemoError, undisturbed
from shared.settings import Settings, load_settings
from shared.testing.servers import (
    MariaDBServer,
    ProgramMissingError,
    RabbitMQServer,
    RedisServer,
    Server,
    ServerError,
)

QUEUECTL = Path(sys.executable).with_name("queuectl")

NAMED_BY = {
    "redis": ("REDIS_HOST", "REDIS_PORT", "REDIS_URL"),
    "rabbitmq": ("RABBITMQ_HOST", "RABBITMQ_PORT", "AMQP_URI"),
}
"""The variables that say where a server is; with any of them set, it is the user's own."""


@contextlib.contextmanager
def running(console: Console, settings: Settings) -> Iterator[None]:
    """Have private servers run within the context, and set the variables that name them.

    :raises DemoError: when one is not installed, or does not start.
    """
    with contextlib.ExitStack() as started:
        try:
            for kind in _wanted(settings):
                server = _started(started, kind)
                _name(server)
                console.print(f"Started {_description(server)}")
        except (ProgramMissingError, ServerError, OSError) as exc:
            raise DemoError(str(exc)) from exc
        yield


def _wanted(settings: Settings) -> list[type[Server]]:
    brokers: dict[str, type[Server]] = {"redis": RedisServer, "rabbitmq": RabbitMQServer}
    if settings.provider not in brokers:
        return []
    wanted = [] if _is_named(settings) else [brokers[settings.provider]]
    return wanted if settings.database else [*wanted, MariaDBServer]


def _is_named(settings: Settings) -> bool:
    """Say whether the environment or config.yml names the broker."""
    names = NAMED_BY[settings.provider]
    if any(os.environ.get(name) for name in names):
        return True
    places = [name.lower() for name in names]
    return any(getattr(settings, x) != getattr(load_settings(), x) for x in places)


def _started(started: contextlib.ExitStack, kind: type[Server]) -> Server:
    server = kind()
    started.callback(_close, server)
    server.start()
    return server


def _close(server: Server) -> None:
    with undisturbed():
        server.close()


def _name(server: Server) -> None:
    """Set what the services read, and we with them."""
    match server:
        case RedisServer():
            os.environ.update(server.environment)
        case RabbitMQServer():
            os.environ.update(server.environment, RABBITMQ_VHOST="/")
        case MariaDBServer():
            os.environ.update(server.create_database().environment)
            _make_tables()


def _description(server: Server) -> str:
    kind = type(server).__name__.removesuffix("Server")
    return f"a private {kind} on port {server.port}; what it holds goes with it"


def _make_tables() -> None:
    made = subprocess.run([QUEUECTL, "db", "upgrade"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise DemoError(f"queuectl db upgrade: {made.stderr.strip()}")
