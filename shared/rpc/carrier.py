"""The native thread that carries a service's requests and replies.

One turn of it sends what gathered since the last one, and takes what is there: replies,
and as many requests as there are free workers. Between turns it waits to be woken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from shared.database import database_url, make_engine
from shared.errors import ProviderError, ProviderUnavailableError
from shared.native import Mailbox, Promise, sleep
from shared.native import select as wait_readable
from shared.providers import RpcMessage, RpcTransport
from shared.settings import Settings
from shared.store.migrate import LOG, missing, upgrade_sqlite

LOOK_SECONDS = 5.0
"""How often it looks without being woken: a push may be lost."""

RECONNECT_SECONDS = 0.5
"""How long to wait before a server that went away is tried again."""

MOST_REPLIES = 1000
"""Replies taken at once; more are taken in the next turn."""


@dataclass(slots=True)
class Join:
    """Take requests from a queue, if any, and replies from another; tell the hub once it does."""

    requests: str | None
    replies: str
    workers: int
    on_joined: Callable[[], None]


@dataclass(slots=True)
class Send:
    """Send a message, unless its deadline, a monotonic time, is over.

    :param promise: settled once it is sent or refused; without one it is sent as soon as
        the server answers.
    """

    queue: str
    body: str
    deadline: float
    promise: Promise | None = None

    def message(self) -> RpcMessage:
        """Return what is sent; a request has somebody who hears that it is refused."""
        ttl = self.deadline - monotonic()
        return RpcMessage(self.queue, self.body, ttl, mandatory=self.promise is not None)


@dataclass(slots=True)
class Free:
    """A worker has become free."""


@dataclass(slots=True)
class StopServing:
    """Take no more requests."""


@dataclass(slots=True)
class Finish:
    """Send what is left, and end."""


class RefusedError(Exception):
    """Raised when nobody ever declared the queue of a request."""


class Carrier:
    """See the module's docstring.

    :param on_messages: called on the hub with what was taken.
    :param say: called on the hub with a logging level, a format and its arguments.
    :param on_crash: called on the hub with an exception that nobody expected.
    """

    def __init__(
        self,
        settings: Settings,
        transport: RpcTransport,
        mailbox: Mailbox,
        on_messages: Callable[[list[RpcMessage]], None],
        say: Callable[..., None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._mailbox = mailbox
        self._on_messages = on_messages
        self._say_on_hub = say
        self._on_crash = on_crash
        self._joining: Join | None = None
        self._room = 0
        self._expecting_until = 0.0
        self._outbox: list[Send] = []
        self._is_connected = False
        self._is_in_trouble = False
        self._is_finishing = False
        self._may_have_more = False

    def run(self) -> None:
        """Work until told to finish: the thread's main function."""
        try:
            while not self._is_finishing:
                self._wait()
                self._turn()
        except BaseException as exc:
            self._mailbox.answer(self._on_crash, exc)
        finally:
            self._transport.close()

    def _wait(self) -> None:
        interrupt = self._mailbox.inbox.fileno()
        if not self._is_connected:
            wait_readable([interrupt], [], [], RECONNECT_SECONDS)
        elif not self._may_have_more:
            self._transport.wait(LOOK_SECONDS, interrupt, self._limits())

    def _turn(self) -> None:
        for command in self._mailbox.inbox.take():
            self._obey(command)
        try:
            self._connect()
            self._send()
            self._take()
        except ProviderError as exc:
            self._put_off(exc)

    def _obey(self, command: Join | Send | Free | StopServing | Finish) -> None:
        match command:
            case Join():
                self._joining, self._room = command, command.workers
            case Send():
                self._outbox.append(command)
                if command.promise is not None:
                    self._expecting_until = max(self._expecting_until, command.deadline)
            case Free():
                self._room += 1
            case StopServing():
                self._room = -1 << 30
            case Finish():
                self._is_finishing = True

    # --- the connection

    def _connect(self) -> None:
        if self._is_connected:
            return
        if self._transport.in_log:
            self._prepare_tables()
        self._transport.initialize()
        if self._joining is not None:
            self._join(self._joining)
        self._is_connected = True
        if self._is_in_trouble:
            self._is_in_trouble = False
            self._say(logging.WARNING, "rpc: the provider is reachable again")

    def _join(self, joining: Join) -> None:
        self._transport.declare(joining.replies, lasting=False)
        if joining.requests is not None:
            self._transport.declare(joining.requests, lasting=True)
        self._mailbox.answer(joining.on_joined)

    def _prepare_tables(self) -> None:
        engine = make_engine(database_url(self._settings), sleep)
        try:
            if engine.dialect.name == "sqlite":
                upgrade_sqlite(engine, LOG)
            elif lack := missing(engine, LOG):
                raise ProviderUnavailableError(lack)
        except (SQLAlchemyError, OSError) as exc:
            raise ProviderUnavailableError(str(getattr(exc, "orig", None) or exc)) from exc
        finally:
            engine.dispose()

    def _put_off(self, exc: ProviderError) -> None:
        """Tell who calls that nothing was sent; keep replies until nobody waits for them."""
        if not self._is_in_trouble:
            self._say(logging.ERROR, "rpc: the provider is unreachable: %s", exc)
        self._is_connected, self._is_in_trouble = False, True
        for send in self._outbox:
            if send.promise is not None:
                self._mailbox.answer(send.promise.reject, exc)
        self._outbox = [send for send in self._outbox if send.promise is None]

    # --- messages

    def _send(self) -> None:
        self._outbox = [send for send in self._outbox if send.deadline > monotonic()]
        if not self._outbox:
            return
        try:
            self._send_all(self._outbox)
        except ProviderUnavailableError:
            raise
        except ProviderError:
            self._send_singly()
        self._outbox = []

    def _send_all(self, sends: Sequence[Send]) -> None:
        messages = [send.message() for send in sends]
        refused = self._transport.send(messages)
        for send, message in zip(sends, messages, strict=True):
            if send.promise is None:
                continue
            if message in refused:
                self._mailbox.answer(send.promise.reject, RefusedError(send.queue))
            else:
                self._mailbox.answer(send.promise.resolve, None)

    def _send_singly(self) -> None:
        """Find out which message the server does not take, so that it harms no other."""
        for send in self._outbox:
            try:
                self._send_all([send])
            except ProviderUnavailableError:
                raise
            except ProviderError as exc:
                self._say(logging.ERROR, "rpc: not sent to %s: %s", send.queue, exc)
                if send.promise is not None:
                    self._mailbox.answer(send.promise.reject, exc)

    def _take(self) -> None:
        limits = self._limits()
        taken = self._transport.take(limits)
        self._may_have_more = False
        if not taken or self._joining is None:
            return
        replies = sum(message.queue == self._joining.replies for message in taken)
        self._room -= len(taken) - replies
        self._may_have_more = replies == MOST_REPLIES
        self._mailbox.answer(self._on_messages, taken)

    def _limits(self) -> dict[str, int]:
        """Return what can be taken now from each queue."""
        limits: dict[str, int] = {}
        if self._joining is None:
            return limits
        if self._expecting_until > monotonic():
            limits[self._joining.replies] = MOST_REPLIES
        if self._joining.requests is not None and self._room > 0:
            limits[self._joining.requests] = self._room
        return limits

    def _say(self, level: int, text: str, *args: Any) -> None:
        self._mailbox.answer(self._say_on_hub, level, text, *args)
