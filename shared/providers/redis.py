"""The provider on Redis 7 or Valkey: one Lua script an operation, in ``lua/``.

What there is of a queue is written down in ``lua/_queue.lua``. Its keys share a prefix
and, as a hash tag, the queue's name, so that a cluster keeps them on one node. Redis' own
clock decides what is due. Who waits is woken by pub/sub.

Of redis-py it uses single connections, and none of the clients: these try again behind
the caller's back what may not be done twice, and share pools between threads. Sockets are
eventlet's, as for whatever else is imported after monkey patching: in a native thread they
wait by a hub of that thread's own. Unpatched ones were measured to be no faster.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from hashlib import sha1
from importlib import import_module
from itertools import compress
from pathlib import Path
from time import monotonic
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from shared.errors import ProviderError, ProviderUnavailableError
from shared.native import select as wait_readable
from shared.providers.base import QueueProvider, SubscriptionStats
from shared.settings import Settings
from shared.types import Delivery, Envelope, Lease, Priority, Settlement, Subscription

CONNECT_SECONDS = 3.0
"""How long a server may take to take a connection: it then is on another continent."""

ANSWER_SECONDS = 5.0
"""How long a script may take: a thousand deliveries take a hundredth of it."""

PING_SECONDS = 10.0
"""How often a listener that hears nothing asks whether anybody is there."""

MOST_AT_ONCE = 1000
"""Deliveries in one call of a script: nobody else is served meanwhile."""

MOST_BYTES_AT_ONCE = 4 << 20
"""Bytes of envelopes in one call of a script."""

SETTLED_MS = 60_000
"""How long settled deliveries are remembered: somebody whose publishing got no answer does it
again within seconds."""

SETTLED_MOST = 10_000
"""How many settled deliveries are remembered of a queue: about 1 MB."""

MOST_REDIRECTIONS = 5
"""How often a cluster may send a script on to another node, before it counts as confused."""

PLACES = ("waiting", "scheduled", "leases", "dead")
"""The sorted sets of a subscription, in the order of ``lua/_queue.lua``."""

LEASE_LOST = -1
"""What scripts return for a lease that somebody else has; as in ``lua/_queue.lua``."""

T = TypeVar("T")


class RedisProvider(QueueProvider):
    """See the module's docstring."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._keys = _Keys(settings.redis_prefix)
        self._server: _Server | None = None
        self._listener: _Listener | None = None
        self._mine: dict[int, Subscription] = {}
        # when, by this process's own clock, something becomes due of itself
        self._due = math.inf
        self._turns = 0

    def initialize(self) -> None:
        self.close()
        with _translated(self.settings, self.close):
            self._connect()

    def close(self) -> None:
        for each in (self._listener, self._server):
            if each is not None:
                each.close()
        self._listener = self._server = None

    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        # nothing to make: a queue is there with what is in it
        self._mine |= {subscription.id: subscription for subscription in subscriptions}
        with _translated(self.settings, self.close):
            self._connect()

    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> list[Delivery]:
        batches = _batches(deliveries, lambda d: d, lambda d: len(d.message.body) + 500)
        self._run([self._publication(batch) for batch in batches])
        return []

    def published(self, deliveries: Sequence[Delivery]) -> None:
        """Do nothing: the script that queued them woke who consumes."""

    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        if not hungry:
            wait_readable([interrupt], [], [], max(timeout, 0))
            return
        if self._mine and self._listener is None:
            return  # deaf: the next reserve listens again, or says what is wrong
        deadline = monotonic() + min(timeout, self._due - monotonic())
        if self._listener is None:
            wait_readable([interrupt], [], [], max(deadline - monotonic(), 0))
            return
        with self._deaf_on_errors():
            self._listener.wait(deadline, interrupt, self._mine.keys())

    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        self._hear()
        self._due = math.inf
        leases: list[Lease] = []
        hungry = self._in_turn(self._by_queue(limits))
        turn = self._turns // max(len(hungry), 1)
        while hungry and (left := limit - len(leases)) > 0:
            asked = [each for each in _with_shares(hungry, left) if each.share > 0]
            answers = self._run([self._reservation(each, turn) for each in asked])
            for each, answer in zip(asked, answers, strict=True):
                leases += each.take(answer)
                self._note_due(answer[0])
            # who got less than its share has no more
            hungry = [each for each in hungry if each.has_more]
        return sorted(leases, key=_order)

    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        batches = _batches(settlements, lambda x: x.lease.delivery)
        answers = self._run([self._settling(batch) for batch in batches])
        return _lost(settlements, batches, answers)

    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        self._hear()
        batches = _batches(leases, lambda lease: lease.delivery)
        answers = self._run([self._extension(batch) for batch in batches])
        return _lost(leases, batches, answers)

    def get_queue_stats(self, subscriptions: Sequence[Subscription]) -> list[SubscriptionStats]:
        by_queue: dict[str, list[int]] = {}
        for each in subscriptions:
            by_queue.setdefault(each.queue, []).append(each.id)
        asked = [_script("stats", self._keys.of(*each)) for each in by_queue.items()]
        counts: dict[int, list[int]] = {}
        for ids, answer in zip(by_queue.values(), self._run(asked), strict=True):
            rows = zip(*[iter(answer)] * len(PLACES), strict=True)
            counts |= zip(ids, map(list, rows), strict=True)
        return [SubscriptionStats(each.subscriber, *counts[each.id]) for each in subscriptions]

    def health_check(self) -> bool:
        # a cluster may have lost some of its nodes: those that matter are asked
        queues = {subscription.queue for subscription in self._mine.values()} or {""}
        keys = [self._keys.deliveries(queue) for queue in queues]
        try:
            self._run([_Command(key, ("EXISTS", key)) for key in keys])
        except ProviderError:
            return False
        return True

    def pause(self, subscription: Subscription) -> None:
        self._set_paused(subscription, True)

    def resume(self, subscription: Subscription) -> None:
        self._set_paused(subscription, False)

    def peek(self, subscription: Subscription, limit: int) -> list[Delivery]:
        keys = self._keys.of(subscription.queue, [subscription.id])
        [answer] = self._run([_script("peek", keys, subscription.id, limit)])
        return [lease.delivery for lease in _leases(answer)]

    def purge(self, subscription: Subscription) -> int:
        return self._remove(subscription, "waiting", "scheduled")

    def forget(self, subscription: Subscription) -> None:
        self._remove(subscription, *PLACES)
        key = self._keys.paused(subscription.queue)
        self._run([_Command(key, ("SREM", key, subscription.id))])
        self._mine.pop(subscription.id, None)

    # --- beyond the interface

    def holds(self, queue: str, seqs: Sequence[int]) -> set[int]:
        """Return which of these deliveries it has, in whatever state: for the audit."""
        key = self._keys.deliveries(queue)
        chunks = [seqs[i : i + MOST_AT_ONCE] for i in range(0, len(seqs), MOST_AT_ONCE)]
        answers = self._run([_Command(key, ("HMGET", key, *chunk)) for chunk in chunks])
        found = [record for answer in answers for record in answer]
        return {seq for seq, record in zip(seqs, found, strict=True) if record is not None}

    # --- what is said to Redis

    def _publication(self, batch: _Batch[Delivery]) -> _Command:
        args = [
            value
            for place, delivery in batch.placed()
            for value in (_line(place, *_facts_of(delivery)), _encoded(delivery.message))
        ]
        channel = self._keys.channel(batch.queue)
        return _script("publish", self._keys_of(batch), channel, *args)

    def _reservation(self, wanted: _Wanted, turn: int) -> _Command:
        args = [value for each in wanted.limits.items() for value in each]
        keys = self._keys.of(wanted.queue, list(wanted.limits))
        return _script("reserve", keys, self._lease_ms, wanted.share, turn, *args)

    def _settling(self, batch: _Batch[Settlement]) -> _Command:
        args = [
            _line(place, x.lease.delivery.seq, x.lease.token, x.action, _ms(x.delay))
            for place, x in batch.placed()
        ]
        channel = self._keys.channel(batch.queue)
        return _script("settle", self._keys_of(batch), channel, SETTLED_MS, SETTLED_MOST, *args)

    def _extension(self, batch: _Batch[Lease]) -> _Command:
        args = [_line(place, x.delivery.seq, x.token) for place, x in batch.placed()]
        return _script("extend", self._keys_of(batch), self._lease_ms, *args)

    def _keys_of(self, batch: _Batch[Any]) -> list[str]:
        return self._keys.of(batch.queue, batch.subscriptions)

    @property
    def _lease_ms(self) -> int:
        return _ms(self.settings.lease)

    def _remove(self, subscription: Subscription, *places: str) -> int:
        removed = 0
        while True:
            keys = self._keys.of(subscription.queue, [subscription.id])
            [count] = self._run([_script("purge", keys, subscription.id, *places)])
            removed += count
            if count < MOST_AT_ONCE:
                return removed

    def _set_paused(self, subscription: Subscription, is_paused: bool) -> None:
        key = self._keys.paused(subscription.queue)
        commands = [_Command(key, ("SADD" if is_paused else "SREM", key, subscription.id))]
        if not is_paused:
            wake = ("PUBLISH", self._keys.channel(subscription.queue), subscription.id)
            commands.append(_Command(key, wake))
        self._run(commands)

    # --- whose turn it is

    def _in_turn(self, wanted: list[_Wanted]) -> list[_Wanted]:
        """Begin with another queue each time: who is first may get all there is room for."""
        self._turns += 1
        start = self._turns % max(len(wanted), 1)
        return wanted[start:] + wanted[:start]

    def _by_queue(self, limits: Mapping[int, int]) -> list[_Wanted]:
        wanted: dict[str, _Wanted] = {}
        for subscription_id, most in limits.items():
            if subscription_id in self._mine:
                queue = self._mine[subscription_id].queue
                wanted.setdefault(queue, _Wanted(queue)).limits[subscription_id] = most
        return list(wanted.values())

    def _note_due(self, milliseconds: int) -> None:
        if milliseconds >= 0:
            self._due = min(self._due, monotonic() + milliseconds / 1000)

    # --- connections

    def _run(self, commands: Sequence[_Command]) -> list[Any]:
        """Have commands done in one round trip; return what each answered."""
        if not commands:
            return []
        with _translated(self.settings, self.close):
            server = self._connect()
            answers = server.ask(commands)
            unknown = [_is_unknown_script(answer) for answer in answers]
            if any(unknown):
                _load_scripts(server)
                again = iter(server.ask(list(compress(commands, unknown))))
                answers = [
                    next(again) if is_unknown else answer
                    for answer, is_unknown in zip(answers, unknown, strict=True)
                ]
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

    def _connect(self) -> _Server:
        if self._server is None:
            self._server = _connected(_Target.of(self.settings))
            _see_that_it_keeps_keys(self._server)
            _load_scripts(self._server)
        self._listen()
        return self._server

    def _listen(self) -> None:
        channels = {self._keys.channel(each.queue) for each in self._mine.values()}
        if self._server is None or not channels:
            return
        if self._listener is None:
            self._listener = _Listener(self._server.new_connection())
        self._listener.subscribe(channels)

    @contextlib.contextmanager
    def _deaf_on_errors(self) -> Iterator[None]:
        """Have the next command listen anew, or say what is wrong."""
        try:
            yield
        except (_redis().exceptions.RedisError, OSError):
            if self._listener is not None:
                self._listener.close()
            self._listener = None

    def _hear(self) -> None:
        """Forget what was heard so far: whoever reserves now finds it."""
        if self._listener is not None:
            with self._deaf_on_errors():
                self._listener.forget()


# --- what travels


class _Keys:
    """The names of all keys."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def channel(self, queue: str) -> str:
        return self._key(queue, "wake")

    def deliveries(self, queue: str) -> str:
        return self._key(queue, "deliveries")

    def paused(self, queue: str) -> str:
        return self._key(queue, "paused")

    def of(self, queue: str, subscription_ids: Iterable[int]) -> list[str]:
        """Return KEYS, as ``lua/_queue.lua`` says."""
        shared = ("messages", "deliveries", "settled", "paused")
        own = [f"{each}:{place}" for each in subscription_ids for place in PLACES]
        return [self._key(queue, name) for name in (*shared, *own)]

    def _key(self, queue: str, name: str) -> str:
        return f"{self._prefix}:{{{queue}}}:{name}"


@dataclass(slots=True)
class _Command:
    """One command, and a key that says which node of a cluster it is for."""

    key: str
    args: tuple[Any, ...]


@dataclass(slots=True)
class _Batch(Generic[T]):
    """What one call of a script is about: all of one queue."""

    queue: str
    items: list[T] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    """For each item, which of the subscriptions it belongs to, counted from 1."""
    indices: list[int] = field(default_factory=list)
    """For each item, where it stood in what the caller gave."""
    numbers: dict[int, int] = field(default_factory=dict)
    size: int = 0

    @property
    def subscriptions(self) -> list[int]:
        return list(self.numbers)

    def add(self, index: int, item: T, subscription_id: int, size: int) -> None:
        self.items.append(item)
        self.places.append(self.numbers.setdefault(subscription_id, len(self.numbers) + 1))
        self.indices.append(index)
        self.size += size

    def placed(self) -> Iterator[tuple[int, T]]:
        """Go through the items, each with its place."""
        return zip(self.places, self.items, strict=True)

    def has_room(self, size: int) -> bool:
        return len(self.items) < MOST_AT_ONCE and self.size + size <= MOST_BYTES_AT_ONCE


def _batches(
    items: Sequence[T],
    delivery_of: Callable[[T], Delivery],
    size_of: Callable[[T], int] = lambda _: 0,
) -> list[_Batch[T]]:
    """Part items by queue, in their order, and into what one call of a script may take."""
    made: list[_Batch[T]] = []
    open_ones: dict[str, _Batch[T]] = {}
    for index, item in enumerate(items):
        delivery, size = delivery_of(item), size_of(item)
        queue = delivery.message.queue
        batch = open_ones.get(queue)
        if batch is None or (batch.items and not batch.has_room(size)):
            batch = open_ones[queue] = _Batch(queue)
            made.append(batch)
        batch.add(index, item, delivery.subscription_id, size)
    return made


def _lost(
    items: Sequence[T], batches: Iterable[_Batch[T]], answers: Iterable[list[int]]
) -> list[T]:
    """Return the items whose lease was lost, in their order."""
    lost = [
        index
        for batch, codes in zip(batches, answers, strict=True)
        for index, code in zip(batch.indices, codes, strict=True)
        if code == LEASE_LOST
    ]
    return [items[index] for index in sorted(lost)]


@dataclass(slots=True)
class _Wanted:
    """What is to be reserved of one queue: the most for each subscription, and altogether."""

    queue: str
    limits: dict[int, int] = field(default_factory=dict)
    share: int = 0
    has_more: bool = True

    def take(self, answer: list[Any]) -> list[Lease]:
        """Read what was reserved, and note whether there may be more."""
        leases = _leases(answer[1:])
        for lease in leases:
            self.limits[lease.delivery.subscription_id] -= 1
        self.has_more = len(leases) == self.share and any(x > 0 for x in self.limits.values())
        return leases


def _with_shares(wanted: list[_Wanted], total: int) -> list[_Wanted]:
    """Give each queue as much of ``total`` as it has of the subscriptions."""
    count, place = sum(len(each.limits) for each in wanted), 0
    for each in wanted:
        places = range(place, place + len(each.limits))
        place += len(each.limits)
        share = sum(total // count + (place < total % count) for place in places)
        each.share = min(share, MOST_AT_ONCE)
    return wanted


def _line(*words: Any) -> str:
    return " ".join(map(str, words))


def _facts_of(delivery: Delivery) -> tuple[Any, ...]:
    return (
        delivery.subscription_id,
        delivery.seq,
        delivery.token,
        delivery.attempts,
        delivery.message.priority.rank,
        _ms(delivery.delay),
        delivery.message.id,
    )


def _encoded(envelope: Envelope) -> str:
    """Return an envelope as a line of JSON, and its payload, untouched, as what follows."""
    head = {
        "id": envelope.id,
        "queue": envelope.queue,
        "type": envelope.type,
        "priority": envelope.priority,
        "max_retries": envelope.max_retries,
        "scheduled_at": envelope.scheduled_at and envelope.scheduled_at.isoformat(),
        "created_at": envelope.created_at and envelope.created_at.isoformat(),
        "metadata": dict(envelope.metadata),
    }
    return f"{json.dumps(head, separators=(',', ':'))}\n{envelope.body}"


def _decoded(text: str) -> Envelope:
    head, _, body = text.partition("\n")
    values = json.loads(head)
    for name in ("scheduled_at", "created_at"):
        values[name] = values[name] and datetime.fromisoformat(values[name])
    values["priority"] = Priority(values["priority"])
    return Envelope(body=body, **values)


def _leases(flat: Sequence[str]) -> list[Lease]:
    leases = []
    for line, envelope in zip(flat[::2], flat[1::2], strict=True):
        seq, subscription_id, token, attempts = map(int, line.split())
        leases.append(Lease(Delivery(seq, subscription_id, _decoded(envelope), attempts), token))
    return leases


def _order(lease: Lease) -> tuple[int, int]:
    return lease.delivery.message.priority.rank, lease.delivery.seq


def _ms(seconds: float) -> int:
    return max(round(seconds * 1000), 0)


# --- scripts

_LUA = Path(__file__).with_name("lua")
_INCLUDE = re.compile(r"^-- @include (\w+)$", re.MULTILINE)


@cache
def _source(name: str) -> str:
    """Return a script with what it includes."""
    text = (_LUA / f"{name}.lua").read_text()
    return _INCLUDE.sub(lambda found: _source(found[1]), text)


@cache
def _digest(name: str) -> str:
    return sha1(_source(name).encode(), usedforsecurity=False).hexdigest()


def _script(name: str, keys: list[str], *args: Any) -> _Command:
    return _Command(keys[0], ("EVALSHA", _digest(name), len(keys), *keys, *args))


def _load_scripts(server: _Server) -> None:
    names = sorted(path.stem for path in _LUA.glob("[a-z]*.lua"))
    server.ask_everywhere([("SCRIPT", "LOAD", _source(name)) for name in names])


def _see_that_it_keeps_keys(server: _Server) -> None:
    """Refuse a Redis that throws away whatever it likes when it is full."""
    try:
        texts = server.ask_everywhere([("INFO", "memory")])
    except _redis().exceptions.NoPermissionError:
        return
    for text in texts:
        info = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        policy = info.get("maxmemory_policy", "")
        if info.get("maxmemory") != "0" and policy.startswith("allkeys-"):
            raise ProviderError(
                f"Redis throws events away when it is full: its maxmemory-policy is {policy}, "
                "and has to be noeviction"
            )


def _is_unknown_script(answer: Any) -> bool:
    return isinstance(answer, _redis().exceptions.NoScriptError)


# --- connections


@cache
def _redis() -> Any:
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


@contextlib.contextmanager
def _translated(settings: Settings, lose: Callable[[], None]) -> Iterator[None]:
    """Turn redis-py's errors into ours; after any of them, call ``lose``."""
    exceptions = _redis().exceptions
    try:
        yield
    except ProviderError:
        lose()
        raise
    except (exceptions.RedisError, OSError) as exc:
        lose()
        kind, said = _meaning(exc)
        raise kind(f"Redis at {_Target.of(settings)}: {said}") from exc


def _meaning(exc: Exception) -> tuple[type[ProviderError], str]:
    """Return which of our errors one of redis-py's is, and what to say."""
    known = _redis().exceptions
    text = str(exc)
    for kind, error, meaning in (
        (known.AuthenticationError, ProviderError, "user or password refused"),
        (known.NoPermissionError, ProviderError, "the user may not do this"),
        (known.BusyLoadingError, ProviderUnavailableError, "it still loads its data"),
        (known.OutOfMemoryError, ProviderError, "it is out of memory (maxmemory)"),
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
class _Target:
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
    def of(cls, settings: Settings) -> _Target:
        if settings.redis_url:
            return cls._of_url(settings.redis_url)
        options = {"password": settings.redis_password or None, "db": settings.redis_db}
        return cls("", ((settings.redis_host, settings.redis_port),), options=options)

    @classmethod
    def _of_url(cls, text: str) -> _Target:
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
        kinds = _redis().connection
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
    typed: dict[str, Any] = _redis().connection.parse_url(f"redis://?{urlencode(options)}")
    return typed


class _Server(ABC):
    """A Redis, whatever it consists of."""

    @abstractmethod
    def ask(self, commands: Sequence[_Command]) -> list[Any]:
        """Send all commands, then read all answers; what Redis refuses is an answer, too."""

    @abstractmethod
    def ask_everywhere(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Do commands on every node; return all answers, errors raised."""

    @abstractmethod
    def new_connection(self) -> Any:
        """Make another connection, to listen by."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections but the listeners'."""


def _connected(target: _Target) -> _Server:
    kinds = {"": _Single, "sentinel": _Sentinel, "cluster": _Cluster}
    made: _Server = kinds[target.kind](target)
    return made


class _Single(_Server):
    """One server."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._connection = self._primary()

    def ask(self, commands: Sequence[_Command]) -> list[Any]:
        _send(self._connection, [command.args for command in commands])
        return [_answer(self._connection) for _ in commands]

    def ask_everywhere(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        return _ask_strictly(self._connection, commands)

    def new_connection(self) -> Any:
        return self._target.connect(self._connection.host, self._connection.port)

    def close(self) -> None:
        self._connection.disconnect()

    def _primary(self) -> Any:
        return self._target.connect(*self._target.hosts[0])


class _Sentinel(_Single):
    """The server that sentinels say is the primary."""

    def _primary(self) -> Any:
        trouble = "no sentinel knows it"
        for host, port in self._target.hosts:
            try:
                return self._primary_by(host, port)
            except (_redis().exceptions.RedisError, OSError) as exc:
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


class _Cluster(_Server):
    """Several servers, each with some of the hash slots."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._connections: dict[tuple[str, int], Any] = {}
        self._slots: list[tuple[int, int, tuple[str, int]]] = []
        self._learn()

    def ask(self, commands: Sequence[_Command]) -> list[Any]:
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

    def close(self) -> None:
        for connection in self._connections.values():
            connection.disconnect()

    def _to(self, node: tuple[str, int]) -> Any:
        if node not in self._connections:
            self._connections[node] = self._target.connect(*node)
        return self._connections[node]

    def _node_of(self, key: str) -> tuple[str, int]:
        slot = _redis().crc.key_slot(key.encode())
        for first, last, node in self._slots:
            if first <= slot <= last:
                return node
        raise _redis().exceptions.ClusterDownError(f"no node serves slot {slot}")

    def _learn(self) -> None:
        """Ask which node has which slots: any that answers."""
        trouble: Exception | None = None
        for node in dict.fromkeys([*self._target.hosts, *self._connections]):
            try:
                [ranges] = _ask_strictly(self._to(node), [("CLUSTER", "SLOTS")])
            except (_redis().exceptions.RedisError, OSError) as exc:
                trouble = exc
                continue
            # a node that does not know its own name leaves it empty
            self._slots = [(a, b, (x[0] or node[0], x[1])) for a, b, x, *_ in ranges]
            return
        assert trouble is not None  # noqa: S101 - there is a host to ask, by the settings
        raise trouble

    def _followed(self, command: _Command, answer: Any) -> Any:
        """Go where a node sent us: slots move while a cluster is changed."""
        known = _redis().exceptions
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


def _send(connection: Any, commands: Sequence[tuple[Any, ...]]) -> None:
    # in one piece: redis-py itself sends 6,000 bytes at a time
    connection.send_packed_command([b"".join(connection.pack_commands(commands))])


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except _redis().exceptions.ResponseError as exc:
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


class _Listener:
    """A connection that hears which subscriptions have something new.

    What it raises are redis-py's errors, and OSError.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._channels: set[str] = set()
        self._confirmed: set[str] = set()
        self._heard: set[int] = set()
        self._alive_at = monotonic()
        self._is_pinged = False

    def subscribe(self, channels: set[str]) -> None:
        """Hear these, too; return once Redis says so."""
        new = channels - self._channels
        if new:
            self._connection.send_command("SUBSCRIBE", *new)
            self._channels |= new
        while self._channels - self._confirmed:
            self._read()

    def forget(self) -> None:
        """Forget what was heard so far."""
        self._drain()
        self._heard.clear()

    def wait(self, deadline: float, interrupt: int, mine: Set[int]) -> None:
        """Wait until one of ``mine`` has something new, or ``interrupt`` is readable."""
        while True:
            self._drain()
            if self._heard & mine:
                break
            left = deadline - monotonic()
            self._see_that_it_lives()
            watched = [interrupt, self._connection._sock]
            readable, _, _ = wait_readable(watched, [], [], min(max(left, 0), PING_SECONDS))
            if interrupt in readable or (left <= 0 and not readable):
                break
        self._heard.clear()

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()

    def _drain(self) -> None:
        while self._connection.can_read(0):
            self._read()

    def _read(self) -> None:
        kind, name, *rest = self._connection.read_response()
        if kind == "subscribe":
            self._confirmed.add(name)
        elif kind == "message":
            self._heard.update(map(int, rest[0].split()))
        self._alive_at, self._is_pinged = monotonic(), False

    def _see_that_it_lives(self) -> None:
        """A connection that broke in silence would never wake anybody again."""
        if monotonic() - self._alive_at < PING_SECONDS:
            return
        if self._is_pinged:
            raise TimeoutError("the listener got no answer")
        self._connection.send_command("PING")
        self._alive_at, self._is_pinged = monotonic(), True
