"""What a handler's end means for its delivery."""

from __future__ import annotations

import logging
import os
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from shared.errors import ContractError, Reject, Retry
from shared.lifecycle import Backoff, DeliveryStatus
from shared.types import Failure, Lease, Outcome

_log = logging.getLogger(__name__)

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and when a failed attempt is repeated.

    :param limit: the most retries; ``None`` for no limit.
    """

    limit: int | None
    backoff: Backoff


def decide(lease: Lease, policy: RetryPolicy, exc_info: ExcInfo | None) -> Outcome:
    """Turn what a handler raised, or nothing, into the outcome of the attempt."""
    if exc_info is None:
        return Outcome(lease, DeliveryStatus.COMPLETED)
    error = exc_info[1]
    failure = failure_of(exc_info)
    if isinstance(error, Reject):
        return Outcome(lease, DeliveryStatus.FAILED, failure)
    retries = lease.delivery.attempts
    if policy.limit is not None and retries >= policy.limit:
        return Outcome(lease, DeliveryStatus.FAILED, failure)
    after = error.after if isinstance(error, Retry) else None
    delay = policy.backoff.delay(retries) if after is None else after
    return Outcome(lease, DeliveryStatus.RETRY, failure, delay)


def broken(lease: Lease, error: ContractError) -> Outcome:
    """Return the outcome of a delivery that no attempt could make succeed."""
    return Outcome(lease, DeliveryStatus.FAILED, Failure(type(error).__name__, str(error)))


def failure_of(exc_info: ExcInfo) -> Failure:
    """Describe an exception as text to be stored."""
    kind, error, trace = exc_info
    text = "".join(traceback.format_exception(*exc_info))
    return Failure(kind.__name__, _text_of(error) or kind.__name__, text, place_of(trace))


def place_of(trace: TracebackType | None) -> str:
    """Return module and function of the last frame that is neither a library's nor ours.

    A service that is installed among the libraries has its first frame after ours. Lines
    are left out: they differ from one release to the next.
    """
    frames = [frame for frame, _ in traceback.walk_tb(trace) if not _is_machinery(frame)]
    own = [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
    at = own[-1] if own else frames[0] if frames else None
    return f"{at.f_globals.get('__name__', '?')}.{at.f_code.co_qualname}" if at else ""


def _is_machinery(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_MACHINERY)


_MACHINERY = ("shared.", "nameko.", "eventlet.")
"""What runs handlers, and is no part of them."""

_LIBRARIES = (
    *(sysconfig.get_path(x) + os.sep for x in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<frozen",
)
"""What the files of Python and of what is installed into it begin with."""


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as exc:
        return f"an error whose text cannot be had: {type(exc).__name__}"


def settle(outcome: Outcome, end: Callable[[Outcome], Any], subscriber: str) -> None:
    """Have an outcome stored and its delivery settled. Nothing else settles.

    :param end: gives the outcome to the message log and, after that, to the provider.
    """
    end(outcome)
    message = outcome.lease.delivery.message
    where = f"message_id={message.id} type={message.type} subscriber={subscriber}"
    match outcome.status:
        case DeliveryStatus.COMPLETED:
            _log.debug("completed %s", where)
        case DeliveryStatus.RETRY:
            _log.info("retry in %.3f s %s error=%s", outcome.delay, where, _kind(outcome))
        case DeliveryStatus.FAILED:
            _log.error("dead letter %s error=%s", where, _kind(outcome))
        case DeliveryStatus.PENDING:
            _log.info("handed back %s", where)


def _kind(outcome: Outcome) -> str:
    return outcome.failure.type if outcome.failure else ""
