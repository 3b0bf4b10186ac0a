"""Problem details (RFC 9457), and which errors become which of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from nameko.exceptions import ContainerBeingKilled
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.wrappers import Request, Response

from shared.errors import (
    DedupeConflictError,
    DispatchError,
    DispatchUncertainError,
    MessageNotFoundError,
    NothingToChangeError,
    NothingToRetryError,
    PayloadError,
    ProviderUnavailableError,
    QueueError,
    QueueNotKnownError,
    RampNotFoundError,
    RampRunningError,
    RpcTimeoutError,
    ScheduleNotFoundError,
    StoreUnavailableError,
    SubscriptionLiveError,
    SubscriptionNotFoundError,
    by_field,
)
from shared.web.responses import json_response

RETRY_AFTER_SECONDS = 5
"""What a client is told to wait when a server behind us does not answer."""


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
        return json_response(self.status, body, self.headers, "application/problem+json")


def problem_of(error: BaseException) -> Problem:
    """Return the problem that a client is told of when ``error`` was raised.

    What the client cannot know of is a 500 that says nothing of the inside.
    """
    match error:
        case Problem():
            return error
        case PayloadError():
            return invalid(error.errors)
        case DedupeConflictError():
            return Problem(
                422,
                "idempotency-key-reused",
                "The Idempotency-Key is used already",
                detail="A request with this Idempotency-Key came before, with another body",
            )
        case QueueError() if type(error) in _MISSING:
            return _missing(error)
        case NothingToChangeError() | SubscriptionLiveError():
            return _conflict(error)
        case DispatchUncertainError():
            return _uncertain(error)
        case _ if isinstance(error, _UNAVAILABLE):
            return unavailable("A server behind this one does not answer")
    return Problem(500, "internal-error", "Internal error")


_MISSING = (
    MessageNotFoundError,
    QueueNotKnownError,
    RampNotFoundError,
    ScheduleNotFoundError,
    SubscriptionNotFoundError,
)


def _missing(error: QueueError) -> Problem:
    match error:
        case QueueNotKnownError():
            return Problem(404, "queue-not-found", "No such queue", detail=str(error))
        case RampNotFoundError():
            return Problem(404, "ramp-not-found", "No such ramp", detail=str(error))
        case ScheduleNotFoundError():
            return Problem(404, "schedule-not-found", "No such schedule", detail=str(error))
        case SubscriptionNotFoundError():
            return Problem(404, "subscription-not-found", "No such subscription", detail=str(error))
    return Problem(404, "message-not-found", "No such message", detail=str(error))


def _conflict(error: QueueError) -> Problem:
    match error:
        case NothingToRetryError():
            return Problem(409, "nothing-to-retry", "Nothing to retry", detail=str(error))
        case RampRunningError():
            return Problem(409, "ramp-running", "The group has a ramp", detail=str(error))
        case SubscriptionLiveError():
            return Problem(409, "subscription-live", "It has a live consumer", detail=str(error))
    return Problem(409, "nothing-to-change", "Nothing to change", detail=str(error))


ANSWERS = (
    Problem,
    PayloadError,
    DedupeConflictError,
    MessageNotFoundError,
    NothingToChangeError,
    SubscriptionNotFoundError,
    SubscriptionLiveError,
    RampNotFoundError,
    QueueNotKnownError,
    ScheduleNotFoundError,
    ProviderUnavailableError,
    DispatchError,
    StoreUnavailableError,
)
"""What a method may raise without being at fault; logged as warnings."""

_UNAVAILABLE = (
    DispatchError,
    StoreUnavailableError,
    ProviderUnavailableError,
    RpcTimeoutError,
    OperationalError,
    InterfaceError,
    PoolTimeoutError,
    ContainerBeingKilled,
)


def invalid(errors: Mapping[str, Any]) -> Problem:
    """Return a 422: what is wrong with which field."""
    flat = by_field(errors, "body")
    detail = "; ".join(f"{field}: {' '.join(said)}" for field, said in flat.items())
    return Problem(422, "validation", "Some fields are not valid", detail=detail, errors=flat)


def _uncertain(error: DispatchUncertainError) -> Problem:
    ids = ", ".join(error.message_ids)
    detail = f"Look for the message {ids} before you send it again"
    return Problem(503, "dispatch-uncertain", "It may or may not have been stored", detail=detail)


def unavailable(detail: str) -> Problem:
    """Return a 503 that says when to try again."""
    wait = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return Problem(503, "unavailable", "Not available now", detail=detail, headers=wait)


def routing_problem(error: HTTPException, request: Request) -> Problem:
    """Return what a client is told whose request no route takes."""
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
        if record.exc_info and isinstance(record.exc_info[1], ANSWERS):
            record.exc_info = None
        return True


logging.getLogger("nameko.containers").addFilter(_WithoutTraceback())
