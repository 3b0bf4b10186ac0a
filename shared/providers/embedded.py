"""The default provider: the message log's own SQL database is the queue.

It works on the columns of ``queue_deliveries`` that are its own (``ready``,
``lease_token``, ``lease_expires_at``), and wakes the processes of this machine by
a datagram, since a database cannot.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    BindParameter,
    Integer,
    Select,
    and_,
    bindparam,
    case,
    delete,
    exists,
    false,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from shared.clock import monotonic
from shared.database import Database, Transaction, database_url
from shared.errors import ProviderError, ProviderUnavailableError, StoreUnavailableError
from shared.lifecycle import WAITING, DeliveryStatus
from shared.native import select as wait_readable
from shared.native import sleep, socket
from shared.providers.base import Capabilities, QueueProvider, SubscriptionStats
from shared.providers.rpc import RpcMessage, RpcTransport, wake_id
from shared.settings import Settings
from shared.statements import Prepared
from shared.tables import (
    MESSAGE_COLUMNS,
    deliveries,
    envelope_of,
    messages,
    rpc_messages,
    rpc_services,
    subscriptions,
)
from shared.types import Delivery, Lease, SettleAction, Settlement, Subscription

POLL_SECONDS = 0.1
"""How often work is looked for where nothing can wake this process: on other machines."""

WAKE_FOLDER = "wake"

MOST_LOOKED_AT = 100
"""Subscriptions that one statement looks at; SQLite takes no more than 500 parts."""

RPC_WAKE_FOLDER = "wake-rpc"
"""Apart from that of the events: a call then wakes nobody but who takes part in RPC."""

PURGE_SECONDS = 10.0
"""How often requests and replies that nobody waits for any more are deleted."""

T = TypeVar("T")

c = deliveries.c


class EmbeddedProvider(QueueProvider):
    """See the module's docstring."""

    capabilities = Capabilities(joins_log=True)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._database = Database(database_url(settings), sleep)
        self._bell = Bell(settings.data_dir.absolute() / WAKE_FOLDER)
        self._mine: frozenset[int] = frozenset()
        # when, by this process's own clock, something becomes due of itself
        self._due = math.inf
        self._turns = 0

    @classmethod
    def rpc_transport(cls, settings: Settings) -> RpcTransport:
        return EmbeddedRpc(settings)

    def initialize(self) -> None:
        self._bell.close()  # its folder may be another by now
        with self._joined(None):  # the database answers
            pass

    def close(self) -> None:
        self._bell.close()
        self._database.close()

    def declare(self, subscriptions: Sequence[Subscription]) -> None:
        self._mine |= {subscription.id for subscription in subscriptions}
        if self._mine:  # who only dispatches needs not be woken
            self._bell.listen()

    def publish(self, deliveries: Sequence[Delivery], tx: Any = None) -> list[Delivery]:
        with self._joined(tx) as tx:
            at_once = [d.seq for d in deliveries if d.delay <= 0]
            if at_once:
                _READY.change(tx, {"seqs": at_once})
            later = [
                {"its_seq": d.seq, "its_due": tx.later(d.delay)} for d in deliveries if d.delay > 0
            ]
            if later:
                _DELAY.change_many(tx, later)
        return []

    def published(self, deliveries: Sequence[Delivery]) -> None:
        self._bell.ring({delivery.subscription_id for delivery in deliveries})

    def wait(self, timeout: float, interrupt: int, hungry: bool = True) -> None:
        if not hungry:
            wait_readable([interrupt], [], [], max(timeout, 0))
            return
        if not self._database.is_sqlite and self._mine:
            timeout = min(timeout, POLL_SECONDS)
        self._bell.wait(min(timeout, self._due - monotonic()), interrupt, self._mine)

    def reserve(self, limits: Mapping[int, int], limit: int, tx: Any = None) -> list[Lease]:
        with self._joined(tx) as tx:
            hungry = self._in_turn(self._with_ready(tx, list(limits)))
            taken: dict[int, list[int]] = {subscription_id: [] for subscription_id in hungry}
            while hungry and (left := limit - _count(taken)) > 0:
                shares = _even_shares(left, len(hungry))
                hungry = [
                    subscription_id
                    for subscription_id, share in zip(hungry, shares, strict=True)
                    if _take(tx, subscription_id, share, limits, taken)
                ]
            seqs = [seq for its in taken.values() for seq in its]
            return _lease(tx, seqs, self.settings.lease)

    def settle(self, settlements: Sequence[Settlement], tx: Any = None) -> list[Settlement]:
        with self._joined(tx) as tx:
            held = _held(tx, [settlement.lease for settlement in settlements])
            for action, its in _by_action(settlements, held).items():
                _end(tx, action, its)
            return [x for x in settlements if _key(x.lease) not in held]

    def extend(self, leases: Sequence[Lease], tx: Any = None) -> list[Lease]:
        with self._joined(tx) as tx:
            held = _held(tx, leases)
            until = tx.later(self.settings.lease)
            if held:
                _EXTEND.change(tx, {"seqs": [seq for seq, _ in held], "until": until})
            return [lease for lease in leases if _key(lease) not in held]

    def get_queue_stats(self, subscriptions: Sequence[Subscription]) -> list[SubscriptionStats]:
        ids = [subscription.id for subscription in subscriptions]
        if not ids:
            return []
        with self._joined(None) as tx:
            return [SubscriptionStats(*row) for row in _STATS.fetch(tx, {"ids": ids})]

    def health_check(self) -> bool:
        return self._database.ping()

    def pause(self, subscription: Subscription) -> None:
        self._set_paused(subscription.id, True)

    def resume(self, subscription: Subscription) -> None:
        self._set_paused(subscription.id, False)
        self._bell.ring({subscription.id})

    def is_paused(self, subscription: Subscription) -> bool:
        s = subscriptions.c
        with self._joined(None) as tx:
            found = select(s.paused_at).where(s.id == subscription.id)
            return tx.connection.execute(found).scalar() is not None

    def peek(self, subscription: Subscription, limit: int) -> list[Delivery]:
        with self._joined(None) as tx:
            values = {"id": subscription.id, "limit": limit, "offset": 0}
            seqs = [row.seq for row in _NEXT.fetch(tx, values) if row.available_at is None]
            return [lease.delivery for lease in _load(tx, seqs)]

    def purge(self, subscription: Subscription) -> int:
        with self._joined(None) as tx:
            return _PURGE.count_changed(tx, {"id": subscription.id})

    def forget(self, subscription: Subscription) -> None:
        """Do nothing: the log discarded what it had."""

    def _with_ready(self, tx: Transaction, subscription_ids: list[int]) -> list[int]:
        """Return which subscriptions have something ready, after what is due was made so."""
        if not subscription_ids:
            return []
        rows = _look(tx, subscription_ids)
        times = [time for row in rows for time in (row.available, row.lease) if time is not None]
        if times and min(times) <= tx.now:
            values = {"ids": subscription_ids, "now": tx.now}
            _DUE.change(tx, values)
            _TAKE_OVER.change(tx, values)
            return self._with_ready(tx, subscription_ids)
        wait = (min(times) - tx.now).total_seconds() if times else math.inf
        self._due = monotonic() + wait
        return [row.id for row in rows if row.is_ready and row.paused_at is None]

    def _in_turn(self, subscription_ids: list[int]) -> list[int]:
        """Begin with another one each time: who is first may get all there is room for."""
        self._turns += 1
        start = self._turns % max(len(subscription_ids), 1)
        return subscription_ids[start:] + subscription_ids[:start]

    def _set_paused(self, subscription_id: int, is_paused: bool) -> None:
        with self._joined(None) as tx:
            tx.connection.execute(
                update(subscriptions)
                .where(subscriptions.c.id == subscription_id)
                .values(paused_at=tx.now if is_paused else None)
            )

    @contextlib.contextmanager
    def _joined(self, tx: Transaction | None) -> Iterator[Transaction]:
        """Join the transaction given, or do the step in one of its own."""
        if tx is not None:
            yield tx
            return
        with _translated(), self._database.transaction() as own:
            yield own


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn the database's errors into a provider's."""
    try:
        yield
    except StoreUnavailableError as exc:
        raise ProviderUnavailableError(str(exc)) from exc
    except SQLAlchemyError as exc:
        raise ProviderError(str(getattr(exc, "orig", None) or exc)) from exc


_SEQS: BindParameter[Any] = bindparam("seqs", expanding=True)
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_NOW = bindparam("now", type_=c.available_at.type)
# spelled as the condition of the index, without a parameter, or SQLite would not see it
_IS_OPEN = c.status != literal_column("'completed'")
_IS_WAITING = or_(*[c.status == status for status in sorted(WAITING)])


def _earliest(time: Any, subscription_id: Any) -> Any:
    its = and_(c.subscription_id == subscription_id, time.is_not(None))
    return select(time).where(its).order_by(time).limit(1).scalar_subquery()


def _sum_of(condition: Any) -> Any:
    return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)


# What has a time is published already: by its schedule, or to be tried again.
_IS_NEW = and_(_IS_WAITING, c.lease_expires_at.is_(None), c.available_at.is_(None))
_READY = Prepared(update(deliveries).where(c.seq.in_(_SEQS), _IS_NEW).values(ready=True))
_DELAY = Prepared(
    update(deliveries)
    .where(c.seq == bindparam("its_seq"), _IS_NEW, c.ready == false())
    .values(available_at=bindparam("its_due"))
)
_SCHEDULE = Prepared(
    update(deliveries)
    .where(c.seq == bindparam("its_seq"), _IS_WAITING)
    .values(available_at=bindparam("its_due"), provider=None)
)
_DUE = Prepared(
    update(deliveries)
    .where(c.subscription_id.in_(_IDS), c.available_at <= _NOW)
    .values(ready=_IS_WAITING, available_at=None, provider=None)
)
_TAKE_OVER = Prepared(
    update(deliveries)
    .where(c.subscription_id.in_(_IDS), c.lease_expires_at <= _NOW)
    # the token moves on at once, so that who held it can no longer settle
    .values(ready=True, lease_expires_at=None, lease_token=c.lease_token + 1)
)
_NEXT = Prepared(
    select(c.seq, c.available_at)
    .where(c.subscription_id == bindparam("id"), c.ready == true())
    .order_by(c.priority_rank, c.seq)
    .limit(bindparam("limit", type_=Integer))
    .offset(bindparam("offset", type_=Integer))
    .with_for_update(skip_locked=True)
)
_PUT_OFF = Prepared(update(deliveries).where(c.seq.in_(_SEQS)).values(ready=False))
_LEASE = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS), c.ready == true())
    .values(ready=False, lease_token=c.lease_token + 1, lease_expires_at=bindparam("until"))
)
_LOAD = Prepared(
    select(c.seq, c.subscription_id, c.attempts, c.lease_token, *MESSAGE_COLUMNS)
    .select_from(deliveries.join(messages))
    .where(c.seq.in_(_SEQS))
    .order_by(c.priority_rank, c.seq)
)
_HELD = Prepared(
    select(c.seq, c.lease_token)
    .where(c.seq.in_(_SEQS), c.lease_expires_at.is_not(None))
    .with_for_update()
)
_EXTEND = Prepared(
    update(deliveries).where(c.seq.in_(_SEQS)).values(lease_expires_at=bindparam("until"))
)
_END = Prepared(
    update(deliveries)
    .where(c.seq.in_(_SEQS))
    .values(lease_expires_at=None, ready=bindparam("is_ready"))
)
_PURGE = Prepared(
    update(deliveries)
    .where(
        c.subscription_id == bindparam("id"),
        _IS_OPEN,
        # the log has what was taken over for processing, until somebody has it again
        or_(c.ready == true(), c.available_at.is_not(None)),
    )
    .values(ready=False, available_at=None)
)
_STATS = Prepared(
    select(
        subscriptions.c.subscriber,
        _sum_of(c.ready).label("waiting"),
        _sum_of(c.lease_expires_at.is_not(None)).label("active"),
        _sum_of(c.available_at.is_not(None)).label("scheduled"),
        _sum_of(c.status == DeliveryStatus.FAILED).label("dead"),
    )
    .select_from(
        subscriptions.outerjoin(
            deliveries,
            and_(
                c.subscription_id == subscriptions.c.id,
                _IS_OPEN,
            ),
        )
    )
    .where(subscriptions.c.id.in_(_IDS))
    .group_by(subscriptions.c.id, subscriptions.c.subscriber)
    .order_by(subscriptions.c.id)
)


def _look(tx: Transaction, subscription_ids: Sequence[int]) -> list[Any]:
    rows: list[Any] = []
    in_order = sorted(subscription_ids)  # they were set up in none
    for start in range(0, len(in_order), MOST_LOOKED_AT):
        ids = in_order[start : start + MOST_LOOKED_AT]
        rows += _looking_at(len(ids)).fetch(tx, {f"id_{n}": id_ for n, id_ in enumerate(ids)})
    return rows


@cache
def _looking_at(count: int) -> Prepared:
    """Return what looks for the next of so many subscriptions.

    Each has a SELECT of its own, with its number in it: where that comes from another row, MariaDB
    looks through all that the subscription ever had to find what has a time.
    """
    return Prepared(union_all(*[_looking_at_one(f"id_{n}") for n in range(count)]))


def _looking_at_one(name: str) -> Select[Any]:
    its = bindparam(name, type_=subscriptions.c.id.type)
    return select(
        subscriptions.c.id,
        subscriptions.c.paused_at,
        _earliest(c.available_at, its).label("available"),
        _earliest(c.lease_expires_at, its).label("lease"),
        exists().where(c.subscription_id == its, c.ready == true()).label("is_ready"),
    ).where(subscriptions.c.id == its)


def _count(taken: Mapping[int, list[int]]) -> int:
    return sum(map(len, taken.values()))


def _even_shares(total: int, count: int) -> list[int]:
    return [total // count + (place < total % count) for place in range(count)]


def _take(
    tx: Transaction,
    subscription_id: int,
    share: int,
    limits: Mapping[int, int],
    taken: Mapping[int, list[int]],
) -> bool:
    """Choose the next of one subscription; say whether it may have more than its share."""
    its = taken[subscription_id]
    most = min(share, limits[subscription_id] - len(its))
    if most <= 0:
        return False
    values = {"id": subscription_id, "limit": most, "offset": len(its)}
    found = _NEXT.fetch(tx, values)
    # what another provider was to publish is ready before its time
    early = [row.seq for row in found if row.available_at is not None]
    if early:
        _PUT_OFF.change(tx, {"seqs": early})
    its.extend(row.seq for row in found if row.available_at is None)
    return len(found) == most


def _lease(tx: Transaction, seqs: list[int], seconds: float) -> list[Lease]:
    if not seqs:
        return []
    _LEASE.change(tx, {"seqs": seqs, "until": tx.later(seconds)})
    return _load(tx, seqs)


def _load(tx: Transaction, seqs: list[int]) -> list[Lease]:
    if not seqs:
        return []
    return [
        Lease(
            Delivery(row.seq, row.subscription_id, envelope_of(row), row.attempts), row.lease_token
        )
        for row in _LOAD.fetch(tx, {"seqs": seqs})
    ]


def _key(lease: Lease) -> tuple[int, int]:
    return lease.delivery.seq, lease.token


def _held(tx: Transaction, leases: Sequence[Lease]) -> set[tuple[int, int]]:
    """Return the keys of the leases that are still held, and have them stay so."""
    if not leases:
        return set()
    rows = _HELD.fetch(tx, {"seqs": [lease.delivery.seq for lease in leases]})
    return {(row.seq, row.lease_token) for row in rows} & {_key(lease) for lease in leases}


def _by_action(
    settlements: Sequence[Settlement], held: set[tuple[int, int]]
) -> dict[SettleAction, list[Settlement]]:
    """Group what one statement can settle, without what is no longer held."""
    groups = defaultdict(list)
    for settlement in settlements:
        if _key(settlement.lease) in held:
            groups[settlement.action].append(settlement)
    return groups


def _end(tx: Transaction, action: SettleAction, ended: Sequence[Settlement]) -> None:
    seqs = [settlement.lease.delivery.seq for settlement in ended]
    _END.change(tx, {"seqs": seqs, "is_ready": action == SettleAction.RELEASE})
    if action == SettleAction.RETRY:
        rows = [{"its_seq": x.lease.delivery.seq, "its_due": tx.later(x.delay)} for x in ended]
        _SCHEDULE.change_many(tx, rows)


class Bell:
    """Wakes the processes of this machine that consume: a Unix datagram each.

    Each listener binds a socket in one folder of the data directory; who rings sends
    the ids of the subscriptions that have something new to every socket there. A
    listener that is awake already may miss one, and needs none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket: Any = None
        self._path = ""
        self._sender: Any = None

    def listen(self) -> None:
        """Bind this listener's socket.

        :raises ProviderUnavailableError: when the folder cannot be written.
        """
        if self._socket is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._path = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._with_folder(self._socket.bind, self._path)
        except OSError as exc:
            self._socket = None
            raise ProviderUnavailableError(f"QUEUE_DATA_DIR {self._folder}: {exc}") from exc

    def fileno(self) -> int:
        """The descriptor that is readable once somebody rang."""
        return int(self._socket.fileno())

    def ring(self, subscription_ids: set[int]) -> None:
        """Wake who consumes any of these."""
        if self._sender is None:
            self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._sender.setblocking(False)
        text = " ".join(map(str, subscription_ids)).encode()
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._folder):  # noqa: PTH208 - on the way of every event
                self._ring_one(name, text)

    def wait(self, timeout: float, interrupt: int, mine: frozenset[int]) -> None:
        """Wait until one of ``mine`` has something new, or ``interrupt`` is readable."""
        deadline = monotonic() + timeout
        while True:
            left = max(deadline - monotonic(), 0)
            listened = [self._socket] if self._socket is not None else []
            readable, _, _ = wait_readable([interrupt, *listened], [], [], left)
            if self._socket not in readable or interrupt in readable or mine & self._heard():
                return

    def close(self) -> None:
        """Unbind. Never raises."""
        for each in (self._socket, self._sender):
            if each is not None:
                each.close()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                (self._folder / self._path).unlink()
        self._socket = self._sender = None

    def _heard(self) -> set[int]:
        heard: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            while True:
                heard.update(map(int, self._socket.recv(65536).split()))
        return heard

    def _ring_one(self, name: str, text: bytes) -> None:
        try:
            self._with_folder(lambda path: self._sender.sendto(text, path), name)
        except OSError as exc:
            if exc.errno == errno.ECONNREFUSED:  # its process was killed
                with contextlib.suppress(OSError):
                    (self._folder / name).unlink()

    def _with_folder(self, use: Any, name: str) -> Any:
        """Call ``use`` with an address of the socket that fits into the 108 bytes it may have."""
        path = self._folder / name
        if len(os.fsencode(path)) < 100:
            return use(str(path))
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            return use(f"/proc/self/fd/{folder}/{name}")
        finally:
            os.close(folder)


class EmbeddedRpc(RpcTransport):
    """RPC by two small tables: a request or reply is a row until somebody takes it."""

    in_log = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._database = Database(database_url(settings), sleep)
        self._bell = Bell(settings.data_dir.absolute() / RPC_WAKE_FOLDER)
        self._known: set[str] = set()
        self._purge_at = 0.0

    def initialize(self) -> None:
        self._bell.close()
        self._known = set()
        self._run(lambda _: None)

    def close(self) -> None:
        self._bell.close()
        self._database.close()

    def declare(self, queue: str, *, lasting: bool) -> None:
        if lasting:
            self._run(lambda tx: _declare(tx, queue))
        self._bell.listen()

    def send(self, messages: Sequence[RpcMessage]) -> list[RpcMessage]:
        refused = self._run(lambda tx: self._send(tx, messages))
        self._bell.ring({wake_id(message.queue) for message in messages})
        return refused

    def take(self, limits: Mapping[str, int]) -> list[RpcMessage]:
        if not limits:
            return []
        return self._run(lambda tx: self._take(tx, limits))

    def wait(self, timeout: float, interrupt: int, queues: Iterable[str]) -> None:
        mine = frozenset(map(wake_id, queues))
        if mine and not self._database.is_sqlite:
            timeout = min(timeout, POLL_SECONDS)
        self._bell.wait(timeout, interrupt, mine)

    def _send(self, tx: Transaction, sent: Sequence[RpcMessage]) -> list[RpcMessage]:
        asked = {message.queue for message in sent if message.mandatory} - self._known
        if asked:
            self._known |= {row.queue for row in _KNOWN.fetch(tx, {"queues": sorted(asked)})}
        refused = [x for x in sent if x.mandatory and x.queue not in self._known]
        rows = [
            {"queue": x.queue, "body": x.body, "expires_at": tx.later(x.ttl)}
            for x in sent
            if x not in refused
        ]
        if rows:
            _SEND.change_many(tx, rows)
        return refused

    def _take(self, tx: Transaction, limits: Mapping[str, int]) -> list[RpcMessage]:
        if monotonic() >= self._purge_at:
            self._purge_at = monotonic() + PURGE_SECONDS
            _EXPIRE.change(tx, {"now": tx.now})
        rows = [
            row
            for queue, limit in limits.items()
            for row in _FIRST.fetch(tx, {"queue": queue, "limit": limit, "now": tx.now})
        ]
        if rows:
            _TAKE.change(tx, {"ids": [row.id for row in rows]})
        return [
            RpcMessage(row.queue, row.body, (row.expires_at - tx.now).total_seconds())
            for row in rows
        ]

    def _run(self, step: Callable[[Transaction], T]) -> T:
        # whoever waits for a reply does not survive a power failure either
        with _translated():
            return self._database.run(step, durable=False)


m = rpc_messages.c

_KNOWN = Prepared(
    select(rpc_services.c.queue).where(
        rpc_services.c.queue.in_(bindparam("queues", expanding=True))
    )
)
_SEND = Prepared(insert(rpc_messages), ("queue", "body", "expires_at"))
_FIRST = Prepared(
    select(m.id, m.queue, m.body, m.expires_at)
    .where(m.queue == bindparam("queue"), m.expires_at > bindparam("now", type_=m.expires_at.type))
    .order_by(m.id)
    .limit(bindparam("limit", type_=Integer))
    .with_for_update(skip_locked=True)
)
_TAKE = Prepared(delete(rpc_messages).where(m.id.in_(_IDS)))
_EXPIRE = Prepared(
    delete(rpc_messages).where(m.expires_at <= bindparam("now", type_=m.expires_at.type))
)


def _declare(tx: Transaction, queue: str) -> None:
    if not _KNOWN.fetch(tx, {"queues": [queue]}):
        row = {"queue": queue, "created_at": tx.now}
        tx.connection.execute(insert(rpc_services).values(**row))
