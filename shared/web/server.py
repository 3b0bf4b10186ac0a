"""The server: where it listens, how it ends, and when it closes a connection."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import eventlet
from eventlet.green import socket
from nameko.web.server import BindAddress, HttpOnlyProtocol, WsgiApp
from nameko.web.server import WebServer as NamekoWebServer
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map
from werkzeug.wrappers import Request, Response

from shared.observe.traces import carried
from shared.settings import Settings, refuse_start, settings_or_exit
from shared.web.problems import problem_of, routing_problem, unavailable

_log = logging.getLogger(__name__)

SOCKET_SECONDS = 30.0
"""How long a connection may be silent, in a request or between two."""

MOST_DISCARDED_BYTES = 65_536
"""An unread body up to this size is read away; beyond, closing the connection is cheaper."""

LINGER_SECONDS = 3.0
LINGER_BYTES = 16 << 20
"""How long, and how much, is read from a client that is told to stop sending. Closed at
once, the connection would be reset, and the answer lost with it."""

FINISH_SECONDS = 2.0
"""How long a stop waits for answers that are on their way out."""

CONNECTION = "shared.web.connection"
"""The key of a WSGI environment under which the connection's own handler is found."""


class WebServer(NamekoWebServer):
    """Listens on the address that the settings give to its service.

    A service of which they know nothing has nameko's ``WEB_SERVER_ADDRESS``.
    """

    settings: Settings
    _starting: bool
    _is_accepting: bool

    def __init__(self) -> None:
        super().__init__()
        self._connections: set[Any] = set()

    def bind(self, container: Any) -> Any:
        instance = super().bind(container)
        instance.settings = settings_or_exit(container.config)
        return instance

    @property
    def bind_addr(self) -> BindAddress:
        address = self.settings.addresses.get(self.container.service_name)
        return BindAddress(address.host, address.port) if address else super().bind_addr

    @property
    def address(self) -> BindAddress:
        """Where it listens, with the port that it was given if it asked for any (0)."""
        return BindAddress(*self._sock.getsockname()[:2])

    def start(self) -> None:
        if self._starting:
            return
        self._starting = True
        self._sock = self._listen()
        self._serv = self.get_wsgi_server(self._sock, self.get_wsgi_app())
        self._gt = self.container.spawn_managed_thread(self.run, identifier="http-server")

    def run(self) -> None:
        while self._is_accepting:
            try:
                sock, address = self._sock.accept()
            except OSError as exc:
                # no descriptor is free, or the client has gone already
                _log.warning("cannot accept a connection: %s", exc)
                eventlet.sleep(0.05)
                continue
            sock.settimeout(SOCKET_SECONDS)
            # else the end of a longer answer waits 40 ms for the client to acknowledge the rest
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(sock, address)

    def process_request(self, sock: Any, address: Any) -> None:
        try:
            super().process_request(sock, address)
        except Exception as exc:
            # raised from a managed thread, it would end the service
            _log.warning("a connection broke: %s", exc)
            sock.close()

    def get_wsgi_app(self) -> WsgiApp:
        return _App(self)

    def get_wsgi_server(self, sock: Any, wsgi_app: Any, **_options: Any) -> Any:
        server = super().get_wsgi_server(sock, wsgi_app, protocol=_Protocol)
        server.socket_timeout = SOCKET_SECONDS
        # it is whatever the client wrote
        server.log_x_forwarded_for = False
        return server

    def context_data_from_headers(self, request: Request) -> dict[str, Any]:
        """Take the trace that a request belongs to: it goes on with what is dispatched."""
        return {**super().context_data_from_headers(request), **carried(request.headers.get)}

    def make_url_map(self) -> Map:
        url_map = super().make_url_map()
        # //path is not here, rather than somewhere else
        url_map.merge_slashes = False
        return url_map

    def unregister_provider(self, provider: Any) -> None:
        """Accept nothing more; what runs is finished and answered."""
        self._close()
        super().unregister_provider(provider)

    def stop(self) -> None:
        self.wait_for_providers()
        self._close()
        with eventlet.Timeout(FINISH_SECONDS, False):
            while self._starting and self._serv.outstanding_requests:
                eventlet.sleep(0.005)
        for connection in list(self._connections):
            connection.kill()

    def kill(self) -> None:
        self._close()

    def refuse_when_stopping(self) -> None:
        """Let no worker begin in a service that ends.

        :raises Problem: 503.
        """
        if not self._is_accepting:
            raise unavailable("The service stops")

    def _listen(self) -> Any:
        host, port = self.bind_addr
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            # shared, which eventlet does unasked, a request would go to one of two processes
            sock = eventlet.listen((host, port), family=family, reuse_port=False)
        except OSError as exc:
            service = self.container.service_name
            refuse_start(f"{service} cannot listen on {host}:{port}: {exc.strerror or exc}")
        sock.settimeout(None)
        return sock

    def _serve(self, sock: Any, address: Any) -> None:
        serve = partial(self.process_request, sock, address)
        connection = self.container.spawn_managed_thread(serve, identifier="http-connection")
        self._connections.add(connection)
        connection.link(self._connections.discard)

    def _close(self) -> None:
        if self._starting and self._is_accepting:
            self._gt.kill()
            self._sock.close()
        self._is_accepting = False


class _App(WsgiApp):
    """nameko's, with problems for requests that no route takes."""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        response = self._answer(Request(environ, shallow=True))
        if _leaves_much(environ["wsgi.input"]):
            environ[CONNECTION].hang_up()
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        try:
            adapter = self.url_map.bind_to_environ(request.environ)
            provider, request.path_values = adapter.match()  # type: ignore[attr-defined]
            return provider.handle_request(request)
        except HTTPException as exc:
            if exc.response is not None or (exc.code or 500) < 400:
                return exc.get_response(request.environ)
            return routing_problem(exc, request).as_response()
        except Exception as exc:
            _log.exception("cannot answer %s %s", request.method, request.path)
            return problem_of(exc).as_response()


class _Protocol(HttpOnlyProtocol):
    """Lets the application end a connection, and the client read the answer first."""

    lingers = False

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        environ[CONNECTION] = self
        return environ

    def hang_up(self) -> None:
        """Close the connection after this answer, without reading what is left of the request."""
        self.lingers = self.close_connection = True

    def finish(self) -> None:
        if self.lingers:
            self._linger()
        super().finish()

    def _linger(self) -> None:
        left = LINGER_BYTES
        try:
            self.connection.shutdown(socket.SHUT_WR)
            with eventlet.Timeout(LINGER_SECONDS, False):
                while left > 0 and (read := len(self.connection.recv(1 << 16))):
                    left -= read
        except OSError:
            pass  # it went before us


def _leaves_much(body: Any) -> bool:
    if body.chunked_input:
        return bool(body.chunk_length != 0)
    return (body.content_length or 0) - body.position > MOST_DISCARDED_BYTES
