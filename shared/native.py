"""Threads beside eventlet's hub.

A handler that burns the processor stops eventlet's hub, and with it every
greenthread; what has to go on meanwhile (renewing leases, above all) runs in a
native thread. Such a thread owns its connections alone: any lock made after
monkey patching is green and must not be contended between threads. So nothing
is shared but two deques and two pipes, and nothing is logged from there. (Libraries ask
for their loggers all the same: see :func:`_share_loggers`.)

The names here are the unpatched ones of the standard library.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import eventlet
from eventlet import hubs, patcher
from eventlet.event import Event

os = patcher.original("os")
poll = patcher.original("select").poll
POLLIN = patcher.original("select").POLLIN
select = patcher.original("select").select
sleep = patcher.original("time").sleep
socket = patcher.original("socket")
_thread = patcher.original("_thread")
_threading = patcher.original("threading")


class Signal:
    """A pipe that one side rings and the other waits for. Rings before a wait are one."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor that is readable once the signal was rung."""
        return self._read

    def ring(self) -> None:
        """Wake who waits; from any thread, and from a signal handler."""
        with contextlib.suppress(BlockingIOError):  # it is full, hence readable already
            os.write(self._write, b"!")

    def clear(self) -> None:
        """Forget the rings so far; a few thousand at once, which is all that a pipe holds."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 1 << 16)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read)
        os.close(self._write)


class Inbox:
    """Commands for one native thread, from any other."""

    def __init__(self) -> None:
        self._commands: deque[Any] = deque()
        self._quiet: deque[Any] = deque()
        self._signal = Signal()

    def fileno(self) -> int:
        """The descriptor that is readable once there are commands."""
        return self._signal.fileno()

    def send(self, command: Any) -> None:
        """Give the thread a command."""
        self._commands.append(command)
        # who put the first one rings for all that come before it is taken
        with contextlib.suppress(IndexError):  # it is taken already
            if self._commands[0] is command:
                self._signal.ring()

    def send_quietly(self, command: Any) -> None:
        """Give the thread a command that it need not wake up for."""
        self._quiet.append(command)

    def take(self) -> list[Any]:
        """Take all commands that gathered."""
        self._signal.clear()
        taken = []
        for commands in (self._commands, self._quiet):
            while commands:
                taken.append(commands.popleft())
        return taken

    def has_commands(self) -> bool:
        """Whether there is something that the thread was woken for, and has not taken yet."""
        return bool(self._commands)

    def has_quiet(self) -> bool:
        """Whether there is something that nobody woke the thread for."""
        return bool(self._quiet)

    def wait(self, timeout: float) -> None:
        """Wait for a command, at most ``timeout`` seconds."""
        select([self._signal.fileno()], [], [], max(0.0, timeout))

    def ring(self) -> None:
        """Wake the thread; from a signal handler, too."""
        self._signal.ring()

    def close(self) -> None:
        """Close the signal."""
        self._signal.close()


class Mailbox:
    """What one native thread and the hub say to each other.

    The hub puts commands and waits for answers as a greenthread waits; the thread
    takes all commands at once, which is what makes a group commit of them.
    """

    def __init__(self) -> None:
        self.inbox = Inbox()
        self._answers: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._to_hub = Signal()
        self._reader: Any = None
        self._is_listening = False

    def send(self, command: Any) -> None:
        """Hub, signal handler or another thread: give a command to the thread."""
        self.inbox.send(command)

    def answer(self, callback: Callable[..., None], *args: Any) -> None:
        """Thread: have ``callback`` called on the hub."""
        self._answers.append((callback, args))
        self._to_hub.ring()

    def rouse(self) -> None:
        """Signal handler: have the hub look round, which else sleeps on after a signal."""
        self._to_hub.ring()

    def open(self) -> None:
        """Hub: start to listen for answers."""
        self._reader = eventlet.spawn(self._listen)

    def close(self) -> None:
        """Hub: hand out what is left and stop listening."""
        self._drain()
        if self._reader is not None:
            self._reader.kill()
        self._to_hub.close()
        self.inbox.close()

    def _listen(self) -> None:
        # told once: to tell the hub anew for each answer takes longer than the answer
        hub = hubs.get_hub()
        fails = eventlet.getcurrent().throw
        listener = hub.add(hub.READ, self._to_hub.fileno(), self._hear, fails, lambda: None)
        try:
            while True:
                self._is_listening = True
                hub.switch()
                self._is_listening = False
                self._drain()
        finally:
            hub.remove(listener)

    def _hear(self, _descriptor: int) -> None:
        self._to_hub.clear()
        # else it is about to look whether there are more answers
        if self._is_listening:
            self._reader.switch()

    def _drain(self) -> None:
        while self._answers:
            callback, args = self._answers.popleft()
            callback(*args)


class Thread:
    """A native thread that a greenthread, or another native thread, can wait for."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self._done = _threading.Event()
        self._target = target
        self._thread = _threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start it."""
        _share_loggers()
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait green for its end, at most ``timeout`` seconds; say whether it ended."""
        with eventlet.Timeout(timeout, False):
            while not self._done.is_set():
                eventlet.sleep(0.002)
        return bool(self._done.is_set())

    def join_natively(self, timeout: float) -> bool:
        """Wait for its end from another native thread; say whether it ended."""
        return bool(self._done.wait(timeout))

    def _run(self) -> None:
        try:
            self._target()
        finally:
            self._done.set()


def _share_loggers() -> None:
    """Have logging's own lock native, which whoever asks for a logger takes, in any thread.

    Monkey patching made it green: a thread that waits for it while the hub holds it waits for
    ever. Nobody holds it for longer than a look into a dict, so the hub may wait for it.
    """
    lock = getattr(logging, "_lock", None)
    if lock is not None and not isinstance(lock, type(_threading.RLock())):
        logging._lock = _threading.RLock()  # type: ignore[attr-defined]


def start_natively(function: Callable[..., None], *args: Any) -> None:
    """Call ``function`` in a native thread; from a signal handler, too: no lock is taken."""
    _thread.start_new_thread(function, args)


class Promise:
    """An answer that a greenthread waits for; fulfilled on the hub."""

    def __init__(self) -> None:
        self._event: Event = Event()

    def resolve(self, value: Any) -> None:
        """Let the waiting greenthread go on with ``value``."""
        if not self._event.ready():
            self._event.send(value)

    def reject(self, error: BaseException) -> None:
        """Raise ``error`` in the waiting greenthread."""
        if not self._event.ready():
            self._event.send_exception(error)

    def wait(self) -> Any:
        """Wait green.

        :raises BaseException: whatever :meth:`reject` was given.
        """
        return self._event.wait()
