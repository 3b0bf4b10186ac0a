"""Connections to MySQL and MariaDB: pymysql's.

Those of native threads, and that of a dispatch, take fewer round trips.

Each round trip wakes the server and then this thread again, which for small statements
takes longer than their work. So statements whose result nobody waits for travel with the
next one that has a result, or with the COMMIT, and the COMMIT with the last of them. And
sockets are native: waiting by a hub of the thread's own takes twice as long.
"""

from __future__ import annotations

import contextlib
import socket as green_socket
import ssl
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from functools import cache
from struct import Struct, pack
from typing import Any

from pymysql.connections import MAX_PACKET_LEN, Connection
from pymysql.constants import CLIENT, COMMAND, CR, FIELD_TYPE, SERVER_STATUS
from pymysql.converters import escape_string
from pymysql.err import MySQLError, OperationalError, raise_mysql_exception

from shared.native import POLLIN, poll, socket

MOST_WAITING_BYTES = 1_000_000
"""How much may travel together; a server takes 16 MB unless it is told otherwise."""

_BINARY = 63
"""The number of the character set of what is no text."""

_HEAD = Struct("<HBB")
"""What a packet begins with: its size in three bytes, and its number."""

_OK, _END, _ERROR = 0x00, 0xFE, 0xFF
"""What a packet of that kind begins with."""

_AT_ONCE = 1 << 16
"""How many bytes are asked for at once, at least."""

_NO_BACKSLASHES = SERVER_STATUS.SERVER_STATUS_NO_BACKSLASH_ESCAPES


class PlainConnection(Connection):
    """A connection for the hub, or for who has none.

    A server that offers TLS gets it. As with pymysql, nobody's certificate is checked unless the
    URL says whom to trust; so, unlike pymysql, nobody's is loaded.
    """

    def _create_ssl_ctx(self, options: dict[str, Any]) -> ssl.SSLContext:
        if not options:
            return _encrypting()
        made: ssl.SSLContext = super()._create_ssl_ctx(options)
        return made


@cache
def _encrypting() -> ssl.SSLContext:
    """Return what encrypts for whoever answers.

    To load the system's certificates takes 25 ms, longer than all the rest of a connection.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class _Punctual:
    """Makes TLS sockets that give up after so many seconds, in the handshake, too.

    What reads TLS goes on when the kernel's deadline is over, so they have one of their own.
    """

    def __init__(self, context: ssl.SSLContext, seconds: float | None) -> None:
        self._context = context
        self._seconds = seconds

    def wrap_socket(self, sock: Any, **options: Any) -> ssl.SSLSocket:
        made = self._context.wrap_socket(sock, do_handshake_on_connect=False, **options)
        made.settimeout(self._seconds)
        try:
            made.do_handshake()
        except BaseException:
            made.close()  # nobody else has it
            raise
        return made


class NativeConnection(PlainConnection):
    """A connection for one native thread.

    The statements of a COMMIT that fails may have failed before it, or not have been sent: then
    :attr:`was_refused` says that nothing of the transaction is stored.
    """

    _next_seq_id: int

    def __init__(self, *args: Any, **options: Any) -> None:
        self.was_refused = False
        self._is_committed = False
        self.may_be_committed = False
        """Whether a COMMIT went out with the last statement, and was not refused."""
        self._waiting: list[str] = []
        self._waiting_bytes = 0
        self._received, self._place = b"", 0
        self._answer_seconds: float | None = options.get("read_timeout")
        self._deadlines = self._taken_deadlines(options)
        flags = options.pop("client_flag", 0) | CLIENT.MULTI_STATEMENTS
        super().__init__(*args, client_flag=flags, **options)

    def connect(self, sock: Any = None) -> None:
        self._forget()
        self._received, self._place = b"", 0
        super().connect(sock or self._connected_socket())
        self._watched = poll()
        self._watched.register(self._sock.fileno(), POLLIN)

    def _create_ssl_ctx(self, options: dict[str, Any]) -> Any:
        return _Punctual(super()._create_ssl_ctx(options), self._answer_seconds)

    def later(self, sql: str) -> None:
        """Have a statement executed before the next one; should it fail, that one says so."""
        if self._waiting_bytes + len(sql) > MOST_WAITING_BYTES and self._waiting:
            self.query(self._waiting.pop())
        self._waiting.append(sql)
        self._waiting_bytes += len(sql)

    def query(self, sql: str | bytes, unbuffered: bool = False) -> int:
        self._send(sql)
        self._affected_rows: int = self._read_query_result(unbuffered=unbuffered)
        return self._affected_rows

    def fetch(self, sql: str) -> list[list[Any]]:
        """Execute a statement; return its rows."""
        self._send(sql)
        return self._read_rows()

    def fetch_and_commit(self, sql: str) -> list[list[Any]]:
        """Execute a statement, the last of its transaction; return its rows.

        The :meth:`commit` that follows has nothing left to do.
        """
        self._raise_if_gone()
        self.was_refused, self.may_be_committed = False, True
        try:
            self._send(f"{sql};\nCOMMIT")
            rows = self._read_rows()
        except MySQLError as exc:
            self._refuse(exc)
            raise
        self._skip_result()
        self._is_committed = True
        return rows

    def literal(self, value: Any) -> str:
        """Return a value as it stands in a statement; the usual ones past pymysql's many checks."""
        if value is None:
            return "NULL"
        if type(value) is int:
            return str(value)
        if isinstance(value, str) and not self.server_status & _NO_BACKSLASHES:
            return f"'{escape_string(value)}'"
        if type(value) is datetime and value.tzinfo is None:
            return f"'{value.isoformat(' ')}'"
        written: str = self.escape(value)
        return written

    def _read_rows(self) -> list[list[Any]]:
        first = self._read()
        if first[0] == _OK:
            return []
        readers = [_reader_of(self._read()) for _ in range(first[0])]
        self._read()  # the end of the fields
        rows = []
        while not _is_end(packet := self._read()):
            rows.append(
                [
                    value if value is None or read is None else read(value)
                    for value, read in zip(_parted(packet), readers, strict=True)
                ]
            )
        return rows

    def _skip_result(self) -> None:
        """Read the result of a statement that nobody waits for."""
        if self._read()[0] == _OK:
            return
        for _ in ("fields", "rows"):
            while not _is_end(self._read()):
                pass

    def _read(self) -> bytes:
        """Read a packet as ``_read_packet`` does, which makes an object of each.

        :raises MySQLError: what the server says, or that the connection is lost.
        """
        data, is_whole = b"", False
        while not is_whole:
            low, high, number = _HEAD.unpack(self._read_bytes(_HEAD.size))
            if number != self._next_seq_id:
                self._force_close()
                raise OperationalError(CR.CR_SERVER_LOST, "Lost connection to MySQL server")
            self._next_seq_id = (number + 1) % 256
            size = low + (high << 16)
            data += self._read_bytes(size)
            is_whole = size < MAX_PACKET_LEN
        if data[0] == _ERROR:
            raise_mysql_exception(data)
        return data

    def _read_bytes(self, num_bytes: int) -> bytes:
        """Return so many bytes of what was received: of one call of the kernel, most often.

        :raises OperationalError: when the connection is lost, or nothing came in time.
        """
        end = self._place + num_bytes
        if end > len(self._received):
            self._receive(end - len(self._received))
            end = num_bytes
        data = self._received[self._place : end]
        self._place = end
        return data

    def _receive(self, missing: int) -> None:
        parts = [self._received[self._place :]]
        while missing > 0:
            why = ""
            try:
                part = self._receive_part(max(missing, _AT_ONCE))
            except BlockingIOError:
                part, why = b"", " (timed out)"
            except OSError as exc:
                part, why = b"", f" ({exc})"
            if not part:
                self._force_close()
                text = f"Lost connection to MySQL server during query{why}"
                raise OperationalError(CR.CR_SERVER_LOST, text)
            parts.append(part)
            missing -= len(part)
        self._received, self._place = b"".join(parts), 0

    def _receive_part(self, most: int) -> bytes:
        part: bytes = self._sock.recv(most)
        return part

    def commit(self) -> None:
        if self._is_committed:
            self._is_committed = self.may_be_committed = False
            return
        self.was_refused = False
        try:
            self._send("COMMIT")
        except MySQLError as exc:
            self._refuse(exc)
            raise
        self._read_query_result()

    def _raise_if_gone(self) -> None:
        """Find out that the server ended the connection, as long as it is sure to get nothing.

        :raises OperationalError: when it did.
        """
        if self.open and self._watched.poll(0):
            self._force_close()
            raise OperationalError(CR.CR_SERVER_GONE_ERROR, "MySQL server has gone away")

    def _refuse(self, error: MySQLError) -> None:
        """Note that nothing of the transaction is stored; unless nobody knows what became of it."""
        # what could not be written to its end is executed by no server
        is_unsent = error.args[0] == CR.CR_SERVER_GONE_ERROR
        if self.open or is_unsent:
            self.was_refused, self.may_be_committed = True, False
        if self.open:
            with contextlib.suppress(MySQLError):
                self.rollback()

    def rollback(self) -> None:
        self._forget()
        self._is_committed = self.may_be_committed = False
        super().rollback()

    def _send(self, sql: str | bytes) -> None:
        """Send what waits, and a statement; read the results but that of the latter."""
        if self._is_committed:
            raise RuntimeError("its COMMIT went with the statement before this one")
        waiting = self._waiting
        self._forget()
        if waiting:
            text = sql if isinstance(sql, str) else bytes(sql).decode(self.encoding)
            sql = ";\n".join([*waiting, text])
        data = sql.encode(self.encoding) if isinstance(sql, str) else sql
        self._execute_command(COMMAND.COM_QUERY, data)
        for _ in waiting:
            self._skip_result()
        self._result = None

    def _forget(self) -> None:
        self._waiting, self._waiting_bytes = [], 0

    def _open_socket(self) -> Any:
        return socket.create_connection((self.host, self.port), self.connect_timeout)

    def _connected_socket(self) -> Any:
        try:
            made = self._open_socket()
        except OSError as exc:
            where = f"Can't connect to MySQL server on {self.host!r} ({exc})"
            raise OperationalError(CR.CR_CONN_HOST_ERROR, where) from exc
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in self._deadlines.items():
            if seconds is not None:
                made.setsockopt(socket.SOL_SOCKET, option, _timeval(seconds))
        return made

    def _taken_deadlines(self, options: dict[str, Any]) -> dict[int, float | None]:
        """Take what the kernel is to keep: for Python's own it is asked before each call."""
        return {
            socket.SO_RCVTIMEO: options.pop("read_timeout", None),
            socket.SO_SNDTIMEO: options.pop("write_timeout", None),
        }


class HubConnection(NativeConnection):
    """A connection that takes as few round trips, for the hub: others go on while it waits."""

    def _open_socket(self) -> Any:
        return green_socket.create_connection((self.host, self.port), self.connect_timeout)

    def _taken_deadlines(self, _options: dict[str, Any]) -> dict[int, float | None]:
        return {}  # green sockets keep those of pymysql

    def _receive_part(self, most: int) -> bytes:
        try:
            return super()._receive_part(most)
        except TimeoutError:
            # who held up the hub for that long kept it from seeing what came meanwhile
            self._sock.settimeout(0)
            part = super()._receive_part(most)
            self._sock.settimeout(self._answer_seconds)
            return part


def connect_plainly(
    _dialect: Any, _record: Any, _args: Any, options: dict[str, Any]
) -> PlainConnection:
    """SQLAlchemy's event: make such a connection."""
    return PlainConnection(**options)


def connect_natively(
    _dialect: Any, _record: Any, _args: Any, options: dict[str, Any]
) -> NativeConnection:
    """SQLAlchemy's event: make a connection for a native thread."""
    return NativeConnection(**options)


def connect_on_hub(
    _dialect: Any, _record: Any, _args: Any, options: dict[str, Any]
) -> HubConnection:
    """SQLAlchemy's event: make a connection for the hub."""
    return HubConnection(**options)


def _timeval(seconds: float) -> bytes:
    """Return a time as setsockopt(2) takes it."""
    return pack("ll", int(seconds), int(seconds % 1 * 1_000_000))


def _is_end(packet: bytes) -> bool:
    # a row may begin so, too, with the length of a long value
    return packet[0] == _END and len(packet) < 9


def _text(value: bytes) -> str:
    return value.decode()


def _time(value: bytes) -> datetime:
    return datetime.fromisoformat(value.decode())


_READERS: dict[int, Callable[[bytes], Any]] = {
    FIELD_TYPE.TINY: int,
    FIELD_TYPE.SHORT: int,
    FIELD_TYPE.LONG: int,
    FIELD_TYPE.LONGLONG: int,
    FIELD_TYPE.NEWDECIMAL: lambda value: Decimal(value.decode()),
    FIELD_TYPE.DATETIME: _time,
    FIELD_TYPE.TIMESTAMP: _time,
    FIELD_TYPE.JSON: _text,
}


def _reader_of(field: bytes) -> Callable[[bytes], Any] | None:
    """Return what reads a field's values, by the end of its description."""
    kind, charset = field[-6], int.from_bytes(field[-12:-10], "little")
    return _READERS.get(kind, None if charset == _BINARY else _text)


def _parted(row: bytes) -> list[bytes | None]:
    """Part a row of the text protocol into its values: each is its length, and itself."""
    values: list[bytes | None] = []
    place, end = 0, len(row)
    while place < end:
        length = row[place]
        place += 1
        if length == 251:
            values.append(None)
            continue
        if length > 251:
            size = {252: 2, 253: 3, 254: 8}[length]
            length = int.from_bytes(row[place : place + size], "little")
            place += size
        values.append(row[place : place + length])
        place += length
    return values
