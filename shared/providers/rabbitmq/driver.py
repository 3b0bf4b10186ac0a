"""py-amqp, with what it lacks: batches, deadlines, heartbeats, and answers in their order."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from struct import unpack_from
from time import monotonic
from typing import Any, Protocol

import amqp
from amqp import spec
from amqp.transport import SSLTransport, TCPTransport
from eventlet import patcher
from kombu.utils.url import parse_url

from shared.errors import ProviderError, ProviderUnavailableError
from shared.native import select as wait_ready
from shared.types import SettleAction

CONNECT_SECONDS = 3.0
"""How long a server may take to take a connection: it then is on another continent."""

ANSWER_SECONDS = 10.0
"""How long an answer may take; while many messages are confirmed, each time until the next."""

CLOSE_SECONDS = 1.0
"""How long a server may take to agree to the end of a connection."""

HEARTBEAT_SECONDS = 15
"""Whose host froze has lost its leases after twice this; RabbitMQ advises against less than 5."""

READ_BYTES = 1 << 16

DRIVER_ERRORS = (amqp.AMQPError, OSError)


class Receiver(Protocol):
    """Who is told what arrives on a channel that consumes."""

    def on_delivered(self, consumer_tag: str, tag: int, again: bool, *rest: Any) -> None:
        """Something was pushed; the message comes last."""

    def on_got(self, *answer: Any) -> None:
        """What was asked for came, the message last; or one value says that there is none."""

    def on_cancelled(self, consumer_tag: str) -> None:
        """RabbitMQ ended a consumer: its queue was deleted, or moved to another node."""

    def on_cancel_ok(self, consumer_tag: str) -> None:
        """A consumer is ended; nothing more is pushed for it."""

    def on_qos_ok(self) -> None:
        """A limit is set."""


class Blocked(Exception):  # noqa: N818 - never leaves the provider
    """Raised when RabbitMQ takes no messages for the time being."""


class Channel(amqp.Channel):
    """A channel that stays closed once RabbitMQ closed it, and leaves bodies as bytes."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection, auto_decode=False)

    def _on_close(self, reply_code: int, reply_text: str, class_id: int, method_id: int) -> None:
        self.send_method(spec.Channel.CloseOk)
        self.collect()
        raise amqp.exceptions.error_for_code(
            reply_code, reply_text, (class_id, method_id), amqp.ChannelError
        )


class ConfirmingChannel(Channel):
    """A channel that publishes, and knows what RabbitMQ has confirmed."""

    def __init__(self, connection: Connection) -> None:
        self.sent = 0
        self.nacked: set[int] = set()
        self.returned: set[tuple[str, str, str]] = set()
        # in their order, by the number that RabbitMQ gives them
        self._unconfirmed: dict[int, None] = {}
        super().__init__(connection)

    def publish(self, message: Any, exchange: str, routing_key: str, mandatory: bool) -> None:
        """Write a message; ``wait_for_confirms`` says when RabbitMQ has it."""
        self.sent += 1
        self._unconfirmed[self.sent] = None
        args = (0, exchange, routing_key, mandatory, False)
        self.send_method(spec.Basic.Publish, "Bssbb", args, message)

    def wait_for_confirms(self, first: int) -> None:
        """Return once all since number ``first`` are confirmed."""
        connection = self.connection
        while (left := self._unconfirmed_since(first)) > 0:
            with connection.within(ANSWER_SECONDS):
                while self._unconfirmed_since(first) == left:
                    connection.refuse_if_blocked()
                    connection.drain_events()

    def _unconfirmed_since(self, first: int) -> int:
        if not self._unconfirmed or next(reversed(self._unconfirmed)) < first:
            return 0
        return len(self._unconfirmed)

    def _setup_listeners(self) -> None:
        super()._setup_listeners()
        self._callbacks |= {
            spec.Basic.Ack: self._on_confirmed,
            spec.Basic.Nack: self._on_nacked,
            spec.Basic.Return: self._on_returned,
        }

    def _on_confirmed(self, number: int, is_multiple: bool) -> None:
        self._confirmed(number, is_multiple)

    def _on_nacked(self, number: int, is_multiple: bool) -> None:
        self.nacked.update(self._confirmed(number, is_multiple))

    def _confirmed(self, number: int, is_multiple: bool) -> list[int]:
        numbers = [number]
        if is_multiple:
            numbers = list(takewhile(lambda each: each <= number, self._unconfirmed))
        for each in numbers:
            self._unconfirmed.pop(each, None)
        return numbers

    def _on_returned(self, *answer: Any) -> None:
        _, _, exchange, routing_key, message = answer
        self.returned.add((exchange, routing_key, message.properties.get("message_id") or ""))


class ConsumingChannel(Channel):
    """A channel that asks for messages and settles them, without waiting for answers."""

    def __init__(self, connection: Connection, owner: Receiver) -> None:
        self._owner = owner
        super().__init__(connection)

    def get(self, queue: str, is_acknowledged: bool = True) -> None:
        self.send_method(spec.Basic.Get, "Bsb", (0, queue, not is_acknowledged))

    def consume(
        self,
        queue: str,
        tag: str,
        window: int,
        is_acknowledged: bool,
        arguments: Mapping[str, Any],
    ) -> None:
        self.limit(window)
        args = (0, queue, tag, False, not is_acknowledged, False, True, arguments)
        self.send_method(spec.Basic.Consume, "BssbbbbF", args)

    def limit(self, window: int) -> None:
        """Say how many unsettled messages whoever consumes from now on may have."""
        self.send_method(spec.Basic.Qos, "lBb", (0, window, False))

    def cancel(self, tag: str) -> None:
        self.send_method(spec.Basic.Cancel, "sb", (tag, False))

    def settle(self, tag: int, action: SettleAction) -> None:
        if action is SettleAction.ACKNOWLEDGE:
            self.send_method(spec.Basic.Ack, "Lb", (tag, False))
        else:
            self.send_method(spec.Basic.Reject, "Lb", (tag, action is SettleAction.RELEASE))

    def _setup_listeners(self) -> None:
        super()._setup_listeners()
        listeners: dict[Any, Callable[..., None]] = {
            spec.Basic.Deliver: self._owner.on_delivered,
            spec.Basic.GetOk: self._owner.on_got,
            spec.Basic.GetEmpty: self._owner.on_got,
            spec.Basic.Cancel: self._owner.on_cancelled,
            spec.Basic.CancelOk: self._owner.on_cancel_ok,
            spec.Basic.QosOk: self._owner.on_qos_ok,
        }
        self._callbacks |= listeners


class Connection(amqp.Connection):
    """A connection that gathers what it sends, and never waits without an end."""

    def __init__(self, target: Target, purpose: str) -> None:
        self.is_blocked = False
        self._deadline = math.inf
        self._read_at = self._written_at = monotonic()
        super().__init__(
            target.host,
            target.user,
            target.password,
            login_method="PLAIN",
            virtual_host=target.vhost,
            ssl=target.tls,
            connect_timeout=CONNECT_SECONDS,
            heartbeat=HEARTBEAT_SECONDS,
            client_properties={"connection_name": f"event suite, {purpose}"},
            on_blocked=self._on_alarm,
            on_unblocked=self._on_alarm_over,
        )

    def Transport(  # noqa: N802 - py-amqp's own name
        self, host: str, connect_timeout: float, ssl: Any, *_: Any, **options: Any
    ) -> Any:
        kind = _TLSTransport if ssl else _TCPTransport
        return kind(host, connect_timeout=connect_timeout, ssl=ssl, **options)

    def fileno(self) -> int:
        """The descriptor that is readable when something arrived."""
        return int(self.transport.sock.fileno())

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Have whatever is waited for within the block end by then, all together."""
        before = self._deadline
        self._deadline = min(before, monotonic() + seconds)
        try:
            yield
        finally:
            self._deadline = before

    def poll(self) -> None:
        """Take in what has arrived, without waiting."""
        self._dispatch_arrived()
        while self.transport is not None and self.transport.is_readable():
            self._fill()
            self._dispatch_arrived()

    def flush(self) -> bool:
        """Send what gathered; return whether anything was taken in meanwhile."""
        taken_in = False
        while self.transport.unsent:
            readable, writable, _ = wait_ready([self.fileno()], [self.fileno()], [], self._left())
            if writable:
                self.transport.send_some()
                self._written_at = monotonic()
            elif readable:
                # RabbitMQ may wait for us, before it reads on
                self._fill()
                taken_in = self._dispatch_arrived() or taken_in
                self.refuse_if_blocked()
            else:
                self._left()
        return taken_in

    def blocking_read(self, timeout: float | None = None) -> Any:
        if self.flush():
            return True
        frame = self.transport.next_frame()
        while frame is None:
            self._fill(timeout)
            frame = self.transport.next_frame()
        return self._take_in(frame)

    def beat(self) -> None:
        """Send a heartbeat when it is time to, and see that the other side does."""
        if not self.heartbeat:
            return
        now = monotonic()
        if now > self._read_at + 2 * self.heartbeat:
            raise TimeoutError(f"nothing was heard of it for {2 * self.heartbeat} s")
        if now >= self.next_beat:
            self.send_heartbeat()
            self.flush()

    @property
    def next_beat(self) -> float:
        """When a heartbeat has to be sent, as monotonic time."""
        return self._written_at + self.heartbeat / 2 if self.heartbeat else math.inf

    def refuse_if_blocked(self) -> None:
        """See that RabbitMQ takes messages.

        :raises Blocked: when it does not.
        """
        if self.is_blocked:
            raise Blocked

    def end(self) -> None:
        """Close it in order, if that is possible at once. Never raises."""
        with contextlib.suppress(Exception), self.within(CLOSE_SECONDS):
            if self.connected and not self.is_blocked:
                self.close()
        with contextlib.suppress(Exception):
            self.collect()

    def _dispatch_arrived(self) -> bool:
        """Take in the frames that are complete; return whether there were any."""
        count = 0
        while self.transport is not None and (frame := self.transport.next_frame()) is not None:
            self._take_in(frame)
            count += 1
        return count > 0

    def _take_in(self, frame: tuple[int, int, bytes]) -> Any:
        """Take in a frame; a message without its properties, where py-amqp cannot read them."""
        try:
            return self.on_inbound_frame(frame)
        except Exception:
            kind, channel, data = frame
            if kind != _HEADER_FRAME or _has_readable_properties(data):
                raise
            return self.on_inbound_frame((kind, channel, data[:_PROPERTIES_AT] + b"\0\0"))

    def _fill(self, timeout: float | None = None) -> None:
        self.transport.fill(self._left() if timeout is None else timeout)
        self._read_at = monotonic()

    def _left(self) -> float:
        left = min(self._deadline - monotonic(), ANSWER_SECONDS)
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left

    def _on_alarm(self, reason: str) -> None:
        self.is_blocked = True

    def _on_alarm_over(self) -> None:
        self.is_blocked = False


_HEADER_FRAME, _PROPERTIES_AT = 2, 12
"""Frames that begin a message, and where its properties begin in them: AMQP 0-9-1, 4.2.6.1."""


def _has_readable_properties(data: bytes) -> bool:
    try:
        amqp.Message().inbound_header(data)
    except Exception:
        return False
    return True


class _Gathering:
    """A transport that gathers what is written, and reads as much as there is.

    py-amqp's own way is a call of the system for each frame written, and three for each read.
    """

    sock: Any
    _quick_recv: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        self.unsent = bytearray()
        self._arrived = b""
        self._place = 0
        super().__init__(*args, **options)

    def write(self, data: Any) -> None:
        self.unsent += data

    def send_some(self) -> None:
        """Send as much as fits, which is something."""
        del self.unsent[: self.sock.send(bytes(self.unsent[:READ_BYTES]))]

    def fill(self, seconds: float) -> None:
        """Read what has arrived, and wait for something if nothing has."""
        data = self._received(seconds)
        if not data:
            raise ConnectionError("it closed the connection")
        self._arrived = self._arrived[self._place :] + data
        self._place = 0

    def next_frame(self) -> tuple[int, int, bytes] | None:
        """Return the next frame, if all of it has arrived."""
        data, place = self._arrived, self._place
        if len(data) < place + 8:
            return None
        kind, channel, size = unpack_from(">BHI", data, place)
        end = place + 7 + size
        if len(data) <= end:
            return None
        if data[end] != 0xCE:
            raise amqp.exceptions.UnexpectedFrame(f"a frame ends with {data[end]:#04x}")
        self._place = end + 1
        return kind, channel, data[place + 7 : end]

    def is_readable(self, seconds: float = 0.0) -> bool:
        """Say whether ``fill`` would find something within so many seconds."""
        return bool(wait_ready([self.sock.fileno()], [], [], seconds)[0])

    def _received(self, seconds: float) -> bytes:
        # to wait within eventlet's socket would take this thread a hub of its own
        if not self.is_readable(seconds):
            raise TimeoutError("timed out")
        data: bytes = self._quick_recv(READ_BYTES)
        return data


class _TCPTransport(_Gathering, TCPTransport):
    """Such a transport on a plain socket."""


class _TLSTransport(_Gathering, SSLTransport):
    """Such a transport with TLS."""

    def is_readable(self, seconds: float = 0.0) -> bool:
        return bool(self.sock.pending()) or super().is_readable(seconds)

    def _received(self, seconds: float) -> bytes:
        # what is readable may be less than a record
        with self.having_timeout(seconds):
            data: bytes = self._quick_recv(READ_BYTES)
        return data


@dataclass(frozen=True, slots=True)
class Target:
    """Where a RabbitMQ is, and who we are there."""

    host: str
    user: str
    password: str = field(repr=False)
    vhost: str
    tls: Any

    def __str__(self) -> str:
        return self.host


def targets_of(uri: str) -> list[Target]:
    """Return what a URI names, of which any will do."""
    return [_target(each) for each in uri.split(";")]


def _target(uri: str) -> Target:
    parts = parse_url(uri)
    is_tls = parts["transport"].endswith("amqps")
    name = parts["hostname"]
    host = f"[{name}]" if ":" in name else name
    # the name can be checked only of a certificate that is checked
    named = {} if _is_unchecked(parts) else {"server_hostname": name}
    options = {key.removeprefix("ssl_"): x for key, x in (parts.get("ssl") or {}).items()}
    return Target(
        f"{host}:{parts['port'] or (5671 if is_tls else 5672)}",
        parts["userid"] or "guest",
        parts["password"] or "guest",
        parts["virtual_host"] or "/",
        {**named, **options} if is_tls else False,
    )


def _is_unchecked(parts: Mapping[str, Any]) -> bool:
    return (parts.get("ssl") or {}).get("ssl_cert_reqs") == ssl.CERT_NONE


def connected(targets: Sequence[Target], purpose: str) -> Connection:
    """Connect to the first that answers."""
    trouble: Exception | None = None
    for target in targets:
        try:
            return _connected_to(target, purpose)
        except OSError as exc:
            trouble = exc
    assert trouble is not None  # noqa: S101 - there is a target, by the settings
    raise trouble


def _connected_to(target: Target, purpose: str) -> Connection:
    connection = Connection(target, purpose)
    try:
        connection.connect()
    except BaseException:
        connection.end()
        raise
    return connection


def meaning_of(exc: Exception) -> tuple[type[ProviderError], str]:
    """Return which of our errors one of the driver's is, and what to say."""
    text = " ".join(str(getattr(exc, "reply_text", None) or exc).split())
    if isinstance(exc, ConnectionError) and exc.errno:
        # eventlet's has the name of the number alone
        text = os.strerror(exc.errno)
    if isinstance(exc, amqp.AccessRefused) and "login" in text.lower():
        return ProviderError, "user or password refused"
    if isinstance(exc, amqp.AccessRefused):
        return ProviderError, f"the user may not do this: {text}"
    if isinstance(exc, amqp.NotAllowed):
        return ProviderError, f"the virtual host is refused: {text}"
    if isinstance(exc, amqp.ResourceLocked):
        return ProviderUnavailableError, f"an older connection still has it: {text}"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return ProviderError, f"its certificate is refused: {text}"
    # 541: a queue's node, or its process there, is just starting
    if isinstance(exc, OSError | amqp.RecoverableConnectionError | amqp.InternalError):
        return ProviderUnavailableError, text or type(exc).__name__
    return ProviderError, text or type(exc).__name__


def keep_silent_in_threads() -> None:
    """Have py-amqp log nothing in a native thread, where it would contend for green locks."""
    logger = logging.getLogger("amqp")
    if _is_of_the_hub not in logger.filters:
        logger.addFilter(_is_of_the_hub)
    for level in (logging.DEBUG, logging.WARNING):
        # the first question takes a lock; it is asked here
        logger.isEnabledFor(level)


def _is_of_the_hub(_record: logging.LogRecord) -> bool:
    native = patcher.original("threading")
    return bool(native.current_thread() is native.main_thread())
