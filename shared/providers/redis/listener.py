"""Who hears by pub/sub which subscriptions have something new."""

from __future__ import annotations

from collections.abc import Set
from time import monotonic
from typing import Any

from shared.native import select as wait_readable
from shared.providers.redis.servers import is_closed

PING_SECONDS = 10.0
"""How often a listener that hears nothing asks whether anybody is there."""


class Listener:
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

    def is_closed(self) -> bool:
        """Say whether Redis has closed the connection."""
        return is_closed(self._connection)

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
