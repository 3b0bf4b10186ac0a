"""The entrypoint that answers HTTP requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from marshmallow import Schema
from nameko.web.handlers import HttpRequestHandler
from werkzeug.wrappers import Request, Response

from shared.settings import Settings
from shared.web.problems import ANSWERS, problem_of
from shared.web.requests import load, read_json, read_query
from shared.web.responses import response_of
from shared.web.server import WebServer

_log = logging.getLogger(__name__)

Guard = Callable[[Request, Settings], None]


class HttpEntrypoint(HttpRequestHandler):
    """Answers requests for one route; the decorator is :data:`http`.

    :param method: such as ``POST``, or several, separated by commas.
    :param url: werkzeug's rule; its values come as keyword arguments.
    :param schema: a marshmallow schema for the body, which must then be a JSON object.
    :param query: a marshmallow schema for the parameters of the query.
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
        query: type[Schema] | None = None,
        guard: Guard | None = None,
        expected_exceptions: type[Exception] | tuple[type[Exception], ...] = (),
        **kwargs: Any,
    ) -> None:
        if isinstance(expected_exceptions, type):
            expected_exceptions = (expected_exceptions,)
        super().__init__(
            method, url, expected_exceptions=(*ANSWERS, *expected_exceptions), **kwargs
        )
        self.schema = schema
        self.query = query
        self.guard = guard

    def get_entrypoint_parameters(self, request: Request) -> tuple[tuple[Any, ...], Any]:
        settings = self.server.settings
        if self.guard is not None:
            self.guard(request, settings)
        args: tuple[Any, ...] = (request,)
        if self.query is not None:
            args = (request, load(self.query, read_query(request)))
        if self.schema is not None:
            body = read_json(request, settings.max_payload_bytes)
            args = (*args, load(self.schema, body))
        self.server.refuse_when_stopping()
        return args, request.path_values  # type: ignore[attr-defined]

    def handle_result(self, event: Any, _worker_ctx: Any, result: Any, exc_info: Any) -> Any:
        # nameko logged the error already; it ends here, and not in the connection's thread
        event.send(problem_of(exc_info[1]).as_response() if exc_info else result)
        return result, exc_info

    def response_from_result(self, result: Any) -> Response:
        return response_of(result)

    def response_from_exception(self, exc: Exception) -> Response:
        problem = problem_of(exc)
        if problem.status == 500:
            _log.error("cannot answer %s %s", self.method, self.url, exc_info=exc)
        return problem.as_response()


http = HttpEntrypoint.decorator
"""Decorates a method of a service that answers HTTP requests; see :class:`HttpEntrypoint`."""
