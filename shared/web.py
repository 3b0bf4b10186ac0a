"""HTTP for services: JSON in, JSON out, and problem details (RFC 9457) for what goes wrong.

Example::

    from shared.web import Problem, http

    class Shop:
        name = "shop"

        @http("POST", "/orders/<order_id>", schema=OrderSchema)
        def change(self, request, body, order_id):
            if order_id not in self.orders:
                raise Problem(404, "order-not-found", "No such order")
            return 200, {"order_id": order_id}

A method returns a dict, ``(status, dict)``, ``(status, headers, dict)``, ``(204, None)``
or a werkzeug ``Response``. ``body`` is what the schema loaded, and passed only where there
is a schema. What the suite itself raises becomes a problem too: see :func:`problem_of`.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NoReturn

import eventlet
from eventlet.green import socket
from marshmallow import Schema, ValidationError
from nameko.exceptions import ContainerBeingKilled
from nameko.web.handlers import HttpRequestHandler
from nameko.web.server import BindAddress, HttpOnlyProtocol, WsgiApp
from nameko.web.server import WebServer as NamekoWebServer
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import Map
from werkzeug.wrappers import Request, Response

from shared.errors import (
    DispatchError,
    DispatchUncertainError,
    MessageNotFoundError,
    NothingToRetryError,
    PayloadError,
    ProviderUnavailableError,
    StoreUnavailableError,
)
from shared.settings import Settings, refuse_start, settings_or_exit
from shared.types import MAX_JSON_DEPTH, check_json

__all__ = ["Problem", "WebServer", "bearer_token", "http", "problem_of"]

_log = logging.getLogger(__name__)

Guard = Callable[[Request, Settings], None]

SOCKET_SECONDS = 30.0
"""How long a connection may be silent, in a request or between two."""

RETRY_AFTER_SECONDS = 5
"""What a client is told to wait when a server behind us does not answer."""

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


# --- problems


class Problem(Exception):  # noqa: N818 - RFC 9457 calls it so
    """Raised when a request is answered with an error.

    :param status: the HTTP status.
    :param slug: ends its type, ``/problems/<slug>``, which never changes.
    :param title: what that type of problem is, the same each time.
    :param detail: what went wrong this time; the title where there is no more to say.
    :param errors: for bad input, what is wrong with each field.
    :param headers: such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        slug: str,
        title: str,
        *,
        detail: str | None = None,
        errors: Mapping[str, list[str]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status = status
        self.type = f"/problems/{slug}"
        self.title = title
        self.detail = detail or title
        self.errors = errors
        self.headers = dict(headers or {})
        if status == 401:
            # a 401 without it is no 401 (RFC 9110, 15.5.2)
            self.headers.setdefault("WWW-Authenticate", "Bearer")
        super().__init__(f"{status} {self.type}: {self.detail}")

    def as_response(self) -> Response:
        """Return the answer that tells of it."""
        body = {key: getattr(self, key) for key in ("type", "title", "status", "detail")}
        if self.errors is not None:
            body["errors"] = self.errors
        return _json_response(self.status, body, self.headers, "application/problem+json")


def problem_of(error: BaseException) -> Problem:
    """Return the problem that a client is told of when ``error`` was raised.

    What the client cannot know of is a 500 that says nothing of the inside.
    """
    match error:
        case Problem():
            return error
        case PayloadError():
            return _invalid(error.errors)
        case MessageNotFoundError():
            return Problem(404, "message-not-found", "No such message", detail=str(error))
        case NothingToRetryError():
            return Problem(409, "nothing-to-retry", "Nothing to retry", detail=str(error))
        case DispatchUncertainError():
            return _uncertain(error)
        case _ if isinstance(error, _UNAVAILABLE):
            return _unavailable("A server behind this one does not answer")
    return Problem(500, "internal-error", "Internal error")


_ANSWERS = (
    Problem,
    PayloadError,
    MessageNotFoundError,
    NothingToRetryError,
    DispatchError,
    StoreUnavailableError,
)
"""What a method may raise without being at fault; logged as warnings."""

_UNAVAILABLE = (
    DispatchError,
    StoreUnavailableError,
    ProviderUnavailableError,
    OperationalError,
    InterfaceError,
    PoolTimeoutError,
    ContainerBeingKilled,
)


def _invalid(errors: Mapping[str, Any]) -> Problem:
    flat = dict(_flatten(errors))
    detail = "; ".join(f"{field}: {' '.join(said)}" for field, said in flat.items())
    return Problem(422, "validation", "Some fields are not valid", detail=detail, errors=flat)


def _flatten(errors: Any, path: str = "") -> Iterable[tuple[str, list[str]]]:
    """Yield each field, dotted where it is nested, with what is said of it."""
    if not isinstance(errors, Mapping):
        yield path or "body", [errors] if isinstance(errors, str) else list(map(str, errors))
        return
    for key, below in errors.items():
        name = path if key == "_schema" else f"{path}.{key}".removeprefix(".")
        yield from _flatten(below, name)


def _uncertain(error: DispatchUncertainError) -> Problem:
    ids = ", ".join(error.message_ids)
    detail = f"Look for the message {ids} before you send it again"
    return Problem(503, "dispatch-uncertain", "It may or may not have been stored", detail=detail)


def _unavailable(detail: str) -> Problem:
    wait = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return Problem(503, "unavailable", "Not available now", detail=detail, headers=wait)


def _malformed(detail: str) -> Problem:
    return Problem(400, "malformed-json", "The body is not a JSON object", detail=detail)


def _too_large(most_bytes: int) -> Problem:
    detail = f"at most {most_bytes} bytes are allowed"
    return Problem(413, "payload-too-large", "The body is too large", detail=detail)


def _routing_problem(error: HTTPException, request: Request) -> Problem:
    match error:
        case NotFound():
            return Problem(
                404, "not-found", "Nothing is here", detail=f"nothing is at {request.path}"
            )
        case MethodNotAllowed():
            allowed = ", ".join(sorted(error.valid_methods or ()))
            detail = f"{request.path} allows {allowed}"
            return Problem(
                405,
                "method-not-allowed",
                "Not with this method",
                detail=detail,
                headers={"Allow": allowed},
            )
    return Problem(error.code or 400, "bad-request", error.name)


class _WithoutTraceback(logging.Filter):
    """Takes the traceback from what nameko logs of an answer: it tells nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], _ANSWERS):
            record.exc_info = None
        return True


logging.getLogger("nameko.containers").addFilter(_WithoutTraceback())


# --- what comes in


def bearer_token(request: Request) -> str | None:
    """Return the token of an ``Authorization: Bearer`` header (RFC 6750, 2.1), if there is one."""
    header = request.headers.get("Authorization", "")
    match = re.fullmatch(r"bearer +([A-Za-z0-9._~+/-]+=*) *", header, re.IGNORECASE)
    return match[1] if match else None


def read_json(request: Request, most_bytes: int) -> dict[str, Any]:
    """Read the JSON object that a request carries.

    Each of its members may nest as deep as a payload may.

    :raises Problem: 400, 408, 413 or 415.
    """
    if request.mimetype != "application/json":
        raise Problem(
            415,
            "unsupported-media-type",
            "The body must be JSON",
            detail="Content-Type must be application/json",
            headers={"Accept": "application/json"},
        )
    body = _parse(_read_body(request, most_bytes))
    if not isinstance(body, dict):
        raise _malformed("the body must be an object")
    return body


def _read_body(request: Request, most_bytes: int) -> bytes:
    expected = request.content_length or 0
    if expected > most_bytes:
        raise _too_large(most_bytes)
    try:
        raw: bytes = request.environ["wsgi.input"].read(most_bytes + 1)
    except TimeoutError as exc:
        raise Problem(408, "request-timeout", "The body did not arrive in time") from exc
    except (OSError, ValueError) as exc:
        raise _malformed("the body broke off") from exc
    if len(raw) > most_bytes:
        raise _too_large(most_bytes)
    if len(raw) < expected:
        raise _malformed("the body broke off")
    return raw


def _load(schema: type[Schema], body: dict[str, Any]) -> Any:
    try:
        return schema().load(body)
    except ValidationError as exc:
        raise _invalid(exc.messages_dict) from exc


def _parse(raw: bytes) -> Any:
    try:
        text = raw.decode()
        body = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as exc:
        raise _malformed("the body is not UTF-8") from exc
    except json.JSONDecodeError as exc:
        raise _malformed(f"the body is not JSON: {exc}") from exc
    except RecursionError as exc:
        raise _malformed(f"the body nests deeper than {MAX_JSON_DEPTH} levels") from exc
    except ValueError as exc:
        # Python's own limit, 4300, is against work that grows with the square of it
        raise _malformed("the body has a number of too many digits") from exc
    _check(body, text)
    return body


def _check(body: Any, text: str) -> None:
    """Check what the parser lets pass: depth, NUL, halves of characters."""
    members = body if isinstance(body, dict) else {"body": body}
    try:
        check_json(list(members), "body")
        for name, value in members.items():
            check_json(value, name)
        if _SURROGATE.search(text):
            json.dumps(body, ensure_ascii=False).encode()
    except PayloadError as exc:
        raise _malformed(str(exc)) from exc
    except UnicodeEncodeError as exc:
        raise _malformed("the body has half of a surrogate pair") from exc


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _refuse_constant(name: str) -> NoReturn:
    raise _malformed(f"the body holds {name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise _malformed("the body has a number that is out of range")
    return number


# --- what goes out


def _json_response(
    status: int,
    body: Any,
    headers: Mapping[str, str] | None = None,
    mimetype: str = "application/json",
) -> Response:
    if body is None:
        empty = Response(status=status, headers=headers)
        del empty.headers["Content-Type"]
        return empty
    text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    response = Response(text, status=status, headers=headers, mimetype=mimetype)
    # what is told here is true now, and some of it is secret
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    return response


def _response_of(result: Any) -> Response:
    if isinstance(result, Response):
        return result
    if not isinstance(result, tuple):
        return _json_response(200, result)
    status, *headers, body = result
    return _json_response(status, body, *headers)


# --- nameko's extensions


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
            raise _unavailable("The service stops")

    def _listen(self) -> Any:
        host, port = self.bind_addr
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            sock = eventlet.listen((host, port), family=family)
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


class HttpEntrypoint(HttpRequestHandler):
    """Answers requests for one route; the decorator is :data:`http`.

    :param method: such as ``POST``, or several, separated by commas.
    :param url: werkzeug's rule; its values come as keyword arguments.
    :param schema: a marshmallow schema for the body, which must then be a JSON object.
    :param guard: called with the request and the settings before anything is read;
        raises :class:`Problem` for a caller who may not.
    """

    server = WebServer()

    def __init__(
        self,
        method: str,
        url: str,
        *,
        schema: type[Schema] | None = None,
        guard: Guard | None = None,
        expected_exceptions: type[Exception] | tuple[type[Exception], ...] = (),
        **kwargs: Any,
    ) -> None:
        if isinstance(expected_exceptions, type):
            expected_exceptions = (expected_exceptions,)
        super().__init__(
            method, url, expected_exceptions=(*_ANSWERS, *expected_exceptions), **kwargs
        )
        self.schema = schema
        self.guard = guard

    def get_entrypoint_parameters(self, request: Request) -> tuple[tuple[Any, ...], Any]:
        settings = self.server.settings
        if self.guard is not None:
            self.guard(request, settings)
        args: tuple[Any, ...] = (request,)
        if self.schema is not None:
            body = read_json(request, settings.max_payload_bytes)
            args = (request, _load(self.schema, body))
        self.server.refuse_when_stopping()
        return args, request.path_values  # type: ignore[attr-defined]

    def handle_result(self, event: Any, _worker_ctx: Any, result: Any, exc_info: Any) -> Any:
        # nameko logged the error already; it ends here, and not in the connection's thread
        event.send(problem_of(exc_info[1]).as_response() if exc_info else result)
        return result, exc_info

    def response_from_result(self, result: Any) -> Response:
        return _response_of(result)

    def response_from_exception(self, exc: Exception) -> Response:
        problem = problem_of(exc)
        if problem.status == 500:
            _log.error("cannot answer %s %s", self.method, self.url, exc_info=exc)
        return problem.as_response()


http = HttpEntrypoint.decorator
"""Decorates a method of a service that answers HTTP requests; see :class:`HttpEntrypoint`."""


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
            return _routing_problem(exc, request).as_response()
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
