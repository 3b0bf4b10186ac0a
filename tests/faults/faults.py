"""The faults: each a context manager that breaks something, and mends it at its end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import pymysql

from shared.testing.servers import MariaDBServer, RabbitMQServer, RedisServer, Server
from tests.faults.proxy import Proxy
from tests.faults.world import Member, World
from tests.support.processes import NamekoProcess, freeze
from tests.support.waiting import wait_until

Breaking = AbstractContextManager[None]

STOP_SECONDS = 20.0
"""How long a process may take to end after SIGTERM: its grace time, and the last outcomes."""

AT_ONCE = [1, 1, 2, 3, 5, 8]
"""How many faults may happen together, but for those that happen to the same."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something to break.

    :param target: what it happens to; at most one fault at a time happens to it.
    :param longest: seconds for which it lasts at most.
    :param weight: how often it is chosen, beside the others.
    """

    name: str
    target: str
    break_it: Callable[[float], Breaking]
    longest: float
    weight: float = 1.0

    @property
    def is_of_broker(self) -> bool:
        """Whether it concerns nothing but the broker, and the way to it."""
        return self.target == "broker" or self.target.endswith(" to broker")


@dataclass(frozen=True, slots=True)
class Step:
    """A fault that was chosen: when it begins within its round, and how long it lasts."""

    fault: Fault
    after: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.fault.name} {self.fault.target} +{self.after:.2f} s for {self.seconds:.2f} s"


def plan(catalogue: list[Fault], seed: int, count: int) -> list[list[Step]]:
    """Choose ``count`` faults, in rounds of those that happen together: the same for a seed."""
    rng = Random(seed)
    rounds: list[list[Step]] = []
    left = count
    while left:
        chosen: dict[str, Fault] = {}
        for _ in range(min(left, rng.choice(AT_ONCE))):
            [fault] = rng.choices(catalogue, [fault.weight for fault in catalogue])
            chosen.setdefault(fault.target, fault)
        left -= len(chosen)
        rounds.append(
            [
                Step(fault, rng.uniform(0, 0.5), rng.uniform(0.05, 1) ** 2 * fault.longest)
                for fault in chosen.values()
            ]
        )
    return rounds


def always(catalogue: list[Fault], targets: Sequence[str]) -> list[list[Step]]:
    """Return the rounds in which each of these, as far as it is there, is killed by itself."""
    kills = {fault.target: fault for fault in catalogue if fault.name == "kill"}
    return [[Step(kills[each], 0, 0.5)] for each in targets if each in kills]


def catalogue(world: World) -> list[Fault]:
    """Return what can be broken in a world."""
    found = [fault for member in world.members for fault in _of_process(member)]
    for name, server in world.servers.items():
        found += _of_server(world, name, server)
        if isinstance(server, RedisServer):
            found.append(Fault("wipe", name, lambda _, its=server: wiped(world, its), 0.1, 4))
    if not world.servers:
        found += _of_sqlite(world)
    if world.clock.is_there and world.backend in ("sqlite", "redis"):
        ahead, back = (
            (lambda s: world.clock.moved(1 + 2 * s)),
            (lambda s: world.clock.moved(-1 - s)),
        )
        found.append(Fault("clock jumps ahead", "clock", ahead, 3, 2))
        found.append(Fault("clock jumps back", "clock", back, 3, 2))
    return found


# --- processes


def _of_process(member: Member) -> Iterator[Fault]:
    process = member.process
    yield Fault("kill", member.name, lambda _: killed(process), 3, 2)
    # longer than its leases last
    yield Fault("freeze", member.name, lambda _: frozen(process.pid), 5, 2)
    if "sink" in member.name:
        yield Fault("terminate", member.name, lambda _: terminated(process), 1)
    for name, proxy in member.proxies.items():
        yield from _of_network(f"{member.name} to {name}", proxy)


@contextlib.contextmanager
def killed(process: NamekoProcess) -> Iterator[None]:
    process.kill()
    try:
        yield
    finally:
        process._start()


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    try:
        freeze(pid)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def terminated(process: NamekoProcess) -> Iterator[None]:
    status = process.terminate(STOP_SECONDS)
    assert status in (0, -signal.SIGTERM), f"SIGTERM ended with {status}: {process.output()[-500:]}"
    try:
        yield
    finally:
        process._start()


# --- the network


def _of_network(target: str, proxy: Proxy) -> Iterator[Fault]:
    yield Fault("cut", target, lambda _: _at_once(proxy.cut), 0.1)
    yield Fault("half-close", target, lambda _: _at_once(proxy.half_close), 0.1, 0.5)
    yield Fault("refuse", target, lambda _: proxy.refusing(), 3)
    yield Fault("black hole", target, lambda _: proxy.frozen(), 8, 0.5)
    yield Fault("withhold answers, then cut", target, lambda _: proxy.deaf(), 1, 2)
    yield Fault("deliver late from who is gone", target, lambda _: proxy.orphaned(), 1, 2)
    if target.endswith("database"):
        yield Fault("late COMMIT", target, lambda _: proxy.catching(b"COMMIT", "to_server"), 2, 2)
        yield Fault("silent COMMIT", target, lambda _: proxy.catching(b"COMMIT", "to_client"), 2)
    yield Fault("delay", target, lambda s: proxy.delayed(s / 20), 2, 0.5)


@contextlib.contextmanager
def _at_once(action: Callable[[], object]) -> Iterator[None]:
    action()
    yield


# --- servers


def _of_server(world: World, name: str, server: Server) -> Iterator[Fault]:
    # there are many ways to it, and each has as many faults
    yield Fault("kill", name, lambda _: crashed(world, server), 2, 5)
    if not isinstance(server, RabbitMQServer):
        # RabbitMQ's own way of stopping takes seconds, and is a kill with a goodbye
        yield Fault("stop", name, lambda _: away(server, server.stop), 2, 3)
    yield Fault("freeze", name, lambda _: frozen(_pid(server)), 8, 4)
    own: Mapping[type[Server], Callable[[str, Any], Iterator[Fault]]] = {
        MariaDBServer: _of_mariadb,
        RedisServer: _of_redis,
        RabbitMQServer: _of_rabbitmq,
    }
    yield from own[type(server)](name, server)


def crashed(world: World, server: Server) -> Breaking:
    # what RabbitMQ moves from queue to queue as its time comes, nobody confirms
    world.has_lost |= isinstance(server, RabbitMQServer)
    return away(server, server.kill)


@contextlib.contextmanager
def away(server: Server, end: Callable[[], None]) -> Iterator[None]:
    end()
    try:
        yield
    finally:
        server.start()


def _pid(server: Server) -> int:
    assert server.process is not None
    return server.process.pid


def _of_mariadb(name: str, server: MariaDBServer) -> Iterator[Fault]:
    yield Fault("kill connections", name, lambda _: _at_once(lambda: kill_connections(server)), 0.1)
    yield Fault("read only", name, lambda _: read_only(server), 3)
    yield Fault("lock tables", name, lambda _: locked(server), 3)
    yield Fault("block commits", name, lambda _: backed_up(server), 3)


def kill_connections(server: MariaDBServer) -> None:
    found = server.execute("SELECT id FROM information_schema.processlist WHERE user <> 'root'")
    for (number,) in found:
        with contextlib.suppress(pymysql.MySQLError):
            server.execute(f"KILL CONNECTION {number}")


@contextlib.contextmanager
def read_only(server: MariaDBServer) -> Iterator[None]:
    """As a replica is, which the others were failed over to."""
    server.execute("SET GLOBAL read_only = 1")
    try:
        yield
    finally:
        server.execute("SET GLOBAL read_only = 0")


@contextlib.contextmanager
def locked(server: MariaDBServer) -> Iterator[None]:
    """As an old backup does it."""
    with closing(server.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("FLUSH TABLES WITH READ LOCK")
        yield


@contextlib.contextmanager
def backed_up(server: MariaDBServer) -> Iterator[None]:
    """As a backup does it: each COMMIT waits."""
    with closing(server.connect()) as connection, connection.cursor() as cursor:
        for stage in ("START", "FLUSH", "BLOCK_DDL", "BLOCK_COMMIT"):
            cursor.execute(f"BACKUP STAGE {stage}")
        yield


def _of_redis(name: str, server: RedisServer) -> Iterator[Fault]:
    yield Fault("full memory", name, lambda _: configured(server, "maxmemory", "1", "0"), 3)
    yield Fault("forget scripts", name, lambda _: _at_once(lambda: _ask(server, "SCRIPT FLUSH")), 1)
    kill = "CLIENT KILL TYPE normal"
    yield Fault("kill connections", name, lambda _: _at_once(lambda: _ask(server, kill)), 0.1)
    yield Fault(
        "no replicas", name, lambda _: configured(server, "min-replicas-to-write", "1", "0"), 3
    )


@contextlib.contextmanager
def configured(server: RedisServer, name: str, value: str, usual: str) -> Iterator[None]:
    _ask(server, f"CONFIG SET {name} {value}")
    try:
        yield
    finally:
        _ask(server, f"CONFIG SET {name} {usual}")


def _ask(server: RedisServer, command: str) -> None:
    with server.client() as client:
        client.execute_command(*command.split())


@contextlib.contextmanager
def wiped(world: World, server: RedisServer) -> Iterator[None]:
    """It loses all that it had; an audit at the end finds out."""
    world.has_lost = True
    _ask(server, "FLUSHALL")
    yield


def _of_rabbitmq(name: str, server: RabbitMQServer) -> Iterator[Fault]:
    yield Fault("alarm", name, lambda _: alarmed(server), 3, 0.5)


@contextlib.contextmanager
def alarmed(server: RabbitMQServer) -> Iterator[None]:
    """It takes no messages, for want of memory."""
    _have_memory(server, "0.0000001")
    try:
        yield
    finally:
        _have_memory(server, "0.6")


def _have_memory(server: RabbitMQServer, share: str) -> None:
    # with many processes beside it, rabbitmqctl was seen to hang for good
    for is_last in (False, False, True):
        try:
            server.control("set_vm_memory_high_watermark", share)
        except subprocess.TimeoutExpired:
            if is_last:
                raise
        else:
            return


# --- SQLite


def _of_sqlite(world: World) -> Iterator[Fault]:
    # longer than anybody waits for the lock; services have files of their own
    for name, weight in (("queue", 2), ("source", 0.5), ("sink", 0.5)):
        path = str(world.flow.folder / "var" / f"{name}.db")
        by_writer = partial(held, path, "BEGIN IMMEDIATE")
        by_reader = partial(held, path, "BEGIN")
        yield Fault("held by a writer", name, lambda _, hold=by_writer: hold(), 8, weight)
        yield Fault("held by a reader", name, lambda _, hold=by_reader: hold(), 8, weight / 2)

    for member in world.members:
        size = lambda _, member=member: full(world, member.process)  # noqa: E731
        yield Fault("full disk", member.name, size, 3, 2)


@contextlib.contextmanager
def full(world: World, *processes: NamekoProcess) -> Iterator[None]:
    """Let no file grow beyond what the longest has by now: the database's own."""
    longest = max(file.stat().st_size for file in (world.flow.folder / "var").iterdir())
    for process in processes:
        _limit(process, longest)
    try:
        yield
    finally:
        for process in processes:
            _limit(process, resource.RLIM_INFINITY)


def _limit(process: NamekoProcess, size: int) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@contextlib.contextmanager
def held(path: str, begin: str) -> Iterator[None]:
    """As another program would that was frozen in a transaction."""
    # who has the lock may be frozen; to wait for it in SQLite would keep that from ending
    with closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as connection:
        wait_until(lambda: _has_begun(connection, begin), 60, f"{begin} on {path}")
        yield


def _has_begun(connection: sqlite3.Connection, begin: str) -> bool:
    try:
        if not connection.in_transaction:
            connection.execute(begin)
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    except sqlite3.OperationalError:
        return False
    return True
