"""Connections to Redis: one server, the primary that sentinels name, or a cluster.

Of redis-py it uses single connections, and none of the clients: these try again behind
the caller's back what may not be done twice, and share pools between threads. Sockets are
eventlet's, as for whatever else is imported after monkey patching: in a native thread they
wait by a hub of that thread's own. Unpatched ones were measured to be no faster.
"""

from __future__ import annotations

import contextlib
import select
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from shared.errors import ProviderBlockedError, ProviderError, ProviderUnavailableError
from shared.native import poll
from shared.providers.redis.wire import Command
from shared.settings import Settings

CONNECT_SECONDS = 3.0
"""How long a server may take to take a connection: it then is on another continent."""

ANSWER_SECONDS = 5.0
"""How long a script may take: a thousand deliveries take a hundredth of it."""

_HUNG_UP = getattr(select, "POLLRDHUP", 0)
"""What Linux tells of an end of the other side; elsewhere it is what is always told."""

MOST_REDIRECTIONS = 5
"""How often a cluster may send a script on to another node, before it counts as confused."""


@cache
def driver() -> Any:
    """Return redis-py.

    :raises ProviderError: naming what to install.
    """
    try:
        module = import_module("redis")
        for name in ("connection", "crc", "exceptions"):
            import_module(f"redis.{name}")
    except ImportError as exc:
        raise ProviderError(f"redis-py is missing ({exc}): pip install 'redis>=6,<9'") from exc
    return module


def preload() -> None:
    """Import redis-py where it is not yet, on the hub.

    Two native threads that import it at the same moment wait for each other's lock, which is green.
    """
    with contextlib.suppress(ProviderError):  # who connects says it
        driver()


@contextlib.contextmanager
def translated(settings: Settings, lose: Callable[[], None]) -> Iterator[None]:
    """Turn redis-py's errors into ours; after any that ends the connection, call ``lose``."""
    exceptions = driver().exceptions
    try:
        yield
    except ProviderError:
        lose()
        raise
    except (exceptions.RedisError, OSError) as exc:
        kind, said = _meaning(exc)
        if kind is not ProviderBlockedError:
            lose()
        raise kind(f"Redis at {Target.of(settings)}: {said}") from exc


def _meaning(exc: Exception) -> tuple[type[ProviderError], str]:
    """Return which of our errors one of redis-py's is, and what to say."""
    known = driver().exceptions
    text = str(exc)
    for kind, error, meaning in (
        (known.AuthenticationError, ProviderError, "user or password refused"),
        (known.NoPermissionError, ProviderError, "the user may not do this"),
        (known.BusyLoadingError, ProviderUnavailableError, "it still loads its data"),
        (known.OutOfMemoryError, ProviderBlockedError, "it is out of memory (maxmemory)"),
        (known.ReadOnlyError, ProviderError, "it is a read-only replica, not the primary"),
        (known.MasterDownError, ProviderUnavailableError, "it has lost its primary"),
        (known.ClusterDownError, ProviderUnavailableError, "the cluster is down"),
        (known.MovedError, ProviderError, "it is a node of a cluster: use redis+cluster://"),
    ):
        if isinstance(exc, kind):
            return error, f"{meaning}: {text}"
    if "compiling script" in text:
        return ProviderError, f"it has to be Redis 7 or newer, or Valkey: {text}"
    if isinstance(exc, known.ConnectionError | known.TimeoutError | OSError):
        return ProviderUnavailableError, text or type(exc).__name__
    return ProviderError, text or type(exc).__name__


@dataclass(frozen=True, slots=True)
class Target:
    """Where Redis is, by the settings.

    :param kind: ``""`` for a single server, ``sentinel`` or ``cluster``.
    :param service: the name under which sentinels know the primary.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...]
    is_tls: bool = False
    service: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Target:
        if settings.redis_url:
            return cls._of_url(settings.redis_url)
        options = {"password": settings.redis_password or None, "db": settings.redis_db}
        return cls("", ((settings.redis_host, settings.redis_port),), options=options)

    @classmethod
    def _of_url(cls, text: str) -> Target:
        url = urlsplit(text)
        scheme, _, kind = url.scheme.partition("+")
        user_info, _, hosts = url.netloc.rpartition("@")
        username, _, password = user_info.partition(":")
        port = 26379 if kind == "sentinel" else 6379
        path = url.path.strip("/").split("/")
        service = path.pop(0) if kind == "sentinel" else ""
        query = dict(parse_qsl(url.query))
        return cls(
            kind,
            tuple(_address(host, port) for host in hosts.split(",")),
            is_tls=scheme == "rediss",
            service=service,
            options={
                "username": unquote(username) or None,
                "password": unquote(password) or None,
                "db": int((path and path[0]) or 0),
                **_typed({k: v for k, v in query.items() if k.startswith("ssl_")}),
            },
            sentinel_options={
                k.removeprefix("sentinel_"): v
                for k, v in query.items()
                if k.startswith("sentinel_")
            },
        )

    def __str__(self) -> str:
        return ",".join(f"{host}:{port}" for host, port in self.hosts)

    def connect(self, host: str, port: int) -> Any:
        """Return an open connection to a server."""
        return self._connected(host, port, self.options)

    def connect_to_sentinel(self, host: str, port: int) -> Any:
        """Return an open connection to a sentinel."""
        tls = {k: v for k, v in self.options.items() if k.startswith("ssl_")}
        return self._connected(host, port, {**tls, **self.sentinel_options})

    def _connected(self, host: str, port: int, options: Mapping[str, Any]) -> Any:
        kinds = driver().connection
        connection = (kinds.SSLConnection if self.is_tls else kinds.Connection)(
            host=host,
            port=port,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            socket_keepalive=True,
            decode_responses=True,
            protocol=2,
            **options,
        )
        connection.connect()
        return connection


def _address(text: str, default_port: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(default_port)
    return host.strip("[]"), int(port)


def _typed(options: Mapping[str, str]) -> dict[str, Any]:
    """Return options of TLS as redis-py's own URLs would have them."""
    typed: dict[str, Any] = driver().connection.parse_url(f"redis://?{urlencode(options)}")
    return typed


class Server(ABC):
    """A Redis, whatever it consists of."""

    @abstractmethod
    def ask(self, commands: Sequence[Command]) -> list[Any]:
        """Send all commands, then read all answers; what Redis refuses is an answer, too."""

    @abstractmethod
    def ask_everywhere(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Do commands on every node; return all answers, errors raised."""

    @abstractmethod
    def new_connection(self) -> Any:
        """Make another connection, to listen by."""

    @abstractmethod
    def connections(self) -> Iterable[Any]:
        """Return all connections but the listeners'."""

    def is_closed(self) -> bool:
        """Say whether Redis has closed one of them."""
        return any(map(is_closed, self.connections()))

    def close(self) -> None:
        """Close them."""
        for connection in self.connections():
            connection.disconnect()


def connected(target: Target) -> Server:
    kinds = {"": Single, "sentinel": Sentinel, "cluster": Cluster}
    made: Server = kinds[target.kind](target)
    return made


class Single(Server):
    """One server."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection = self._primary()

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        _send(self._connection, [command.args for command in commands])
        return [_answer(self._connection) for _ in commands]

    def ask_everywhere(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        return _ask_strictly(self._connection, commands)

    def new_connection(self) -> Any:
        return self._target.connect(self._connection.host, self._connection.port)

    def connections(self) -> Iterable[Any]:
        return [self._connection]

    def _primary(self) -> Any:
        return self._target.connect(*self._target.hosts[0])


class Sentinel(Single):
    """The server that sentinels say is the primary."""

    def _primary(self) -> Any:
        trouble = "no sentinel knows it"
        for host, port in self._target.hosts:
            try:
                return self._primary_by(host, port)
            except (driver().exceptions.RedisError, OSError) as exc:
                trouble = str(exc)
        raise ConnectionError(f"no primary of {self._target.service}: {trouble}")

    def _primary_by(self, host: str, port: int) -> Any:
        sentinel = self._target.connect_to_sentinel(host, port)
        try:
            question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._target.service)
            [address] = _ask_strictly(sentinel, [question])
        finally:
            sentinel.disconnect()
        if address is None:
            raise ConnectionError(f"{host}:{port} does not know it")
        connection = self._target.connect(address[0], int(address[1]))
        [role] = _ask_strictly(connection, [("ROLE",)])
        if role[0] != "master":  # it stepped down, and the sentinel has not heard of it
            connection.disconnect()
            raise ConnectionError(f"{address[0]}:{address[1]} is a replica by now")
        return connection


class Cluster(Server):
    """Several servers, each with some of the hash slots."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connections: dict[tuple[str, int], Any] = {}
        self._slots: list[tuple[int, int, tuple[str, int]]] = []
        self._learn()

    def ask(self, commands: Sequence[Command]) -> list[Any]:
        nodes = [self._node_of(command.key) for command in commands]
        by_node: dict[Any, list[int]] = {}
        for index, node in enumerate(nodes):
            by_node.setdefault(node, []).append(index)
        for node, its in by_node.items():
            _send(self._to(node), [commands[index].args for index in its])
        answers: list[Any] = [None] * len(commands)
        for node, its in by_node.items():
            for index in its:
                answers[index] = _answer(self._to(node))
        return [self._followed(*each) for each in zip(commands, answers, strict=True)]

    def ask_everywhere(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        nodes = {node for _, _, node in self._slots}
        return [x for node in nodes for x in _ask_strictly(self._to(node), commands)]

    def new_connection(self) -> Any:
        # published messages reach all nodes
        connection = next(iter(self._connections.values()))
        return self._target.connect(connection.host, connection.port)

    def connections(self) -> Iterable[Any]:
        return self._connections.values()

    def _to(self, node: tuple[str, int]) -> Any:
        if node not in self._connections:
            self._connections[node] = self._target.connect(*node)
        return self._connections[node]

    def _node_of(self, key: str) -> tuple[str, int]:
        slot = driver().crc.key_slot(key.encode())
        for first, last, node in self._slots:
            if first <= slot <= last:
                return node
        raise driver().exceptions.ClusterDownError(f"no node serves slot {slot}")

    def _learn(self) -> None:
        """Ask which node has which slots: any that answers."""
        trouble: Exception | None = None
        for node in dict.fromkeys([*self._target.hosts, *self._connections]):
            try:
                [ranges] = _ask_strictly(self._to(node), [("CLUSTER", "SLOTS")])
            except (driver().exceptions.RedisError, OSError) as exc:
                trouble = exc
                continue
            # a node that does not know its own name leaves it empty
            self._slots = [(a, b, (x[0] or node[0], x[1])) for a, b, x, *_ in ranges]
            return
        assert trouble is not None  # noqa: S101 - there is a host to ask, by the settings
        raise trouble

    def _followed(self, command: Command, answer: Any) -> Any:
        """Go where a node sent us: slots move while a cluster is changed."""
        known = driver().exceptions
        for _ in range(MOST_REDIRECTIONS):
            if not isinstance(answer, known.AskError):
                break
            node = (answer.host or self._node_of(command.key)[0], int(answer.port))
            if isinstance(answer, known.MovedError):
                self._learn()
                [answer] = _asked(self._to(node), [command.args])
            else:
                _, answer = _asked(self._to(node), [("ASKING",), command.args])
        return answer


def is_closed(connection: Any) -> bool:
    """Say whether a connection is closed, also by the server, without a word to that."""
    if connection._sock is None:
        return True
    looking = poll()
    looking.register(connection._sock.fileno(), _HUNG_UP)
    return bool(looking.poll(0))


def _send(connection: Any, commands: Sequence[tuple[Any, ...]]) -> None:
    # in one piece: redis-py itself sends 6,000 bytes at a time
    connection.send_packed_command([b"".join(connection.pack_commands(commands))])


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except driver().exceptions.ResponseError as exc:
        return exc


def _asked(connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    _send(connection, commands)
    return [_answer(connection) for _ in commands]


def _ask_strictly(connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    answers = _asked(connection, commands)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def see_that_it_keeps_keys(server: Server) -> None:
    """Refuse a Redis that takes no writes, or throws away whatever it likes when it is full."""
    try:
        texts = server.ask_everywhere([("INFO", "memory"), ("INFO", "replication")])
    except driver().exceptions.NoPermissionError:
        return
    for text in texts:
        info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if info.get("role") == "slave" and info.get("slave_read_only") == "1":
            raise driver().exceptions.ReadOnlyError("it takes no writes")
        policy = info.get("maxmemory_policy", "")
        if info.get("maxmemory") != "0" and policy.startswith("allkeys-"):
            raise ProviderError(
                f"Redis throws events away when it is full: its maxmemory-policy is {policy}, "
                "and has to be noeviction"
            )
