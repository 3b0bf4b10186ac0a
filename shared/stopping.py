"""How a process ends when it is asked to: in order, within a time, whatever its handlers do.

nameko stops its services on the hub, which a handler that burns the processor keeps busy. So
whatever has a native thread of its own is given a deadline besides, by which it hands back what
it has; and a thread sees to it that the process then ends. One deadline holds for all services
of a process: none ends it before the others have handed back as well.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from shared.native import sleep, start_natively

SLACK_SECONDS = 1.0
"""How long after the grace time the hub may take to hand back what still runs."""

LAST_SECONDS = 5.0
"""How long handing back may take after that, should the database not answer."""

LOOK_SECONDS = 0.02


class Part(Protocol):
    """What has to end before the process does."""

    is_over: bool
    """Whether it has handed back all that it had."""

    def die_by(self, deadline: float) -> None:
        """Signal handler: hand back everything at ``deadline``, a monotonic time."""


class Stopper:
    """Stops the process at SIGTERM and SIGINT; at a second one at once.

    It does nothing where nobody stops services at SIGTERM: what runs containers of its own,
    such as a test, has signals of its own.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Part, float]] = []
        self._rousers: list[Callable[[], None]] = []
        self._stop: Callable[[int, Any], Any] | None = None
        self._is_stopping = False
        self._deadline = 0.0

    def add(self, rouse: Callable[[], None], part: Part | None = None, grace: float = 0.0) -> None:
        """Have the hub roused by a signal, and a part handed back in time.

        :param rouse: makes the hub look round, which else sleeps on after a signal.
        :param grace: seconds for which what runs may go on.
        """
        self._rousers.append(rouse)
        if part is not None:
            self._parts.append((part, grace))
        before = signal.getsignal(signal.SIGTERM)
        if callable(before) and before != self._on_signal:
            self._stop = before
            signal.signal(signal.SIGTERM, self._on_signal)
            # it would be raised in whatever handler runs at that moment
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._on_signal)

    def remove(self, rouse: Callable[[], None], part: Part | None = None) -> None:
        """Forget what has ended: nothing of it is open any more."""
        self._rousers = [each for each in self._rousers if each != rouse]
        self._parts = [each for each in self._parts if each[0] is not part]

    def _on_signal(self, _number: int, frame: Any) -> None:
        is_second, self._is_stopping = self._is_stopping, True
        grace = max([each + SLACK_SECONDS for _, each in self._parts], default=0.0)
        self._deadline = monotonic() + (0.0 if is_second else grace)
        parts = [part for part, _ in self._parts]
        for part in parts:
            part.die_by(self._deadline)
        if not is_second:
            if parts:
                start_natively(self._see_to_it, parts)
            if self._stop is not None:
                self._stop(signal.SIGTERM, frame)
        for rouse in self._rousers:
            rouse()

    def _see_to_it(self, parts: list[Part]) -> None:
        """Native thread: end the process, should it not end by itself."""
        while monotonic() < self._deadline:
            sleep(LOOK_SECONDS)
        last = self._deadline + LAST_SECONDS
        while monotonic() < last and not all(part.is_over for part in parts):
            sleep(LOOK_SECONDS)
        os.write(2, b"time is over: what still ran was handed back\n")
        os._exit(0)


stopper = Stopper()
"""That of this process."""
