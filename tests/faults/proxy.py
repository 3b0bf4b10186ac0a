"""A small TCP proxy between a process and a server, which does to bytes what networks do.

Its threads are native ones, beside eventlet's hub: so no fault keeps another from its end.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from eventlet import patcher

from shared.native import sleep, socket

threading = patcher.original("threading")

HOST = "127.0.0.1"

READ_BYTES = 1 << 16

LATE_SECONDS = 0.5
"""How much later than its client is gone something arrives."""

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing sends a reset."""


class Proxy:
    """Listens on a port of its own and passes on to a server, as long as it is let.

    :param port: the server's, on this machine.
    """

    def __init__(self, port: int) -> None:
        self._server = (HOST, port)
        self._pipes: list[Pipe] = []
        self._is_refusing = False
        self._caught: tuple[bytes, str] | None = None
        self.delay = 0.0
        """Seconds by which each piece is late."""
        self.to_server, self.to_client = _gate(), _gate()
        self._listener = socket.create_server((HOST, 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._listen)

    def close(self) -> None:
        """End everything."""
        self._is_refusing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.to_server.set()
        self.to_client.set()
        self.cut()

    def cut(self) -> None:
        """Reset all connections, at both ends."""
        pipes, self._pipes = self._pipes, []
        for pipe in pipes:
            pipe.reset()

    def half_close(self) -> None:
        """Tell the clients that the server has nothing more to say, and the other way round."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.client.shutdown(socket.SHUT_WR)

    def reset_clients(self, pipes: Sequence[Pipe] | None = None) -> None:
        """Reset the clients alone: what they sent is still on its way to the server."""
        for pipe in self._pipes if pipes is None else pipes:
            _reset(pipe.client)

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Reset what there is, and whatever comes."""
        self._is_refusing = True
        self.cut()
        try:
            yield
        finally:
            self._is_refusing = False

    @contextlib.contextmanager
    def frozen(self, *gates: Any) -> Iterator[None]:
        """Let nothing through, both ways by default; afterwards it arrives, late."""
        gates = gates or (self.to_server, self.to_client)
        for gate in gates:
            gate.clear()
        try:
            yield
        finally:
            for gate in gates:
                gate.set()

    @contextlib.contextmanager
    def delayed(self, seconds: float) -> Iterator[None]:
        """Have each piece arrive so much later."""
        self.delay = seconds
        try:
            yield
        finally:
            self.delay = 0.0

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Let questions through and no answers; then cut: what was done is not known."""
        with self.frozen(self.to_client):
            yield
            self.cut()

    @contextlib.contextmanager
    def orphaned(self) -> Iterator[None]:
        """Hold what is sent, and reset the clients; the server gets it later, from nobody."""
        with self.frozen(self.to_server):
            # long enough that something is on its way
            sleep(0.05)
            self.reset_clients()
            yield

    @contextlib.contextmanager
    def catching(self, words: bytes, gate: str) -> Iterator[None]:
        """Hold up the connection whose client says this next: ``to_server``, or ``to_client``.

        At the end its client is reset, and soon after the server gets what was held, from nobody.
        """
        self._caught = words, gate
        try:
            yield
        finally:
            self._caught = None
            held = [pipe for pipe in self._pipes if pipe.is_held]
            self.reset_clients(held)
            sleep(LATE_SECONDS)
            for pipe in held:
                pipe.let_go()

    def is_holding(self) -> bool:
        """Say whether a connection is held up."""
        return any(pipe.is_held for pipe in self._pipes)

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._is_refusing:
                _reset(client)
            else:
                self._spawn(self._connect, client)

    def _connect(self, client: Any) -> None:
        try:
            server = socket.create_connection(self._server, timeout=5)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipe = Pipe(client, server)
        self._pipes.append(pipe)
        self._spawn(self._pass_on, pipe, client, server, [self.to_server, pipe.to_server])
        self._spawn(self._pass_on, pipe, server, client, [self.to_client, pipe.to_client])

    def _pass_on(self, pipe: Pipe, source: Any, target: Any, gates: Sequence[Any]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(READ_BYTES):
                if self.delay:
                    sleep(self.delay)
                if source is pipe.client and self._caught and self._caught[0] in data:
                    getattr(pipe, self._caught[1]).clear()
                    self._caught = None
                for gate in gates:
                    gate.wait()
                target.sendall(data)
        for gate in gates:
            gate.wait()
        if pipe.is_over():
            if pipe in self._pipes:
                self._pipes.remove(pipe)
            pipe.close()
        else:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    @staticmethod
    def _spawn(function: Any, *args: Any) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()


class Pipe:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, client: Any, server: Any) -> None:
        self.client, self.server = client, server
        self.to_server, self.to_client = _gate(), _gate()
        self._ended = 0

    @property
    def is_held(self) -> bool:
        return not (self.to_server.is_set() and self.to_client.is_set())

    def let_go(self) -> None:
        self.to_server.set()
        self.to_client.set()

    def is_over(self) -> bool:
        """Count an end; say whether both directions ended."""
        self._ended += 1
        return self._ended > 1

    def reset(self) -> None:
        self.let_go()
        _reset(self.client)
        _reset(self.server)

    def close(self) -> None:
        self.client.close()
        self.server.close()


def _gate() -> Any:
    gate = threading.Event()
    gate.set()
    return gate


def _reset(connection: Any) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    # wakes whoever reads it; with nobody else reading, closing is what resets
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
    connection.close()
