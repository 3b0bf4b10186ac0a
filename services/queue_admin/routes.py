"""The routes of ``queue_admin``: who may call them, who that is, and what they answer."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import partial
from typing import Any

from marshmallow import Schema
from werkzeug.wrappers import Request

from shared.events import QueueOperations, QueueService
from shared.settings import Settings
from shared.web import Problem, bearer_token
from shared.web.entrypoint import HttpEntrypoint
from shared.web.requests import load, read_query

_ACTOR = "queue_admin.actor"
"""The key of a WSGI environment under which is found who calls."""


class Route(HttpEntrypoint):
    """An entrypoint that says what it answers, for ``/openapi.json``.

    :param answers: the schema of the body when all goes well.
    :param status: the status then.
    :param refusals: further statuses, beside those that any call may have.
    """

    def __init__(
        self,
        method: str,
        url: str,
        *,
        answers: type[Schema] | None = None,
        status: int = 200,
        refusals: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(method, url, **kwargs)
        self.answers = answers
        self.status = status
        self.refusals = refusals

    @property
    def refuses_queries(self) -> bool:
        """Whether a parameter of the query is a mistake: a filter that would leave nothing out.

        Health takes any, for who asks for it with something that no cache knows.
        """
        # a page may be asked for with anything
        is_page = self.method == "GET" and self.answers is None
        return self.query is None and self.guard is not None and not is_page

    def get_entrypoint_parameters(self, request: Request) -> tuple[tuple[Any, ...], Any]:
        found = super().get_entrypoint_parameters(request)
        if self.refuses_queries:
            load(Schema, read_query(request))
        return found


def actor(request: Request) -> str:
    """Return who calls: the name of the token, or the address of who needs none."""
    return str(request.environ[_ACTOR])


def _check_token(request: Request, settings: Settings) -> None:
    if settings.admin_auth == "none":
        request.environ[_ACTOR] = f"anonymous@{request.remote_addr}"
        return
    given = (bearer_token(request) or "").encode()
    names = [_name(known) for known in settings.admin_tokens if _is(known, given)]
    if not names:
        raise Problem(401, "unauthorized", "A bearer token of QUEUE_ADMIN_TOKENS is needed")
    request.environ[_ACTOR] = names[0]


def _is(known: str, given: bytes) -> bool:
    # in the same time for each token: it tells nothing
    return hmac.compare_digest(given, known.rpartition(":")[2].encode())


def _name(known: str) -> str:
    """Return the name before the token; one without a name is known by its digest."""
    name, _, token = known.rpartition(":")
    return name or f"token-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


unguarded = Route.decorator
http = partial(unguarded, guard=_check_token)


class Calls:
    """What all parts of the service share."""

    queue = QueueService()
    operations = QueueOperations()
