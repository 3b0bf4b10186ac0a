"""Engines, transactions and the database's clock, below both ``store`` and ``providers``."""

from __future__ import annotations

import contextlib
import math
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, ColumnElement, Connection, Engine, create_engine, event, func, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from shared.clock import replaced_utc_now
from shared.errors import StoreUnavailableError
from shared.mysql import NativeConnection, connect_natively, connect_on_hub, connect_plainly
from shared.settings import Settings

Sleep = Callable[[float], Any]

LOCK_WAIT_SECONDS = 5.0
"""How long a transaction waits for another writer of the same SQLite file."""

TRANSIENT_CODES = frozenset({1205, 1213, 1020, 1062})
"""MySQL and MariaDB: lock wait timeout, deadlock, record changed since it was read, and a
duplicate: of what somebody else stored since it was looked for."""

REFUSING_CODES = frozenset({1292, 3140, 3819, 4025})
"""MySQL and MariaDB: an incorrect value, what is no JSON, and a CHECK that failed. PyMySQL has the
same exception for these as for a server that does not answer."""

ANSWER_SECONDS = 8.0
"""How long a database server may take to answer the one connection of a native thread: whoever
dispatches waits for it."""

ORPHANED_SECONDS = 5
"""How long a transaction of such a connection may lie idle until the server ends it. Whose host
froze, or lost its network, else keeps the locks that it had, and with them those who take over."""

KEPT_SECONDS = 1.0
"""How soon a connection that was lost while nobody used it is found out to be."""

CLOCK_SECONDS = 1.0
"""How long the time of a database server is reckoned on before it is asked again."""

TRANSIENT_TRIES = 10
"""How often a transaction is done again that lost a deadlock."""

_T = TypeVar("_T")


class CommitUncertainError(StoreUnavailableError):
    """Raised when the connection broke during COMMIT, so that its fate is unknown.

    :param is_whole: all of the transaction went with its COMMIT: the server may have nothing of it
        so far, and get it later.
    """

    def __init__(self, reason: str, *, is_whole: bool = False) -> None:
        super().__init__(reason)
        self.is_whole = is_whole


@dataclass(frozen=True, slots=True)
class Transaction:
    """An open transaction, and the time at which the database says that it began.

    :param now: naive UTC, to the millisecond; never ahead of the database's clock.
    :param lag: by how much it may be behind: as long as the database's answer took.
    """

    connection: Connection
    now: datetime
    lag: timedelta = timedelta()

    def later(self, seconds: float) -> datetime:
        """Return a time that is not before ``seconds`` from now."""
        return self.now + self.lag + timedelta(milliseconds=round(seconds * 1000))


def database_url(settings: Settings, name: str = "queue") -> URL:
    """Return the URL of the message log, or of the service ``name``'s own tables.

    Without ``DB_HOST`` each has its own SQLite file, so that a long transaction of
    one does not keep the others from writing; with it they share one database.
    """
    if settings.database is None:
        return URL.create("sqlite", database=str(settings.data_dir.absolute() / f"{name}.db"))
    db = settings.database
    return URL.create(
        "mysql+pymysql",
        username=db.user,
        password=db.password or None,
        host=db.host,
        port=db.port,
        database=db.name,
        query={"charset": "utf8mb4"},
    )


def make_reader(url: URL, sleep: Sleep) -> Engine:
    """Make an engine that only reads: it takes no lock, and waits for nobody's transaction."""
    return _as_reader(make_engine, url, sleep)


def _as_reader(make: Callable[..., Engine], url: URL, sleep: Sleep) -> Engine:
    if url.get_backend_name() == "sqlite":
        return make(url, sleep).execution_options(isolation_level="AUTOCOMMIT")
    # as the connection is made: SQLAlchemy passes on what the driver raises any later
    return make(url, sleep, isolation_level="AUTOCOMMIT")


@contextlib.contextmanager
def disposing(engine: Engine) -> Iterator[Engine]:
    """Use an engine for a while, and close what it keeps open. The collector would do it late."""
    try:
        yield engine
    finally:
        engine.dispose()


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Connect for SELECTs alone, which lock nothing and wait for nobody's transaction.

    :raises SQLAlchemyError: also where the connection is lost before the first of them, or when
        it is given back.
    """
    with engine.connect() as connection:
        # elsewhere a SELECT locks nothing within a transaction, either, and what the driver raises
        # as this is set and taken back again is no SQLAlchemyError
        if engine.dialect.name == "sqlite":
            connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection


def make_engine(
    url: URL,
    sleep: Sleep,
    *,
    isolation_level: Any = "READ COMMITTED",
    connect: Callable[..., Any] = connect_plainly,
    **options: Any,
) -> Engine:
    """Make an engine for one thread, or for one hub.

    :param sleep: how that thread waits: ``eventlet.sleep`` on the hub.
    :param isolation_level: on MySQL and MariaDB.
    :param connect: makes a connection, on MySQL and MariaDB.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url, sleep, options)
    engine = create_engine(
        url,
        isolation_level=isolation_level,
        pool_pre_ping=True,
        # by place, as on SQLite: what statements.py reckons with
        paramstyle="format",
        connect_args={"connect_timeout": 5, "read_timeout": 30, "write_timeout": 30},
        **options,
    )
    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", _set_utc)
    return engine


def _brief_engine(
    url: URL, sleep: Sleep, *, connect: Callable[..., Any] = connect_natively, **options: Any
) -> Engine:
    """Make the engine of who is waited for: its transactions are short, and end in any case."""

    def connect_with_deadlines(
        dialect: Any, record: Any, args: Any, options: dict[str, Any]
    ) -> NativeConnection:
        deadlines = {"read_timeout": ANSWER_SECONDS, "write_timeout": ANSWER_SECONDS}
        made: NativeConnection = connect(dialect, record, args, options | deadlines)
        return made

    engine = make_engine(url, sleep, connect=connect_with_deadlines, **options)
    if engine.dialect.name != "sqlite":
        event.listen(engine, "connect", _end_orphans)
    return engine


def _patient_engine(url: URL, sleep: Sleep, **options: Any) -> Engine:
    """Make the engine of a native thread whose queries may take long."""
    return make_engine(url, sleep, connect=connect_natively, **options)


def _end_orphans(connection: Any, _record: Any) -> None:
    # MySQL only knows how to end what is idle outside of a transaction, too: it is made anew
    is_mariadb = "MariaDB" in connection.get_server_info()
    limit = "idle_transaction_timeout" if is_mariadb else "wait_timeout"
    with connection.cursor() as cursor:
        cursor.execute(f"SET SESSION {limit} = {ORPHANED_SECONDS}")


def _set_utc(connection: Any, _record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET time_zone = '+00:00'")


def _sqlite_engine(url: URL, sleep: Sleep, options: dict[str, Any]) -> Engine:
    if url.database and url.database != ":memory:":
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    # The driver does not begin transactions and does not wait for locks: a wait
    # inside SQLite would stop the hub, and with it perhaps who holds the lock.
    engine = create_engine(url, connect_args={"timeout": 0, "isolation_level": None}, **options)
    event.listen(engine, "connect", _set_sqlite_pragmas)
    event.listen(engine, "begin", lambda connection: _begin_immediate(connection, sleep))
    return engine


def _set_sqlite_pragmas(connection: Any, _record: Any) -> None:
    # FULL: what a COMMIT said is there even after the power failed
    connection.execute("PRAGMA busy_timeout = 5000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA busy_timeout = 0")


def _begin_immediate(connection: Connection, sleep: Sleep) -> None:
    """Take the file's write lock, for which SQLite knows no queue: by trying often.

    Transactions are short, so the lock is mostly free within a millisecond; whoever
    holds it for long is asked less and less often.
    """
    if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        return
    driver: Any = connection.connection.dbapi_connection
    start = time.monotonic()
    while True:
        try:
            driver.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as exc:
            waited = time.monotonic() - start
            if "locked" not in str(exc) or waited > LOCK_WAIT_SECONDS:
                raise OperationalError("BEGIN IMMEDIATE", None, exc) from exc
        # 0 only lets others run: a transaction is mostly over before a sleep would be
        pause = 0.0 if waited < 0.0005 else min(waited / 10, 0.005)
        sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - guards no secret


def is_transient(error: BaseException) -> bool:
    """Say whether the same transaction may succeed when it is simply done again."""
    return _code_of(error) in TRANSIENT_CODES


def _is_about_content(error: BaseException) -> bool:
    """Say whether the database answered, and did not like what else is stored or is to be."""
    return _code_of(error) in TRANSIENT_CODES | REFUSING_CODES


def _code_of(error: BaseException) -> Any:
    if isinstance(error, DBAPIError) and error.orig is not None and error.orig.args:
        return error.orig.args[0]
    return None


def _was_lost(error: BaseException | None, began: float) -> bool:
    """Say whether a connection that was kept is found to be lost, and not the server to be away.

    The server was restarted meanwhile, or ended what it took to be idle.
    """
    is_soon = time.monotonic() - began <= KEPT_SECONDS
    return is_soon and bool(getattr(error, "connection_invalidated", False))


class Database:
    """One connection for who alone uses it, made anew after it was lost: a native thread's.

    :param is_patient: nobody who dispatches waits for it, and it may look through all there is.
    :param is_on_hub: it is for greenthreads of the hub, one at a time.
    """

    def __init__(
        self, url: URL, sleep: Sleep, *, is_patient: bool = False, is_on_hub: bool = False
    ) -> None:
        self._sleep = sleep
        self._make_engine = _patient_engine if is_patient else _brief_engine
        if is_on_hub:
            self._make_engine = partial(_brief_engine, connect=connect_on_hub)
        self._engine = self._make_engine(url, sleep)
        self._connection: Connection | None = None
        self._is_durable = True
        self._file: tuple[int, int] | None = None
        self._reader: Connection | None = None
        self._clock = datetime.min
        self._lag = timedelta()
        self._asked_at = -math.inf

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is a file of this machine."""
        return self._engine.dialect.name == "sqlite"

    @property
    def engine(self) -> Engine:
        """The engine, for migrations."""
        return self._engine

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True, reckons: bool = False) -> Iterator[Transaction]:
        """Open a transaction; commit it at the end, or roll it back when something is raised.

        :param durable: whether it has to survive a power failure. What does not is three
            times as fast on SQLite, and survives whatever else happens to the process.
        :param reckons: the time need not be asked for, nor whether the connection lives.
        :raises StoreUnavailableError: when the database does not answer.
        :raises CommitUncertainError: when it went away while committing.
        """
        tx = self._begin(durable, reckons)
        driver = tx.connection.connection.dbapi_connection
        try:
            yield tx
            self._commit(tx.connection)
        except CommitUncertainError:
            raise
        except BaseException as exc:
            if isinstance(driver, NativeConnection) and driver.may_be_committed:
                self.drop_connection()
                reason = str(getattr(exc, "orig", None) or exc)
                raise CommitUncertainError(reason, is_whole=True) from exc
            self._roll_back()
            if isinstance(exc, DBAPIError) and exc.connection_invalidated:
                self.drop_connection()
            if isinstance(exc, OperationalError) and not _is_about_content(exc):
                raise StoreUnavailableError(str(exc.orig)) from exc
            raise

    def run(self, step: Callable[[Transaction], _T], *, durable: bool = True) -> _T:
        """Return what ``step`` returns, done in a transaction; again if it lost a deadlock.

        :raises StoreUnavailableError: as :meth:`transaction`.
        """
        for _ in range(TRANSIENT_TRIES):
            was_kept, began = self._connection is not None, time.monotonic()
            try:
                with self.transaction(durable=durable, reckons=True) as tx:
                    return step(tx)
            except CommitUncertainError:
                raise
            except StoreUnavailableError as exc:
                if not (was_kept and _was_lost(exc.__cause__, began)):
                    raise
            except SQLAlchemyError as exc:
                if not is_transient(exc):
                    raise
        raise StoreUnavailableError(f"lost {TRANSIENT_TRIES} deadlocks in turn")

    def read(self, query: Callable[[Transaction], _T]) -> _T:
        """Return what ``query`` returns, of SELECTs past any transaction: a round trip for each.

        :raises StoreUnavailableError: when the database does not answer.
        """
        was_kept, began = self._reader is not None, time.monotonic()
        try:
            if self._reader is None:
                self._reader = _as_reader(
                    self._make_engine, self._engine.url, self._sleep
                ).connect()
            return query(Transaction(self._reader, self._clock))
        except SQLAlchemyError as exc:
            self._drop_reader()
            if was_kept and _was_lost(exc, began):
                return self.read(query)
            raise StoreUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            with contextlib.suppress(Exception):
                reader.invalidate()
            with contextlib.suppress(Exception):
                reader.close()
            with contextlib.suppress(Exception):
                reader.engine.dispose()

    def ping(self) -> bool:
        """Say whether the database answers. Never raises."""
        try:
            with self.transaction():
                return True
        except StoreUnavailableError:
            return False

    def drop_connection(self) -> None:
        """Forget the connection; the next transaction makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.invalidate()
            with contextlib.suppress(Exception):
                connection.close()

    def close(self) -> None:
        """Close the connection. Never raises."""
        self.drop_connection()
        self._drop_reader()
        with contextlib.suppress(Exception):
            self._engine.dispose()

    def _begin(self, durable: bool, reckons: bool) -> Transaction:
        was_kept, began = self._connection is not None, time.monotonic()
        try:
            connection = self._connect()
            self._set_durable(connection, durable)
            connection.begin()
            return Transaction(connection, self._now(connection, reckons), self._lag)
        except StoreUnavailableError:
            self.drop_connection()
            raise
        except SQLAlchemyError as exc:
            self.drop_connection()
            if was_kept and _was_lost(exc, began):
                return self._begin(durable, reckons)
            raise StoreUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc

    def _connect(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._engine.connect()
            self._is_durable = True
            self._asked_at = -math.inf
            self._file = self._file_now()
        elif self._file != self._file_now():
            # what is stored in a file without a name is gone when this process is
            raise StoreUnavailableError(f"{self._engine.url.database} was removed or replaced")
        return self._connection

    def _now(self, connection: Connection, reckons: bool) -> datetime:
        """Return the database's time: asked for anew once a second, and reckoned in between."""
        if self.is_sqlite:
            return utc_now(connection)
        passed = time.monotonic() - self._asked_at
        if passed > CLOCK_SECONDS or not reckons:
            began = time.monotonic()
            self._clock, self._asked_at, passed = utc_now(connection), time.monotonic(), 0.0
            self._lag = timedelta(milliseconds=int((self._asked_at - began) * 1000))
        return self._clock + timedelta(milliseconds=int(passed * 1000))

    def _file_now(self) -> tuple[int, int] | None:
        """Return what tells the database's file from another of the same name."""
        path = self._engine.url.database
        if not self.is_sqlite or path is None:
            return None
        try:
            found = os.stat(path)  # noqa: PTH116 - at each transaction
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _set_durable(self, connection: Connection, durable: bool) -> None:
        if self.is_sqlite and durable != self._is_durable:
            driver: Any = connection.connection.dbapi_connection
            driver.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._is_durable = durable

    def _commit(self, connection: Connection) -> None:
        driver = connection.connection.dbapi_connection
        try:
            connection.commit()
        except SQLAlchemyError as exc:
            if isinstance(driver, NativeConnection) and driver.was_refused:
                raise
            self.drop_connection()
            raise CommitUncertainError(str(getattr(exc, "orig", None) or exc)) from exc

    def _roll_back(self) -> None:
        try:
            if self._connection is not None:
                self._connection.rollback()
        except SQLAlchemyError:
            self.drop_connection()


def _as_datetime(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def worker_name() -> str:
    """Return ``host:pid``, by which leases and attempts name this process."""
    return f"{os.uname().nodename}:{os.getpid()}"


def exact_now(tx: Transaction) -> datetime:
    """Return the database's time at this moment; :attr:`Transaction.now` may be reckoned."""
    is_exact = tx.connection.dialect.name == "sqlite"
    return tx.now if is_exact else utc_now(tx.connection)


def seconds_between(connection: Connection, start: Any, end: Any) -> ColumnElement[Any]:
    """Return the SQL for the seconds from one time to another, each a column or a time."""
    if connection.dialect.name == "sqlite":
        return (func.julianday(end) - func.julianday(start)) * 86_400.0
    return func.timestampdiff(text("MICROSECOND"), start, end) / 1_000_000.0


def utc_now(connection: Connection) -> datetime:
    """Return the database's time, naive UTC."""
    if (replaced := replaced_utc_now()) is not None:
        return replaced
    # in each transaction: past the machinery that what takes parameters needs
    return _as_datetime(connection.exec_driver_sql(_CLOCKS[connection.dialect.name]).scalar_one())


_CLOCKS = {
    "sqlite": "SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')",
    "mysql": "SELECT UTC_TIMESTAMP(3)",
    "mariadb": "SELECT UTC_TIMESTAMP(3)",
}
