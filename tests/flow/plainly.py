"""Services for plain nameko, those services moved over, and what a broker has of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import amqp

from shared.testing.servers import HOST, RabbitMQServer

APPS = Path(__file__).parent / "apps"


def as_it_is(name: str) -> ModuleType:
    """Import a module of the apps as it is."""
    return _module(f"{name}_as_it_is", (APPS / f"{name}.py").read_text())


def as_if_moved(name: str) -> ModuleType:
    """Import a module of the apps with our events in place of nameko's."""
    text = (APPS / f"{name}.py").read_text()
    assert text.count("from nameko.events import") == 1
    return _module(f"{name}_moved", text.replace("from nameko.events", "from shared.events"))


def _module(name: str, text: str) -> ModuleType:
    made = ModuleType(name)
    sys.modules[name] = made
    exec(compile(text, name, "exec"), made.__dict__)  # noqa: S102 - code of our own
    return made


_ALL = """begin
    Plain = fun ({resource, _, _, Name}) -> Name;
                (Table) when is_list(Table) -> rabbit_misc:amqp_table(Table);
                (Value) -> Value end,
    [maps:from_list([{Column, Plain(Value)} || {Column, Value} <- Its])
        || Its <- %s:info_all(<<"%s">>, [%s])]
end"""
"""What ``rabbitmqctl`` lists, which takes it a second or two."""


class Vhost:
    """A virtual host of a server, looked at from outside."""

    def __init__(self, server: RabbitMQServer) -> None:
        self.server = server
        self.name = server.new_vhost()

    @property
    def uri(self) -> str:
        user, password = quote(self.server.USER, safe=""), quote(self.server.PASSWORD, safe="")
        return f"amqp://{user}:{password}@{HOST}:{self.server.port}/{self.name}"

    @property
    def environment(self) -> Mapping[str, str]:
        return {**self.server.environment, "RABBITMQ_VHOST": self.name}

    def queues(self, *facts: str) -> dict[str, dict[str, Any]]:
        """Return the queues by their names."""
        columns = ["name", "durable", "auto_delete", "exclusive", "arguments", *facts]
        return {each["name"]: each for each in self._all("rabbit_amqqueue", *columns)}

    def exchanges(self) -> dict[str, dict[str, Any]]:
        """Return the exchanges by their names, but for RabbitMQ's own."""
        columns = ["name", "type", "durable", "auto_delete", "arguments"]
        found = {each["name"]: each for each in self._all("rabbit_exchange", *columns)}
        return {name: x for name, x in found.items() if name and not name.startswith("amq.")}

    def bindings(self, queue: str) -> set[tuple[str, str]]:
        """Return what is bound to a queue: exchanges and keys, but for RabbitMQ's own."""
        columns = ["source_name", "destination_name", "routing_key"]
        return {
            (each["source_name"], each["routing_key"])
            for each in self._all("rabbit_binding", *columns)
            if each["destination_name"] == queue and each["source_name"]
        }

    def _all(self, module: str, *columns: str) -> list[dict[str, Any]]:
        found = self.server.evaluate(_ALL % (module, self.name, ", ".join(columns)))
        return list(found)

    @contextmanager
    def channel(self) -> Any:
        """Give a channel of somebody else's."""
        with self.server.connect(virtual_host=self.name) as connection:
            yield connection.channel()

    def is_consumed(self, queue: str) -> bool:
        """Say whether anybody consumes from a queue."""
        try:
            with self.channel() as channel:
                return bool(channel.queue_declare(queue, passive=True).consumer_count)
        except amqp.NotFound:
            return False

    def count(self, queue: str) -> int:
        """Return how many messages of a queue are ready."""
        with self.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)
