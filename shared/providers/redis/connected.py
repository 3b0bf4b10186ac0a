"""What works with a server, and may listen beside it: the provider, and RPC."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import compress
from time import monotonic
from typing import Any

from shared.providers.redis.listener import Listener
from shared.providers.redis.scripts import is_unknown_script, load_scripts
from shared.providers.redis.servers import (
    Server,
    Target,
    connected,
    driver,
    see_that_it_keeps_keys,
    translated,
)
from shared.providers.redis.wire import Command
from shared.settings import Settings

IDLE_SECONDS = 0.5
"""After how long without a command it is looked whether Redis closed the connection; its
``timeout`` has whole seconds."""


class Connected:
    """A mixin: has commands done, and connects for that where it is not connected."""

    settings: Settings
    _server: Server | None = None
    _listener: Listener | None = None
    _asked_at = -math.inf

    @abstractmethod
    def _channels(self) -> set[str]:
        """Return the channels to listen on."""

    def _connect_anew(self) -> None:
        self._disconnect()
        self._connect()

    def _disconnect(self) -> None:
        for each in (self._listener, self._server):
            if each is not None:
                each.close()
        self._listener = self._server = None

    def _connect(self) -> None:
        """Connect and listen, where that is not so."""
        with translated(self.settings, self._disconnect):
            self._connected()

    def _run(self, commands: Sequence[Command]) -> list[Any]:
        """Have commands done in one round trip; return what each answered."""
        if not commands:
            return []
        with translated(self.settings, self._disconnect):
            server = self._connected()
            answers = server.ask(commands)
            unknown = [is_unknown_script(answer) for answer in answers]
            if any(unknown):
                load_scripts(server)
                again = iter(server.ask(list(compress(commands, unknown))))
                answers = [
                    next(again) if is_unknown else answer
                    for answer, is_unknown in zip(answers, unknown, strict=True)
                ]
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
            return answers

    def _connected(self) -> Server:
        idle, self._asked_at = monotonic() - self._asked_at, monotonic()
        if self._server is not None and idle > IDLE_SECONDS and self._was_idle(self._server):
            self._server.close()
            self._server = None
        if self._server is None:
            self._server = connected(Target.of(self.settings))
            see_that_it_keeps_keys(self._server)
            load_scripts(self._server)
        self._listen(self._server)
        return self._server

    def _was_idle(self, server: Server) -> bool:
        """Whether Redis closed the connection for want of commands (its ``timeout``).

        One that was restarted has closed the listener's as well, and may have lost something.
        """
        is_alone = self._listener is None or self._listener.is_closed()
        return server.is_closed() and not (is_alone and self._channels())

    def _listen(self, server: Server) -> None:
        channels = self._channels()
        if not channels:
            return
        if self._listener is None:
            self._listener = Listener(server.new_connection())
        self._listener.subscribe(channels)

    @contextlib.contextmanager
    def _deaf_on_errors(self) -> Iterator[None]:
        """Have the next command listen anew, or say what is wrong."""
        try:
            yield
        except (driver().exceptions.RedisError, OSError):
            if self._listener is not None:
                self._listener.close()
            self._listener = None

    def _hear(self) -> None:
        """Forget what was heard so far: whoever looks now finds it."""
        if self._listener is not None:
            with self._deaf_on_errors():
                self._listener.forget()
